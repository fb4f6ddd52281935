"""Sliced inference: the autoencoder's blocks on a few planes at a time, for GPUs with less memory than a volume takes.

If pieces of a volume passed the whole network one by one, every GroupNorm would use the statistics of its piece, and
the result would differ. Here one layer at a time is computed in slices along x that overlap by the reach of its
convolution, and a norm uses the statistics of the whole volume, so that the result is the same up to rounding. Between
the layers, volumes are in host memory, and one slice is on the device.
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
    """Applies blocks to volumes (B, C, X, Y, Z) in host memory, `planes` along x at a time on `device`."""

    def __init__(self, planes: int, device: torch.device) -> None:
        if planes < 1:
            raise UserError(
                f"model.autoencoder.inference_planes={planes}: give a number of planes, or null for the whole volume"
            )
        self.planes, self.device = planes, device

    def apply(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        """The result of all blocks, one after the other, on the device."""
        x = x.to(HOST)
        for block in blocks:
            x = self.apply_block(block, x)
        return x.to(self.device)

    def apply_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """The result of one block of MONAI's AutoencoderKL without attention, in host memory.

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
            return self._map(self.normalisation(block, x), x)
        raise TypeError(f"sliced inference cannot compute {type(block).__name__}")

    def _ranges(self, count: int) -> Iterator[tuple[int, int]]:
        """First plane and end of each slice of a volume with `count` planes."""
        for start in range(0, count, self.planes):
            yield start, min(start + self.planes, count)

    def _residual(self, block: AEKLResBlock, x: Tensor) -> Tensor:
        h = self.convolve(block.conv1.conv, x, self.normalisation(block.norm1, x, F.silu))
        h = self.convolve(block.conv2.conv, h, self.normalisation(block.norm2, h, F.silu))
        for start, end in self._ranges(x.shape[2]):
            h[:, :, start:end] += block.nin_shortcut(x[:, :, start:end].to(self.device)).to(HOST)
        return h

    def _upsample(self, block: UpSample, x: Tensor) -> Tensor:
        conv, out = block.postconv.conv, None
        total = 2 * x.shape[2]
        for start, end in self._ranges(total):
            low, high = max(start - 1, 0), min(end + 1, total)
            first = low // 2
            small = x[:, :, first : (high + 1) // 2].to(self.device)
            large = block.upsample_non_trainable(small)[:, :, low - 2 * first : high - 2 * first]
            large = F.pad(large, (1, 1, 1, 1, int(low == start), int(high == end)))
            out = self._insert(out, self._convolve_valid(conv, large), start, total)
        return out

    def convolve(self, conv: nn.Conv3d, x: Tensor, before: Pointwise | None = None, pad: Sequence[int] = ()) -> Tensor:
        """conv(before(x)), slice by slice.

        Args:
            before: applied to every voxel first. The padding stays zero.
            pad: number of zeros before and after every axis; empty: the convolution's own padding.
        """
        front, behind = pad or (conv.padding[0],) * 2
        stride, kernel, size = conv.stride[0], conv.kernel_size[0], x.shape[2]
        total = (size + front + behind - kernel) // stride + 1
        out = None
        for start, end in self._ranges(total):
            low, high = start * stride - front, (end - 1) * stride - front + kernel
            part = x[:, :, max(low, 0) : min(high, size)].to(self.device)
            part = part if before is None else before(part)
            part = F.pad(part, (*(front, behind) * 2, max(-low, 0), max(high - size, 0)))
            out = self._insert(out, self._convolve_valid(conv, part), start, total)
        return out

    def _convolve_valid(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """The convolution of x, which contains its own padding."""
        return F.conv3d(x, conv.weight, conv.bias, conv.stride)

    def _insert(self, out: Tensor | None, part: Tensor, start: int, total: int) -> Tensor:
        """Write `part` into the volume `out` of `total` planes from plane `start` on. None: a new volume."""
        if out is None:
            shape = (*part.shape[:2], total, *part.shape[3:])
            out = torch.empty(shape, dtype=part.dtype, device=HOST)
        out[:, :, start : start + part.shape[2]] = part.to(HOST)
        return out

    def _map(self, function: Pointwise, x: Tensor) -> Tensor:
        """function(x), slice by slice."""
        out = None
        for start, end in self._ranges(x.shape[2]):
            out = self._insert(out, function(x[:, :, start:end].to(self.device)), start, x.shape[2])
        return out

    def normalisation(self, norm: nn.GroupNorm, x: Tensor, after: Pointwise | None = None) -> Pointwise:
        """after(norm(...)) as a function of any part of x, with the statistics of the whole of x."""
        batch, channels = x.shape[:2]
        sums = torch.zeros(2, batch, norm.num_groups, dtype=torch.float64, device=self.device)
        for start, end in self._ranges(x.shape[2]):
            part = x[:, :, start:end].to(self.device).float().reshape(batch, norm.num_groups, -1)
            count = part.shape[2]
            mean = part.mean(2, keepdim=True)
            # Squares are summed about the mean of the part, because those about zero would lose the digits that matter.
            squares = (part - mean).square().sum(2).double()
            mean = mean.squeeze(2).double()
            sums += torch.stack([mean * count, squares + mean.square() * count])
        mean, square = sums * (norm.num_groups / x[0].numel())
        rstd = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        each = channels // norm.num_groups
        rstd, mean = (value.repeat_interleave(each, dim=1) for value in (rstd, mean))
        scale = rstd * norm.weight.double()
        shift = norm.bias.double() - mean * scale
        scale, shift = (value.float()[..., None, None, None] for value in (scale, shift))

        def normalise(part: Tensor) -> Tensor:
            part = torch.addcmul(shift, part.float(), scale)
            return part if after is None else after(part)

        return normalise
