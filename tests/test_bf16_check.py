"""bf16 convolutions that a CPU computes wrongly train in float32; shown with convolutions that are wrong on purpose."""

import copy
import logging

import pytest
import torch
from monai.networks.blocks import UpSample
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldae.models.autoencoder import AutoencoderKL
from ldae.models.convnext import ConvNeXt
from ldae.models.placement import place_module
from ldae.models.slice_cnn import SliceCNN
from ldae.models.unet import UNet
from ldae.training.bf16_check import bf16_errors, guard_bf16, relative_error
from ldae.utils.errors import UserError


class Spoiled(torch.autograd.Function):
    """Identity of the weight; `spoil` changes its gradient."""

    @staticmethod
    def forward(ctx, weight, spoil):
        ctx.spoil = spoil
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.spoil(gradient.clone()), None


def faulty(spoil, first_axis, base=nn.Conv3d):
    """A convolution class whose weight gradient is wrong in bf16 for inputs with this size along the first axis."""

    class Faulty(base):
        def _conv_forward(self, x, weight, bias):
            if torch.is_autocast_enabled("cpu") and x.shape[2] == first_axis:
                weight = Spoiled.apply(weight, spoil)
            return super()._conv_forward(x, weight, bias)

    return Faulty


def garbage(gradient):
    return gradient.fill_(1e30)


def one_channel(gradient):
    gradient[1] *= 1.2
    return gradient


def nothing_finite(gradient):
    gradient[0, 0] = torch.nan
    return gradient


