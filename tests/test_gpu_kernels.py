"""The GPU kernels compute what the blocks they replace compute: values and gradients.

Triton's kernels run in its interpreter, where Triton is installed; the blocks around them are tested with a stand-in.
`make gpu-check` compares both on a GPU.
"""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn
from torch.nn import functional as F

from ldae.models import gpu_kernels
from ldae.models.blocks import ResidualBlock
from ldae.models.convnext import Block, ChannelNorm
from ldae.models.gpu_kernels import CHANNELS_LAST_KERNELS, runs_kernels
from ldae.models.placement import remove_kernels, use_kernels

LAST = torch.channels_last_3d


def stand_in(x, norm, factor=None, shift=None, silu=True):
    h = norm(x) if factor is None else torch.addcmul(wide(shift), norm(x), wide(factor))
    return F.silu(h) if silu else h


def wide(value):
    return value[..., None, None, None]


def row_norm_stand_in(x, norm, dtype):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps).to(torch.float32)


def residual_stand_in(x, branch, scale, factor):
    return x + branch * scale * (1 if factor is None else factor[:, None, None, None])


@pytest.fixture
def kernels(monkeypatch):
    """Take every volume for one on a GPU in 16 bits, and let nn.GroupNorm stay as it is, for the stand-in."""
    monkeypatch.setattr(gpu_kernels, "runs_kernels", lambda x: True)
    monkeypatch.setattr(gpu_kernels, "runs_slice_kernels", lambda x: True)
    monkeypatch.setattr(gpu_kernels, "norm_silu", stand_in)
    monkeypatch.setattr(gpu_kernels, "norm_rows", row_norm_stand_in)
    monkeypatch.setattr(gpu_kernels, "add_scaled", residual_stand_in)
    return {plain: kernel for plain, kernel in CHANNELS_LAST_KERNELS.items() if plain is not nn.GroupNorm}


def randomise(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def compare(module, kernels, x, *others):
    """Values and gradients of the module with the kernels and without."""
    module = randomise(module)
    changed = use_kernels(copy.deepcopy(module), kernels)
    assert type(changed) is not type(module)
    results = []
    for network in (module, changed):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = network(leaf, *others)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, [leaf, *network.parameters()], torch.randn(y.shape))
        results.append([y, *gradients])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert type(remove_kernels(changed)) is type(module)
    return results[1][0]


@pytest.mark.parametrize(
    "options", [{}, {"semantic": True}, {"downsample": (2, 2, 2)}, {"upsample": (1, 2, 2), "semantic": True}]
)
def test_residual_block(kernels, options):
    block = ResidualBlock(4, 8, 6, groups=2, dropout=0.0, **options)
    x = torch.randn(2, 4, 2, 4, 6).to(memory_format=LAST)
    compare(block, kernels, x, torch.randn(2, 6), torch.randn(2, 6))


@pytest.mark.parametrize("width", [4, 6])
def test_block_of_the_autoencoder(kernels, width):
    block = AEKLResBlock(3, 4, norm_num_groups=2, norm_eps=1e-6, out_channels=width)
    compare(block, kernels, torch.randn(1, 4, 3, 4, 2).to(memory_format=LAST))


@pytest.mark.parametrize(
    "module",
    [
        nn.Upsample(scale_factor=2.0),
        nn.Upsample(scale_factor=(1.0, 2.0, 3.0)),
        nn.AvgPool3d((1, 2, 2)),
        nn.AvgPool3d((2, 2, 2)),
    ],
)
def test_resampling_keeps_volumes_channels_last(kernels, module):
    y = compare(module, kernels, torch.randn(2, 4, 4, 2, 6).to(memory_format=LAST))
    assert y.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("depth", [0.0, 0.5])
def test_block_of_convnext(kernels, depth):
    block = Block(4, kernel=3, layer_scale=0.5, drop_rate=depth)
    block.draw_depth = lambda x: torch.tensor([2.0, 0.0, 2.0]).view(3, 1, 1, 1) if depth else None
    compare(block, kernels, torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last))


def test_norm_over_the_channels_of_slices(kernels):
    compare(ChannelNorm(4, eps=1e-6), kernels, torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last))


def test_without_a_gpu_nothing_runs_on_the_kernels():
    assert not runs_kernels(torch.zeros(1, 4, 2, 2, 2, dtype=torch.bfloat16))
    block = use_kernels(randomise(ResidualBlock(4, 4, 6, groups=2, dropout=0.0)), CHANNELS_LAST_KERNELS)
    x, time = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 6)
    expected = remove_kernels(copy.deepcopy(block))(x, time)
    torch.testing.assert_close(block(x, time), expected)


INTERPRETED = """
import sys, torch
from torch import nn
from torch.nn import functional as F
import triton.runtime.interpreter as interpreter
patch = interpreter._patch_lang_tensor

def patched(tensor, scope):  # NumPy 2.5 refuses to convert arrays of one value, as the interpreter does
    patch(tensor, scope)
    for name in ("__index__", "__int__"):
        scope.set_attr(tensor, name, lambda self: int(self.handle.data.reshape(-1)[0]))

interpreter._patch_lang_tensor = patched
from ldae.models.gpu_norm import norm_modulate_silu

torch.manual_seed(0)
for shape, groups, modulated, silu in (
    ((2, 12, 5, 6, 7), 4, True, True), ((1, 96, 4, 9, 4), 32, True, True), ((2, 64, 3, 4, 4), 32, False, False),
    ((2, 8, 3, 3, 3), 2, False, True),
):
    batch, channels = shape[:2]
    norm = nn.GroupNorm(groups, channels)
    nn.init.normal_(norm.weight, 1, 0.1), nn.init.normal_(norm.bias)
    x = (2 * torch.randn(shape) + 0.5).requires_grad_()
    more = [torch.randn(batch, channels, requires_grad=True) for _ in range(2)] if modulated else []
    u = norm(x)
    if modulated:
        u = u * more[0][..., None, None, None] + more[1][..., None, None, None]
    expected = F.silu(u) if silu else u
    found = norm_modulate_silu(x, norm, *more, silu=silu)
    leaves, dy = [x, norm.weight, norm.bias, *more], torch.randn(shape)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    for a, b in zip(
        [found, *torch.autograd.grad(found, leaves, dy)], [expected, *torch.autograd.grad(expected, leaves, dy)],
        strict=True,
    ):
        assert float((a - b).norm() / b.norm()) < 1e-5

from ldae.models.gpu_layer_norm import layer_norm, scaled_residual

x, branch, dy = (torch.randn(2, 5, 7, 12, requires_grad=n < 2) for n in range(3))
weight, bias, factor = torch.randn(12, requires_grad=True), torch.randn(12, requires_grad=True), torch.rand(2)
pairs = [
    (layer_norm(x, weight, bias, 1e-6, torch.float32), F.layer_norm(x, (12,), weight, bias, 1e-6), (x, weight, bias)),
    (scaled_residual(x, branch, weight, factor), x + factor.view(2, 1, 1, 1) * weight * branch, (x, branch, weight)),
    (scaled_residual(x, branch, weight), x + weight * branch, (x, branch, weight)),
]
for found, expected, leaves in pairs:
    for a, b in zip(
        [found, *torch.autograd.grad(found, leaves, dy)], [expected, *torch.autograd.grad(expected, leaves, dy)],
        strict=True,
    ):
        assert float((a - b).norm() / b.norm()) < 1e-5
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
