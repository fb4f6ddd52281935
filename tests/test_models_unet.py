"""The U-Net and the gradient estimator: shapes, conditioning on t and y, zero output before training, checkpointing."""

import copy
import math

import pytest
import torch
from torch import nn

from ldae.models.blocks import Attention, ResidualBlock, time_features
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.placement import place_module
from ldae.models.unet import UNet
from ldae.utils.errors import UserError

SHAPE = {"base": 8, "multipliers": (1, 2), "residual_blocks": 1, "attention_at": (2,), "groups": 4}


def randomise(module: nn.Module) -> nn.Module:
    """The module with random parameters, because zero-initialised outputs would hide all that comes before them."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.fixture
def unet():
    return randomise(UNet(**SHAPE))


@pytest.fixture
def estimator():
    return randomise(GradientEstimator(semantic_dim=6, **SHAPE))


Z, T, Y = torch.randn(2, 3, 4, 6, 4), torch.tensor([3.0, 977.5]), torch.randn(2, 6)


@pytest.mark.parametrize("resample", [(2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 3)])
def test_output_has_the_latents_shape(resample, multipliers):
    shape = {**SHAPE, "multipliers": multipliers, "resample": resample, "attention_at": (2, 4), "heads": 2}
    unet, estimator = UNet(**shape), GradientEstimator(6, **shape)
    size = tuple(3 * s for s in unet.strides)
    z = torch.randn(2, 3, *size)
    features = unet.features(z, T)
    assert features.h.shape == (2, 8 * multipliers[-1], 3, 3, 3)
    assert unet.head(features).shape == estimator(features, Y).shape == z.shape


def test_sizes_that_do_not_divide_are_refused(unet):
    with pytest.raises(UserError, match="along y"):
        unet(torch.randn(1, 3, 4, 5, 4), T[:1])


def test_untrained_networks_return_exactly_zero():
    unet, estimator = UNet(**SHAPE), GradientEstimator(6, **SHAPE)
    assert torch.equal(unet(Z, T), torch.zeros_like(Z))
    assert torch.equal(estimator(unet.features(Z, T), Y), torch.zeros_like(Z))


def test_time_features_are_cosines_then_sines_and_take_fractions():
    features = time_features(torch.tensor([2.5]), 6)[0]
    frequencies = [math.exp(-math.log(10_000) * i / 3) for i in range(3)]
    expected = [math.cos(2.5 * f) for f in frequencies] + [math.sin(2.5 * f) for f in frequencies]
    torch.testing.assert_close(features, torch.tensor(expected))


def test_t_and_y_change_the_output_of_their_own_sample_only(unet, estimator):
    features = unet.features(Z, T)
    g = estimator(features, Y)
    other = estimator(features, torch.cat([Y[:1], Y[1:] + 1]))
    assert torch.equal(g[0], other[0])
    assert not torch.allclose(g[1], other[1])
    assert not torch.allclose(unet(Z, T), unet(Z, T + 0.5))


def test_adaptive_normalisation_follows_its_equation():
    torch.manual_seed(1)
    block = randomise(ResidualBlock(4, 4, 8, groups=2, dropout=0.0, semantic=True))
    h, time, semantic = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 8), torch.randn(2, 8)

    def pair(linear, embedding):
        return (v[..., None, None, None] for v in linear(nn.functional.silu(embedding)).chunk(2, dim=1))

    (scale_t, shift_t), (scale_y, shift_y) = pair(block.time.linear, time), pair(block.semantic.linear, semantic)
    expected = (1 + scale_y) * (h * (1 + scale_t) + shift_t) + shift_y
    factor, shift = block.modulation(time, semantic)
    torch.testing.assert_close(h * factor[..., None, None, None] + shift[..., None, None, None], expected)


def test_attention_is_softmax_over_all_voxels():
    attention = randomise(Attention(4, heads=2, groups=2))
    x = torch.randn(1, 4, 2, 3, 2)
    tokens = attention.norm(x).flatten(2)[0].T  # (L, C)
    q, k, v = (attention.qkv(tokens)).chunk(3, dim=1)
    heads = []
    for part in (slice(0, 2), slice(2, 4)):
        shares = (q[:, part] @ k[:, part].T / math.sqrt(2)).softmax(dim=1)
        heads.append(shares @ v[:, part])
    expected = x + attention.projection(torch.cat(heads, dim=1)).T.reshape_as(x[0])[None]
    torch.testing.assert_close(attention(x), expected)


def test_checkpointing_changes_neither_outputs_nor_gradients(unet, estimator):
    results = []
    for checkpointing in (False, True):
        networks = nn.ModuleList([copy.deepcopy(unet), copy.deepcopy(estimator)])
        for network in networks:
            network.checkpointing = checkpointing
        features = networks[0].features(Z, T)
        output = networks[0].head(features) + networks[1](features, Y)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in networks.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_training_the_estimator_leaves_the_unet_unchanged(unet, estimator):
    unet.requires_grad_(False)
    before = copy.deepcopy(unet.state_dict())
    optimizer = torch.optim.Adam(estimator.parameters(), 0.1)
    # Placed, because PyTorch's GroupNorm crashes on channels-last features without a gradient (see CpuGroupNorm).
    unet, estimator = (place_module(m, torch.device("cpu")) for m in (unet, estimator))
    with torch.no_grad():
        features = unet.features(Z.to(memory_format=torch.channels_last_3d), T)
    estimator(features, Y).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert all(p.grad is None for p in unet.parameters())


def test_layout_and_precision_do_not_change_the_result(unet):
    expected = unet(Z, T)
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(last(Z.to(memory_format=torch.channels_last_3d), T), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = unet(Z, T)
    assert (half.float() - expected).norm() < 0.05 * expected.norm()