def gradients(conv, x, bf16=True):
    """The dtype of the output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = conv(x)
    y.float().pow(2).sum().backward()
    return y.dtype, [x.grad, *(p.grad.clone() for p in conv.parameters())]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def close(found, expected, tolerance=0.02):
    return all(relative_error(f, e) < tolerance for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("spoil", [garbage, one_channel, nothing_finite])
def test_a_wrong_gradient_is_detected_logged_and_computed_in_float32(spoil, caplog):
    torch.manual_seed(0)
    conv = faulty(spoil, 4)(16, 32, 3, padding=1)
    bad, good = torch.randn(2, 16, 4, 5, 4), torch.randn(2, 16, 5, 5, 4)
    expected = {x: gradients(conv, x, bf16=False)[1] for x in (bad, good)}
    assert not close(gradients(conv, bad)[1], expected[bad])  # without the guard
    assert guard_bf16(conv) is conv
    for _ in range(2):
        dtype, found = gradients(conv, bad)
        assert dtype is torch.bfloat16  # the dtype that other layers expect
        assert close(found, expected[bad])
    dtype, found = gradients(conv, good)
    assert dtype is torch.bfloat16
    assert close(found, expected[good])
    (line,) = warnings(caplog)  # once for two calls, and only for the wrong shape
    assert "weight gradient" in line
    assert "Faulty of 16 -> 32 channels, kernel (3, 3, 3)" in line
    assert "input (2, 16, 4, 5, 4)" in line


def test_only_a_wrong_shape_is_computed_in_float32():
    """Convolutions in float32 run without autocast, all others with it; inference needs no gradient and no check."""
    seen = []

    class Watched(faulty(garbage, 4)):
        def _conv_forward(self, x, weight, bias):
            seen.append((len(x), x.shape[2], torch.is_autocast_enabled("cpu")))
            return super()._conv_forward(x, weight, bias)

    conv = guard_bf16(Watched(2, 3, 3, padding=1))
    bad, good = torch.randn(2, 2, 4, 3, 3), torch.randn(2, 2, 3, 3, 3)
    gradients(conv, bad), gradients(conv, good)
    seen.clear()
    gradients(conv, bad), gradients(conv, good)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        conv(bad)
    assert seen == [(2, 4, False), (2, 3, True), (2, 4, True)]


@pytest.mark.parametrize(("kernel", "padding", "size", "bf16"), [(3, 1, 2, False), (3, 1, 3, True), (1, 0, 2, True)])
def test_a_shape_known_to_be_wrong_is_computed_in_float32_without_a_check(kernel, padding, size, bf16, caplog):
    seen = []

    class Watched(nn.Conv3d):
        def _conv_forward(self, x, weight, bias):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super()._conv_forward(x, weight, bias)

    conv, x = guard_bf16(Watched(3, 4, kernel, padding=padding)), torch.randn(1, 3, size, 5, 4)
    gradients(conv, x)
    assert seen[-1] is bf16
    assert len(seen) == (3 if bf16 else 1)  # a check computes it twice more
    assert not warnings(caplog)


def test_a_convolution_with_upsampling_is_checked_by_the_size_of_the_upsampled_volume():
    torch.manual_seed(0)
    decoder = AutoencoderKL(channels=(4, 4), residual_blocks=1, groups=2).decoder
    conv = place_module(next(m for m in decoder.blocks if isinstance(m, UpSample)), torch.device("cpu"))
    x = torch.randn(2, 4, 1, 3, 2)
    expected = gradients(conv, x, bf16=False)[1]
    dtype, found = gradients(guard_bf16(conv), x)
    assert dtype is torch.bfloat16
    # The upsampled size 2 is known to be wrong, so all but the rounding of the output is float32.
    assert close(found, expected, 0.005)


def test_2d_and_grouped_convolutions_are_checked(caplog):
    torch.manual_seed(0)
    conv = guard_bf16(faulty(one_channel, 8, nn.Conv2d)(12, 12, 7, padding=3, groups=12))
    x = torch.randn(3, 12, 8, 6).to(memory_format=torch.channels_last)
    expected = gradients(conv, x, bf16=False)[1]
    assert close(gradients(conv, x)[1], expected)
    (line,) = warnings(caplog)
    assert "groups 12" in line


def test_the_check_does_not_disturb_checkpointing_operation_counts_or_random_numbers(caplog):
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    plain = faulty(garbage, 6)(2, 3, 3, padding=1)
    conv = guard_bf16(copy.deepcopy(plain))
    x = torch.randn(1, 2, 5, 4, 4, requires_grad=True)
    state = torch.get_rng_state()
    counts = []
    for module in (conv, plain):
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
            checkpoint(module, x, use_reentrant=False).float().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(conv, torch.randn(1, 2, 6, 4, 4), use_reentrant=False).float().sum().backward()
    assert len(warnings(caplog)) == 1
    assert conv.weight.grad.isfinite().all()


def test_a_compiled_network_is_checked_while_it_is_traced(caplog):
    torch.manual_seed(0)
    network = guard_bf16(nn.Sequential(faulty(garbage, 4)(3, 4, 3, padding=1), nn.GELU(), nn.Conv3d(4, 2, 1)))
    x = torch.randn(2, 3, 4, 3, 3)
    expected = gradients(network, x, bf16=False)[1]
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert close(gradients(compiled, x)[1], expected)
    assert len(warnings(caplog)) == 1


def networks():
    unet = {"base": 8, "multipliers": (1, 2), "residual_blocks": 1, "attention_at": (2,), "groups": 4}
    yield AutoencoderKL(channels=(8, 8), residual_blocks=1, groups=4), torch.rand(1, 1, 8, 8, 8)
    yield PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1), torch.rand(1, 1, 16, 16, 16)
    yield UNet(**unet), (torch.randn(2, 3, 4, 4, 4), torch.tensor([3, 7]))
    yield SliceCNN((16, 16)), torch.rand(2, 1, 16, 16)
    yield ConvNeXt(widths=(4, 8), depths=(1, 1), stem=2), torch.rand(2, 1, 16, 16)


@pytest.mark.parametrize("case", range(5))
def test_every_convolution_of_the_networks_is_guarded_and_parameter_names_stay(case):
    torch.manual_seed(0)
    network, inputs = list(networks())[case]
    place_module(network, torch.device("cpu"))
    names, text = list(network.state_dict()), str(network)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    kinds = [type(m) for m in convolutions]
    guard_bf16(network)
    guarded = [type(m) for m in convolutions]
    assert all(new is not old and issubclass(new, old) for new, old in zip(guarded, kinds, strict=True))
    guard_bf16(network)
    assert [type(m) for m in convolutions] == guarded
    assert list(network.state_dict()) == names
    assert str(network).replace("Guarded", "") == text
    twin = copy.deepcopy(network)
    twin.load_state_dict(network.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y = twin(*inputs) if isinstance(inputs, tuple) else twin(inputs)
    y = y[-1] if isinstance(y, list | tuple) else y
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())


@pytest.mark.parametrize("size", [(1, 3, 4), (2, 2, 2), (2, 5, 4), (3, 2, 2), (4, 2, 2)])
def test_guarded_gradients_are_correct_on_this_cpu(size):
    """Meaningful on a CPU with bf16 in hardware; elsewhere bf16 is emulated, which is correct without the guard."""
    torch.manual_seed(0)
    conv, x = place_module(nn.Conv3d(32, 32, 3, padding=1), torch.device("cpu")), torch.randn(4, 32, *size)
    expected = gradients(conv, x, bf16=False)[1]
    assert close(gradients(guard_bf16(conv), x)[1], expected)


def test_relative_errors_of_a_correct_and_of_a_wrong_result():
    torch.manual_seed(0)
    conv = nn.Conv3d(1, 1, 1)
    errors = bf16_errors(nn.functional.conv3d, torch.randn(2, 1, 9, 9, 9), conv.weight.detach(), conv.bias.detach())
    assert list(errors) == ["output", "input gradient", "weight gradient", "bias gradient"]
    assert all(0 < error < 0.01 for error in errors.values())
    expected = torch.ones(4, 5, 6)
    wrong = expected.clone()
    wrong[:, 3] = 1.5
    assert relative_error(wrong, expected) == pytest.approx(0.5)
    wrong[0, 0, 0] = torch.inf
    assert relative_error(wrong, expected) == torch.inf


def test_a_transposed_convolution_is_refused():
    with pytest.raises(UserError, match=r"^1: .*accelerator=cpu"):
        guard_bf16(nn.Sequential(nn.Conv3d(1, 1, 1), nn.ConvTranspose3d(1, 1, 2)))
