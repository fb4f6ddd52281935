"""ConvNeXt (arXiv 2201.03545) for single-channel slices, with torchvision's parameter names and settings.

The names are those of torchvision's `convnext_small` and its relatives, so that an ImageNet file loads strictly: its
three-channel stem is summed to one channel, its classifier's last Linear has no place here.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.state import load_strictly, read_tensors
from ldae.utils.errors import UserError

NORM_EPS = 1e-6
CLASSIFIER = ("classifier.2.weight", "classifier.2.bias")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; in channels_last both permutations are views."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """A permutation of axes as a module, which holds a number in torchvision's names."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Permuted view."""
        return x.permute(self.axes)


class Block(nn.Module):
    """x + drop(layer_scale * (depthwise conv, LayerNorm, Linear, GELU, Linear))."""

    def __init__(self, width: int, kernel: int, layer_scale: float, drop: float) -> None:
        super().__init__()
        self.drop = drop
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

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        branch = self.layer_scale * self.block(x)
        if self.training and self.drop > 0:
            # Stochastic depth (arXiv 1603.09382): whole samples skip the branch.
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            branch = branch * (kept.to(branch.dtype) / (1 - self.drop))
        return x + branch


class ConvNeXt(nn.Module):
    """(N, 1, H, W) -> (N, widths[-1]): global average pool, LayerNorm.

    Args:
        widths, depths: channels and blocks of each stage; (96, 192, 384, 768), (3, 3, 27, 3) is ConvNeXt-Small.
        stem: patch size and stride of the first convolution.
        kernel: odd size of the depthwise convolutions; on CPUs the backward pass of 7 costs 20 times that of 3.
        stochastic_depth: share of skipped branches at the last block, growing linearly from 0 at the first.
        layer_scale: what the branches' learned scales start from; 1e-6 hardly learns without ImageNet weights.
        init_std: of convolutions and Linears (truncated normal, biases 0); None: PyTorch's own, by fan-in.
        weights: local ImageNet file, .pth/.pt (read with weights_only) or .safetensors; loaded strictly.
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
    """Load torchvision's ImageNet weights of the same size, strictly.

    The RGB stem is summed to one channel (a grey image is its value in all three); the classifier's last Linear, the
    1000 classes, is left out by name.

    Raises:
        UserError: the file is missing or unreadable, or a tensor is missing, unexpected or of another shape.
    """
    tensors = read_tensors(path)
    for name in CLASSIFIER:
        if tensors.pop(name, None) is None:
            raise UserError(f"{path}: tensor '{name}' is missing; is it an ImageNet file of torchvision?")
    stem = tensors.get("features.0.0.weight")
    if stem is not None and stem.ndim == 4 and model.features[0][0].in_channels == 1:
        tensors["features.0.0.weight"] = stem.sum(dim=1, keepdim=True)
    load_strictly(model, tensors, path)
