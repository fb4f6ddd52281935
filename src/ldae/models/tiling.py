"""The autoencoder's blocks in slabs along x, for GPUs that cannot hold a full-size volume of 64 channels a few times.

Tiles that run through the whole network differ from the whole, because every GroupNorm sees the statistics of its tile.
Here one layer at a time is walked in slabs that overlap by what its convolution reaches, and a norm's statistics are
those of the whole volume: the result is the whole's up to rounding. Between layers, volumes lie in host memory; the
device holds one slab. For inference.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.utils.errors import UserError

Pointwise = Callable[[Tensor], Tensor]
HOST = torch.device("cpu")


class SlicedInference:
    """Walks blocks over volumes (B, C, X, Y, Z) in host memory, `rows` planes along x at a time on `device`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        if rows < 1:
            raise UserError(f"model.autoencoder.tile={rows}: give a number of planes, or null for the whole volume")
        self.rows, self.device = rows, device

    def through(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        """x through all blocks; the result is on the device again."""
        x = x.to(HOST)
        for block in blocks:
            x = self.block(block, x)
        return x.to(self.device)

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block of MONAI's AutoencoderKL without attention.

        Raises:
            TypeError: another kind of block.
        """
        if isinstance(block, Convolution):
            return self.convolve(block.conv, x)
        if isinstance(block, AEKLResBlock):
            return self._residual(block, x)
        if isinstance(block, AEKLDownsample):
            return self.convolve(block.conv.conv, x, pad=(0, 1))
        if isinstance(block, UpSample):
            return self._upsample(block, x)
        if isinstance(block, nn.GroupNorm):
            return self._pointwise(self.normalisation(block, x), x)
        raise TypeError(f"no tiles for {type(block).__name__}")

    def _cuts(self, count: int) -> Iterator[tuple[int, int]]:
        for start in range(0, count, self.rows):
            yield start, min(start + self.rows, count)

    def _residual(self, block: AEKLResBlock, x: Tensor) -> Tensor:
        h = self.convolve(block.conv1.conv, x, self.normalisation(block.norm1, x, F.silu))
        h = self.convolve(block.conv2.conv, h, self.normalisation(block.norm2, h, F.silu))
        for start, end in self._cuts(x.shape[2]):
            h[:, :, start:end] += block.nin_shortcut(x[:, :, start:end].to(self.device)).to(HOST)
        return h

    def _upsample(self, block: UpSample, x: Tensor) -> Tensor:
        convolution, out = block.postconv.conv, None
        total = 2 * x.shape[2]
        for start, end in self._cuts(total):
            low, high = max(start - 1, 0), min(end + 1, total)
            first = low // 2
            source = x[:, :, first : (high + 1) // 2].to(self.device)
            large = convolution.upsample(source)[:, :, low - 2 * first : high - 2 * first]
            large = F.pad(large, (1, 1, 1, 1, int(low == start), int(high == end)))
            out = self._keep(out, self._valid(convolution, large), start, total)
        return out

    def convolve(self, conv: nn.Conv3d, x: Tensor, before: Pointwise | None = None, pad: Sequence[int] = ()) -> Tensor:
        """conv(before(x)), slab by slab.

        Args:
            before: what each voxel goes through first; padding stays zero.
            pad: zeros in front of and behind every axis; the convolution's own without it.
        """
        front, behind = pad or (conv.padding[0],) * 2
        stride, kernel, size = conv.stride[0], conv.kernel_size[0], x.shape[2]
        total = (size + front + behind - kernel) // stride + 1
        out = None
        for start, end in self._cuts(total):
            low, high = start * stride - front, (end - 1) * stride - front + kernel
            part = x[:, :, max(low, 0) : min(high, size)].to(self.device)
            part = part if before is None else before(part)
            part = F.pad(part, (*(front, behind) * 2, max(-low, 0), max(high - size, 0)))
            out = self._keep(out, self._valid(conv, part), start, total)
        return out

    def _valid(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        return F.conv3d(x, conv.weight, conv.bias, conv.stride)

    def _keep(self, out: Tensor | None, part: Tensor, start: int, total: int) -> Tensor:
        """`part` at its place in the volume, which the first part makes."""
        if out is None:
            shape = (*part.shape[:2], total, *part.shape[3:])
            out = torch.empty(shape, dtype=part.dtype, device=HOST)
        out[:, :, start : start + part.shape[2]] = part.to(HOST)
        return out

    def _pointwise(self, work: Pointwise, x: Tensor) -> Tensor:
        out = None
        for start, end in self._cuts(x.shape[2]):
            out = self._keep(out, work(x[:, :, start:end].to(self.device)), start, x.shape[2])
        return out

    def normalisation(self, norm: nn.GroupNorm, x: Tensor, after: Pointwise | None = None) -> Pointwise:
        """`after(norm(...))` as a function of any part of x, with the statistics of all of it."""
        batch, channels = x.shape[:2]
        sums = torch.zeros(2, batch, norm.num_groups, dtype=torch.float64, device=self.device)
        for start, end in self._cuts(x.shape[2]):
            part = x[:, :, start:end].to(self.device).float().reshape(batch, norm.num_groups, -1)
            count = part.shape[2]
            mean = part.mean(2, keepdim=True)
            # Sums of squares about the part's own mean: those about zero would lose the digits that matter.
            about = (part - mean).square().sum(2).double()
            mean = mean.squeeze(2).double()
            sums += torch.stack([mean * count, about + mean.square() * count])
        mean, square = sums * (norm.num_groups / x[0].numel())
        rstd = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        each = channels // norm.num_groups
        rstd, mean = (value.repeat_interleave(each, dim=1) for value in (rstd, mean))
        scale = rstd * norm.weight.double()
        shift = norm.bias.double() - mean * scale
        scale, shift = (value.float()[..., None, None, None] for value in (scale, shift))

        def work(part: Tensor) -> Tensor:
            part = torch.addcmul(shift, part.float(), scale)
            return part if after is None else after(part)

        return work
