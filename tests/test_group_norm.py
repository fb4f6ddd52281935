"""The split group norm has the values and gradients of PyTorch's own, with stand-ins for the CUDA kernels it calls.

The stand-ins are written from the kernels' definitions. `make gpu-check` compares the kernels themselves on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ldae.models.group_norm import has_few_large_groups, split_group_norm


def per_channel(value):
    return value[None, :, None]


def elemt(x, weight, bias, mean, invstd, eps):
    return ((x - per_channel(mean)) * per_channel(invstd * weight) + per_channel(bias)).to(x.dtype)


def backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    return dy.sum((0, 2)), (dy * (x - per_channel(mean))).sum((0, 2)), None, None


def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    factor = invstd.square() * sum_dy_xmu / count.sum()
    centred = dy - per_channel(sum_dy / count.sum()) - (x - per_channel(mean)) * per_channel(factor)
    return centred * per_channel(invstd * weight)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(torch, "batch_norm_elemt", elemt)
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", backward_reduce)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", backward_elemt)


@pytest.mark.parametrize(("shape", "groups"), [((1, 8, 4, 6, 8), 4), ((2, 6, 3, 5, 2), 2), ((3, 4, 2, 2, 2), 4)])
def test_values_and_gradients_are_those_of_group_norm(shape, groups):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape) + 1).requires_grad_()
    weight, bias = torch.randn(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()
    with torch.no_grad():
        weight[0] = 0  # the output of this channel is constant, but its input still gets gradients through the group
    found, expected = split_group_norm(x, groups, weight, bias, 1e-5), F.group_norm(x, groups, weight, bias, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn(shape)
    pairs = zip(*(torch.autograd.grad(y, (x, weight, bias), dy) for y in (found, expected)), strict=True)
    for own, reference in pairs:
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-4)


def test_the_split_norm_is_for_few_large_groups_on_a_gpu():
    large = torch.zeros(1, dtype=torch.bfloat16).expand(1, 32, 128, 128, 128)
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=large.dtype)
    assert not has_few_large_groups(large, 32)
    assert has_few_large_groups(Pretended(large, on_gpu), 32)
    assert not has_few_large_groups(Pretended(large[..., :32], on_gpu), 32), "small groups"
    assert not has_few_large_groups(Pretended(large.expand(16, -1, -1, -1, -1), on_gpu), 32), "many groups"


class Pretended:
    """A tensor that reports a GPU as its device."""

    def __init__(self, tensor, place):
        self.tensor, self.device, self.dtype = tensor, place.device, place.dtype

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        return self.tensor[index]
