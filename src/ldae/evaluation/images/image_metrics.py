"""How similar two volumes are: SSIM, MS-SSIM, PSNR and MSE, over the whole volume and inside the brain.

SSIM (Wang et al. 2004, doi 10.1109/TIP.2003.819861) has K1 = 0.01, K2 = 0.03 and data range 1. Its Gaussian window has
sigma 1.5 and a width of 11 voxels in 3D; `published` SSIM has a width of 3, as in the LDAE paper (arXiv 2504.08635). A
volume smaller than the window gets the largest odd width that fits. Values over the whole volume average the positions
at which the window is inside the volume; values in a mask average the map over the voxels of the mask, with replicated
borders. Background raises the values over the whole volume, so those in the mask are the ones to read.

Metrics stay on the device of the volumes and wait for nothing there, except `brain_mask` (SciPy computes on the CPU)
and `copy_to_host`, with which a caller fetches all its numbers at once.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldae.losses.structural import WIDTH, fitting_width, ssim_map, ssim_maps

PUBLISHED_WIDTH = 3
# MS-SSIM: weights of the five scales (Wang et al. 2003, doi 10.1109/ACSSC.2003.1292216), and the width of the window.
# MONAI's default width needs more than 160 voxels per axis.
SCALES, MS_WIDTH = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 5
MASK_THRESHOLD = 0.05
Key = TypeVar("Key", bound=Hashable)


def _crop_to_window(x: Tensor, width: int) -> Tensor:
    """The part of a map (B, 1, X, Y, Z) where the whole window is inside the volume."""
    half = width // 2
    return x[..., half : x.shape[-3] - half, half : x.shape[-2] - half, half : x.shape[-1] - half]


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean per sample, (B,), over the whole map or a mask of its shape; NaN if the mask is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    weight = mask.to(values.dtype)
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def ssim(x: Tensor, y: Tensor, mask: Tensor | None = None, width: int = WIDTH) -> Tensor:
    """Mean SSIM of each pair of volumes (B, 1, X, Y, Z), (B,), whole or inside `mask` (B, 1, X, Y, Z)."""
    values = ssim_map(x, y, width)
    return _mean(_crop_to_window(values, fitting_width(tuple(x.shape[2:]), width)) if mask is None else values, mask)


def ssim_whole_and_masked(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SSIM of each pair over the whole volume and inside `mask`, (B,) each, computed from one map."""
    values = ssim_map(x, y, WIDTH)
    return _mean(_crop_to_window(values, fitting_width(tuple(x.shape[2:]), WIDTH)), None), _mean(values, mask)


def published_ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM over the whole volume with the published width of 3, (B,)."""
    return ssim(x, y, width=PUBLISHED_WIDTH)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale SSIM of volumes (B, 1, X, Y, Z), (B,), over those of the five scales that fit a window of width 5.

    The weights of the scales used are rescaled to sum to 1. Negative factors count as 0.
    """
    smallest, count = min(x.shape[2:]), 1
    while count < len(SCALES) and smallest // 2**count >= MS_WIDTH:
        count += 1
    weights = np.array(SCALES[:count], np.float32) / np.float32(sum(SCALES[:count]))
    x, y, value = x.float(), y.float(), torch.ones(len(x), device=x.device)
    for scale, weight in enumerate(weights.tolist()):
        width = fitting_width(tuple(x.shape[2:]), MS_WIDTH)
        whole, structure = ssim_maps(x, y, width)
        last = scale == count - 1
        value = value * _mean(_crop_to_window(whole if last else structure, width), None).clamp(min=0) ** weight
        x, y = functional.avg_pool3d(x, 2), functional.avg_pool3d(y, 2)
    return value


def mse(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each pair, (B,)."""
    return _mean((x.float() - y.float()) ** 2, mask)


def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,), for data range 1."""
    return -10 * torch.log10(mse(x, y, mask).clamp(min=1e-12))


def brain_mask(x: Tensor, threshold: float = MASK_THRESHOLD) -> Tensor:
    """The brain, ventricles included, of skull-stripped scans (B, 1, X, Y, Z) in [0, 1]: bool, same shape and device.

    Voxels above `threshold`, closed by one voxel, holes filled, largest component. If the skull was not stripped, it is
    the head. SciPy computes it on the CPU: pass scans that are there already if possible, and use BrainMasks for scans
    that are needed again.
    """
    from scipy import ndimage

    masks = []
    for volume in x.detach().float().cpu().numpy()[:, 0]:
        padded = np.pad(volume > threshold, 1)  # otherwise closing erodes at the border
        filled = ndimage.binary_fill_holes(ndimage.binary_closing(padded))[1:-1, 1:-1, 1:-1]
        parts, count = ndimage.label(filled)
        if count > 1:
            filled = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        masks.append(filled)
    return torch.from_numpy(np.stack(masks))[:, None].to(x.device)


class BrainMasks:
    """Brain masks of scans that are needed repeatedly, each computed once; one byte of host memory per voxel.

    Use one object per kind of image (the scans, or their reconstructions by one autoencoder), and only while these
    images do not change.
    """

    def __init__(self) -> None:
        self._masks: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """`brain_mask(x)` of images (B, 1, X, Y, Z), where image i shows scan `rows[i]`; only new scans are read."""
        rows = [int(row) for row in rows]
        for image, row in zip(x.split(1), rows, strict=True):
            if row not in self._masks:
                self._masks[row] = brain_mask(image).cpu()
        return torch.cat([self._masks[row] for row in rows]).to(x.device)


def to_arrays(images: Tensor) -> np.ndarray:
    """Images (B, 1, X, Y, Z) as an array (B, X, Y, Z), float32."""
    return images[:, 0].detach().float().cpu().numpy()


def copy_to_host(values: Mapping[Key, Tensor]) -> dict[Key, np.ndarray]:
    """Tensors of one shape as float64 arrays, copied from their device together so that it is waited for only once."""
    stacked = torch.stack([value.detach().double() for value in values.values()]).cpu().numpy()
    return dict(zip(values, stacked, strict=True))


def compare_images(
    x: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every metric of `x` against `reference` (B, 1, X, Y, Z), (B,) each.

    `ssim`, `ms_ssim`, `psnr` and `mse` over the whole volume, `ssim_mask`, `psnr_mask` and `mse_mask` inside the brain,
    `ssim_published`, and `lpips` if a perceptual distance is given.

    Args:
        mask: the brain; None: that of the reference.
        perceptual: (x, reference) -> scalar, called once per scan.
    """
    mask = brain_mask(reference) if mask is None else mask
    whole, inside = ssim_whole_and_masked(x, reference, mask)
    found = {
        "ssim": whole,
        "ssim_mask": inside,
        "ssim_published": published_ssim(x, reference),
        "ms_ssim": ms_ssim(x, reference),
        "psnr": psnr(x, reference),
        "psnr_mask": psnr(x, reference, mask),
        "mse": mse(x, reference),
        "mse_mask": mse(x, reference, mask),
    }
    if perceptual is not None:
        pairs = zip(x.split(1), reference.split(1), strict=True)
        found["lpips"] = torch.stack([perceptual(a, b).reshape(()) for a, b in pairs])
    return found
