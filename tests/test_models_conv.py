"""Proves the convolution of small volumes on a CPU: the same function, gradients included, and only where it pays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldae.models.autoencoder import AutoencoderKL
from ldae.models.cpu_kernels import FEWEST, SMALLEST, Conv3d, EnlargingConv3d, with_onednn


@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "padding"), [(4, 3, 1, 1), (4, 3, 2, 0), (4, 1, 1, 0), (3, 3, 1, 1), (1, 3, 1, 1)]
)
def test_a_small_volume_is_convolved_to_the_same_values_and_gradients(outputs, kernel, stride, padding):
    torch.manual_seed(0)
    ours = Conv3d(3, outputs, kernel, stride=stride, padding=padding)
    plain = nn.Conv3d(3, outputs, kernel, stride=stride, padding=padding)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 8, 7, 6)
    found = []
    for conv in (ours, plain):
        own = x.clone().requires_grad_()
        y = conv(own)
        y.square().sum().backward()
        found.append([y.detach(), own.grad, conv.weight.grad, conv.bias.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_only_what_pytorch_would_compute_slowly_is_changed():
    conv = Conv3d(2, 4, 3, padding=1)
    small = torch.zeros(1, 2, 4, 4, 4)
    assert conv._slow(small)
    assert not conv._slow(torch.zeros(2, 2, 4, 4, 4))  # several samples
    assert not conv._slow(small.double())
    assert not conv._slow(torch.zeros(1, 2, SMALLEST, 1, 1))
    assert not Conv3d(2, 4, 1)._slow(small)
    assert Conv3d(2, 3, 3, padding=1)._slow(small)  # an odd number of outputs too
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv._slow(small)


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_enlargement_and_its_convolution_are_one_transposed_convolution(factors, channels_last):
    torch.manual_seed(0)
    ours = EnlargingConv3d(3, 5, factors)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    x, found = torch.randn(2, 3, 8, 7, 6), []
    assert ours._pays(x)
    for plain in (False, True):
        own = x.clone(memory_format=layout).requires_grad_()
        large = F.interpolate(own, scale_factor=tuple(map(float, factors)), mode="nearest")
        y = F.conv3d(large, ours.weight, ours.bias, padding=1) if plain else ours(own)
        ours.zero_grad()
        y.pow(3).sum().backward()
        found.append([y.detach(), own.grad, ours.weight.grad, ours.bias.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_an_enlargement_stays_where_it_pays_or_was_not_measured():
    conv = EnlargingConv3d(2, 4, (2, 2, 2))
    few, many = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, FEWEST, 1, 1)
    assert conv._pays(many)
    assert not conv._pays(few)
    assert not conv._pays(many.double())
    assert conv(few).shape == (1, 4, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv._pays(many)
        assert conv(few).dtype is torch.bfloat16


def test_monais_convolutions_are_turned_into_ours_under_their_names():
    module = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv2d(1, 2, 3))
    names = list(module.state_dict())
    assert [type(child) for child in with_onednn(module)] == [Conv3d, nn.Conv2d]
    assert list(module.state_dict()) == names
    autoencoder = AutoencoderKL(channels=(4, 4), residual_blocks=1, groups=2)
    assert not [child for child in autoencoder.modules() if type(child) is nn.Conv3d]
    assert [type(child) for child in autoencoder.decoder.modules()].count(EnlargingConv3d) == 1
