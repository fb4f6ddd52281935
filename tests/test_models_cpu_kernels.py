"""Every CPU kernel computes what the plain network computes, forward and backward, and only where it is faster."""

import copy

import pytest
import torch
from monai.networks.blocks import UpSample
from torch import nn

from ldae.models.autoencoder import AutoencoderKL
from ldae.models.cpu_kernels import CPU_KERNELS, FEWEST_VOXELS, LARGEST_IM2COL, SmallVolumeConv3d
from ldae.models.gpu_kernels import CHANNELS_LAST_KERNELS, GpuGroupNorm
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.placement import place_module, remove_kernels
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.slice_cnn import SliceCNN
from ldae.models.unet import UNet

CPU = torch.device("cpu")
UNET = {"base": 8, "multipliers": (1, 2), "residual_blocks": 1, "attention_at": (2,), "groups": 4, "dropout": 0.0}


def randomise(module: nn.Module) -> nn.Module:
    """The module with random parameters, because zero-initialised outputs would hide all that comes before them."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def run(network, inputs):
    """Output of network(*inputs), and gradients of all inputs that need one and of all parameters."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in inputs]
    torch.manual_seed(1)
    y = network(*inputs)
    network.zero_grad()
    y.pow(3).sum().backward()
    leaves = [x for x in inputs if x.requires_grad] + list(network.parameters())
    return [y.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves)]


def assert_same_as_plain(plain, *inputs):
    """Placing the network changes the class of some modules, but neither outputs nor gradients."""
    placed = place_module(copy.deepcopy(plain), CPU)
    assert [type(m) for m in placed.modules()] != [type(m) for m in plain.modules()]
    assert list(placed.state_dict()) == list(plain.state_dict())
    expected = run(plain, inputs)
    rounding = 1e-6 * max(value.abs().max().item() for value in expected)  # of gradients that cancel to 0
    for found, right in zip(run(placed, inputs), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * right.abs().max().item() + rounding)


@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "padding"), [(4, 3, 1, 1), (4, 3, 2, 0), (4, 1, 1, 0), (3, 3, 1, 1), (1, 3, 1, 1)]
)
@pytest.mark.parametrize("shape", [(1, 3, 8, 7, 6), (2, 3, 8, 7, 6)])
def test_convolution_of_a_small_volume(outputs, kernel, stride, padding, shape):
    conv = nn.Conv3d(3, outputs, kernel, stride=stride, padding=padding)
    assert_same_as_plain(conv, torch.randn(shape, requires_grad=True))


def upsampling() -> UpSample:
    decoder = AutoencoderKL(channels=(4, 4), residual_blocks=1, groups=2).decoder
    return next(block for block in decoder.blocks if isinstance(block, UpSample))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("shape", [(2, 4, 8, 7, 6), (1, 4, 9, 8, 10), (1, 4, 2, 3, 2)])
def test_upsampling_of_the_autoencoder(layout, shape):
    assert_same_as_plain(upsampling(), torch.randn(shape).to(memory_format=layout).requires_grad_())


