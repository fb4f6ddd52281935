"""ConvNeXt (arXiv 2201.03545) for single-channel slices, with torchvision's parameter names and settings.

The parameters have the names of torchvision's `convnext_small` and its relatives, so that their ImageNet weights can be
loaded strictly.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.state import load_strictly, read_tensors
from ldae.utils.errors import UserError

NORM_EPS = 1e-6
CLASSIFIER = ("classifier.2.weight", "classifier.2.bias")  # the Linear to 1000 classes, which this network lacks


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W); channels-last, both permutations are views."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """A permutation of axes as a module, so that the modules around it have the numbers of torchvision's names."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """A view of x with permuted axes."""
        return x.permute(self.axes)


class Block(nn.Module):
    """x + stochastic_depth(layer_scale * branch); the branch: depthwise conv, LayerNorm, Linear, GELU, Linear."""

    def __init__(self, width: int, kernel: int, layer_scale: float, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.block = nn.Sequential(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(width, eps=NORM_EPS),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute(0, 3, 1, 2),
        )

    def draw_depth(self, x: Tensor) -> Tensor | None:
        """Stochastic depth (arXiv 1603.09382): factors (N, 1, 1, 1) of the branch, 0 for the samples that skip it.

        None where no sample may skip it.
        """
        if not (self.training and self.drop_rate > 0):
            return None
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_rate
        return kept.float() / (1 - self.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        branch, factor = self.layer_scale * self.block(x), self.draw_depth(x)
        return x + (branch if factor is None else branch * factor.to(branch.dtype))


class ConvNeXt(nn.Module):
    """Slices (N, in_channels, H, W) -> features (N, widths[-1]) after a global average pool and a LayerNorm.

    Args:
        widths, depths: channels and blocks of each stage. (96, 192, 384, 768) and (3, 3, 27, 3) are ConvNeXt-Small.
        stem: patch size and stride of the first convolution.
        kernel: odd size of the depthwise convolutions. On CPUs the backward pass of 7 takes 20 times as long as of 3.
        stochastic_depth: probability of skipping the last block's branch. It grows linearly from 0 at the first block.
        layer_scale: initial value of the learned scales of the branches. 1e-6 hardly learns without ImageNet weights.
        init_std: standard deviation of the initial weights (truncated normal, biases 0). None: PyTorch's own, by
            fan-in.
        weights: local file of torchvision's ImageNet weights, .pth or .pt (read without unpickling code) or
            .safetensors, loaded strictly. None: random weights.
    """

    def __init__(
        self,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 27, 3),
        stem: int = 4,
        kernel: int = 7,
        stochastic_depth: float = 0.0,
        layer_scale: float = 1e-6,
        init_std: float | None = 0.02,
        in_channels: int = 1,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = widths[-1]
        drops = torch.linspace(0, stochastic_depth, sum(depths), device="cpu").tolist()
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(in_channels, widths[0], stem, stride=stem), ChannelNorm(widths[0], eps=NORM_EPS))
        ]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if index > 0:
                before = widths[index - 1]
                layers.append(nn.Sequential(ChannelNorm(before, eps=NORM_EPS), nn.Conv2d(before, width, 2, stride=2)))
            layers.append(nn.Sequential(*[Block(width, kernel, layer_scale, drops.pop(0)) for _ in range(depth)]))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(widths[-1], eps=NORM_EPS), nn.Flatten(1))
        if init_std is not None:
            self._initialise(init_std)
        if weights is not None:
            load_imagenet(self, weights)

    def _initialise(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, C)."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1))


def load_imagenet(model: ConvNeXt, path: Path | str) -> None:
    """Load torchvision's ImageNet weights for a network of the same size, strictly.

    The stem's weights for red, green and blue are summed to one channel, which equals a grey image in all three. The
    Linear to the 1000 classes is left out.

    Raises:
        UserError: the file is missing or unreadable, or a tensor is missing, unexpected or of another shape.
    """
    tensors = read_tensors(path)
    for name in CLASSIFIER:
        if tensors.pop(name, None) is None:
            raise UserError(f"{path}: tensor '{name}' is missing; give torchvision's ImageNet weights of ConvNeXt")
    stem = tensors.get("features.0.0.weight")
    if stem is not None and stem.ndim == 4 and model.features[0][0].in_channels == 1:
        tensors["features.0.0.weight"] = stem.sum(dim=1, keepdim=True)
    load_strictly(model, tensors, path)
