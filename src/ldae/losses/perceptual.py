"""Perceptual losses, whose weights are read from local files. Nothing is downloaded.

LPIPS (arXiv 1801.03924) compares SqueezeNet 1.1 features of slices with learned linear heads. MedicalNet (arXiv
1904.00625) compares features of a 3D ResNet trained on medical volumes (MONAI's network).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldae.models.state import load_strictly, read_tensors
from ldae.utils.errors import UserError

FIRE_CHANNELS = (  # (in, squeeze, expand) channels of SqueezeNet 1.1's fire modules, arXiv 1602.07360
    (64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128),
    (256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256),
)  # fmt: skip
FIRE_INDICES = (3, 4, 6, 7, 9, 10, 11, 12)  # their indices in torchvision's `features`
TAPS = (1, 4, 7, 9, 10, 11, 12)  # indices of the layers whose outputs LPIPS compares
HEAD_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
SLICES = ("slices_x", "slices_y", "slices_z")  # keys of the slice indices that `draw` draws
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Fire(nn.Module):
    """SqueezeNet's block, with torchvision's parameter names."""

    def __init__(self, width: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, 2 expand, H, W)."""
        x = functional.relu(self.squeeze(x))
        return torch.cat([functional.relu(self.expand1x1(x)), functional.relu(self.expand3x3(x))], dim=1)


class SqueezeLpips(nn.Module):
    """LPIPS distance of pairs of images (N, 1, H, W) in [-1, 1]: (N,). The weights are frozen by `lpips_network`."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [nn.Identity() for _ in range(13)]
        features[0] = nn.Conv2d(3, 64, 3, stride=2)
        features[1] = nn.ReLU()
        for index in (2, 5, 8):
            features[index] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        for index, channels in zip(FIRE_INDICES, FIRE_CHANNELS, strict=True):
            features[index] = Fire(*channels)
        self.features = nn.ModuleList(features)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in HEAD_CHANNELS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def _taps(self, x: Tensor) -> list[Tensor]:
        """Outputs of the layers TAPS, normalised to unit length over the channels."""
        x = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in TAPS:
                taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of each pair of images (N, 1, H, W): (N,)."""
        pairs = zip(self.heads, self._taps(a), self._taps(b), strict=True)
        return torch.stack([head((fa - fb).square()).mean((1, 2, 3)) for head, fa, fb in pairs]).sum(0)


def lpips_network(backbone: str, heads: str) -> SqueezeLpips:
    """SqueezeLpips with frozen weights from two local files.

    Args:
        backbone: torchvision's SqueezeNet 1.1.
        heads: LPIPS's linear heads for it.

    Raises:
        UserError: a file is missing, unreadable or does not fit.
    """
    network = SqueezeLpips()
    wanted = {n: t for n, t in read_tensors(backbone).items() if not n.startswith("classifier.")}
    load_strictly(network.features, {n.removeprefix("features."): t for n, t in wanted.items()}, backbone)
    # The published file names head i `lin{i}.model.1.weight`.
    tensors = {n.removeprefix("lin").replace(".model.1.", "."): t for n, t in read_tensors(heads).items()}
    load_strictly(network.heads, tensors, heads)
    return network.eval().requires_grad_(False)


def plane_slices(volume: Tensor, axis: int, keep: Tensor | None = None) -> Tensor:
    """Slices of (B, 1, X, Y, Z) along spatial `axis`, (B S, 1, H, W): those with the indices `keep` (S,), or all."""
    chosen = volume if keep is None else volume.index_select(2 + axis, keep)
    return chosen.movedim(2 + axis, 1).flatten(0, 1)


def draw_slices(shape: Sequence[int], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Indices of a random `share` of the slices of a volume (X, Y, Z) along each axis, ascending int64, by SLICES."""
    drawn = {}
    for name, count in zip(SLICES, shape, strict=True):
        keep = torch.arange(count)
        if share < 1:
            keep = torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
        drawn[name] = keep
    return drawn


class SliceLpips(nn.Module):
    """LPIPS of volumes: the mean over the slices of each plane, and over the three planes.

    Args:
        backbone, heads: local files (see lpips_network).
        share: share of the slices of each plane that `draw` draws for a training step.
        total: factor on the mean over the planes. 3 gives the published sum.
        signed: whether voxels in [0, 1] are mapped to [-1, 1], for which LPIPS was made. False, as published.
    """

    def __init__(self, backbone: str, heads: str, share: float = 0.5, total: float = 1.0, signed: bool = True) -> None:
        super().__init__()
        self.network = lpips_network(backbone, heads)
        self.share = share
        self.total = total
        self.signed = signed

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random slices of volumes of `shape` (X, Y, Z) for a training step, on the CPU."""
        return draw_slices(shape, self.share, generator)

    def forward(self, a: Tensor, b: Tensor, drawn: Mapping[str, Tensor] | None = None) -> Tensor:
        """Distance of volumes (B, 1, X, Y, Z) in [0, 1], a scalar, over all slices or those of `draw` on the device."""
        if self.signed:
            a, b = 2 * a - 1, 2 * b - 1
        planes = []
        for axis, name in enumerate(SLICES):
            keep = None if drawn is None else drawn[name]
            planes.append(self.network(plane_slices(a, axis, keep), plane_slices(b, axis, keep)).mean())
        return self.total * torch.stack(planes).mean()


class MedicalNetDistance(nn.Module):
    """Squared distance between unit-normalised features of a MedicalNet 3D ResNet.

    Args:
        weights: local file of a MedicalNet checkpoint (`resnet_10_23dataset.pth`, ...).
        depth: number of layers of the network: 10, 18, 34 or 50.
    """

    def __init__(self, weights: str, depth: int = 10) -> None:
        super().__init__()
        from monai.networks.nets import resnet

        builders = {10: resnet.resnet10, 18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50}
        if depth not in builders:
            raise UserError(f"perceptual.depth: {depth} is not one of {sorted(builders)}")
        shortcut = "A" if depth in (18, 34) else "B"  # as these checkpoints were trained
        self.network = builders[depth](
            pretrained=False, spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type=shortcut,
            bias_downsample=shortcut == "A",
        )  # fmt: skip
        tensors = {n.removeprefix("module."): t for n, t in read_tensors(weights).items()}
        load_strictly(self.network, {n: t for n, t in tensors.items() if not n.startswith("conv_seg.")}, weights)
        self.network.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Sequence[Tensor]:
        """Features of the standardised volumes after each of the four residual stages."""
        x = (x - x.mean((1, 2, 3, 4), keepdim=True)) / (x.std((1, 2, 3, 4), keepdim=True) + 1e-6)
        net = self.network
        x = net.maxpool(net.act(net.bn1(net.conv1(x))))
        taps = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        """Draws nothing, because whole volumes are compared."""
        return {}

    def forward(self, a: Tensor, b: Tensor, drawn: Mapping[str, Tensor] | None = None) -> Tensor:
        """Distance of volumes (B, 1, X, Y, Z), a scalar, mean over the residual stages."""
        pairs = zip(self.features(a), self.features(b), strict=True)
        return torch.stack([(fa - fb).square().sum(1).mean() for fa, fb in pairs]).mean()