def test_group_norm_of_a_channels_last_volume_without_gradient():
    """The plain one cannot be compared in this memory format: PyTorch ends with a segmentation fault."""
    norm, x = randomise(nn.GroupNorm(2, 4)), torch.randn(2, 4, 3, 4, 5)
    expected = run(norm, [x])
    placed = place_module(copy.deepcopy(norm), CPU)
    for found, right in zip(run(placed, [x.to(memory_format=torch.channels_last_3d)]), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def encoder(**options) -> SemanticEncoder:
    torch.manual_seed(0)
    network = SemanticEncoder(SliceCNN((8, 12), out_channels=10), slices=6, dim=16, heads=4, **options)
    return randomise(network)


@pytest.mark.parametrize("options", [{}, {"mean_volume_shape": (8, 12, 6), "position_gate": True}])
@pytest.mark.parametrize("slice_dropout", [0.0, 0.5])
def test_semantic_encoder_in_training(options, slice_dropout):
    network = encoder(dropout=0.0, slice_dropout=slice_dropout, **options)
    assert_same_as_plain(network, torch.rand(3, 1, 8, 12, 6, requires_grad=True))


def test_every_parameter_of_the_semantic_encoder_gets_a_gradient():
    """Otherwise a training step in several processes never ends, because each waits for the gradients of the others."""
    network = place_module(encoder(mean_volume_shape=(8, 12, 6), position_gate=True), CPU)
    network(torch.rand(2, 1, 8, 12, 6)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_semantic_encoder_in_inference_on_scans_with_blank_slices(checkpointing):
    x = torch.rand(2, 1, 8, 12, 6)
    x[0, ..., [0, 1, 4]] = 0
    x[1, ..., 5:] = 0
    plain = encoder(checkpointing=checkpointing).eval()
    placed = place_module(copy.deepcopy(plain), CPU)
    with torch.no_grad():
        torch.testing.assert_close(placed(x), plain(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(placed.attention(x), plain.attention(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(placed(torch.ones_like(x)), plain(torch.ones_like(x)), rtol=1e-4, atol=1e-4)


def test_attention_weights_of_every_head():
    plain, tokens = encoder().eval(), torch.randn(3, 6, 16)
    placed = place_module(copy.deepcopy(plain), CPU)
    for found, expected in zip(placed.attend(tokens), plain.attend(tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blank_slices_are_read_once_in_inference_only(checkpointing):
    network, read = place_module(encoder(checkpointing=checkpointing).eval(), CPU), []
    network.backbone.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0])))
    x = torch.rand(2, 1, 8, 12, 6)
    x[0, ..., [0, 1, 4]] = 0
    x[1, ..., 4:] = 0
    network(x)
    assert sum(read) == 12
    read.clear()
    with torch.no_grad():
        network(x)
    assert sum(read) == (9 if checkpointing else 8)  # 7 slices, and a blank one for each volume or for the batch


@pytest.mark.parametrize("batch", [1, 2])
def test_autoencoder(batch):
    class Reconstruction(AutoencoderKL):
        def forward(self, x):
            return super().forward(x)[0]

    autoencoder = Reconstruction(channels=(4, 4, 8), residual_blocks=1, groups=2)
    assert_same_as_plain(autoencoder, torch.rand(batch, 1, 16, 24, 16))


@pytest.mark.parametrize("shape", [(1, 3, 4, 6, 4), (2, 3, 16, 8, 12)])
@pytest.mark.parametrize("resample", [(2, 2, 2), (1, 2, 2)])
def test_unet_and_gradient_estimator(shape, resample):
    unet = randomise(UNet(**UNET, resample=resample))
    z_t, t = torch.randn(shape), torch.linspace(3.0, 977.5, shape[0])
    assert_same_as_plain(unet, z_t, t)
    features = unet.features(z_t, t)
    estimator = randomise(GradientEstimator(semantic_dim=6, **UNET, resample=resample))
    assert_same_as_plain(FixedFeatures(estimator, features), torch.randn(shape[0], 6, requires_grad=True))


class FixedFeatures(nn.Module):
    """The estimator as a function of y alone, for given features of the U-Net."""

    def __init__(self, estimator, features):
        super().__init__()
        self.estimator = estimator
        self.features = type(features)(*(detach(value) for value in features))

    def forward(self, y):
        return self.estimator(self.features, y)


def detach(value):
    return tuple(map(detach, value)) if isinstance(value, tuple) else value if value is None else value.detach()


def test_small_volume_convolution_leaves_the_rest_to_pytorch():
    conv = SmallVolumeConv3d(2, 4, 3, padding=1)
    small = torch.zeros(1, 2, 4, 4, 4)
    assert conv.is_slow(small)
    assert SmallVolumeConv3d(2, 3, 3, padding=1).is_slow(small)  # an odd number of outputs
    assert not conv.is_slow(torch.zeros(2, 2, 4, 4, 4))  # several samples
    assert not conv.is_slow(torch.zeros(1, 2, LARGEST_IM2COL, 1, 1))
    assert not conv.is_slow(torch.zeros(1, 2, 1, 1, 1))
    assert not conv.is_slow(small.double())
    with torch.device("meta"):
        assert not SmallVolumeConv3d(500, 400, 3).is_slow(torch.zeros(1, 500, 4, 4, 4, device="cpu"))  # many weights
    assert not SmallVolumeConv3d(2, 4, 1).is_slow(small)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv.is_slow(small)


def test_fused_upsampling_is_for_many_voxels_in_float32():
    block = place_module(upsampling(), CPU)
    few, many = torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, FEWEST_VOXELS, 1, 1)
    assert block.is_faster(many)
    assert not block.is_faster(few)
    assert not block.is_faster(many.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not block.is_faster(many)
        assert block(few).dtype is torch.bfloat16


def test_kernels_are_chosen_by_device_and_removed_again():
    def build():
        return nn.Sequential(AutoencoderKL(channels=(4, 4), residual_blocks=1, groups=2), UNet(**UNET), encoder())

    plain = [type(m) for m in build().modules()]
    module = place_module(build(), CPU)
    placed = {type(m) for m in module.modules()}
    assert set(CPU_KERNELS.values()) <= placed
    assert not set(CPU_KERNELS) & placed
    assert [type(m) for m in remove_kernels(module, CPU_KERNELS).modules()] == plain
    moved = {type(m) for m in place_module(place_module(build(), CPU), torch.device("meta")).modules()}
    elsewhere = {type(m) for m in place_module(build(), torch.device("meta")).modules()}
    assert moved == elsewhere
    assert GpuGroupNorm in elsewhere
    last = {type(m) for m in place_module(build(), torch.device("meta"), channels_last=True).modules()}
    assert {CHANNELS_LAST_KERNELS[kind] for kind in (nn.GroupNorm, nn.Upsample)} <= last
    assert not set(CPU_KERNELS.values()) & elsewhere
