"""What every edit shares: how deep a scan is inverted, and how the anatomy of what comes out is measured."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldae.diffusion.code import Code
from ldae.diffusion.guidance import Guidance
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import STRUCTURES, Levels, SoftVolume, soft_volume
from ldae.evaluation.images.image_metrics import BrainMasks
from ldae.utils.seeding import normal

log = logging.getLogger(__name__)


class Editor:
    """The settings of an edit. Full inversion writes most of the scan into z_T, which then resists any change of y.

    Args:
        steps: of inversion and of decoding; None: the sampler's.
        depth: invert up to t = depth (T - 1); less keeps more of the scan.
        renoise: share of the inversion's steps replaced by noise (arXiv 2410.23530); more lets go of more.
        strength: of guidance, for inversion and decoding alike; None: the sampler's.
    """

    def __init__(
        self, steps: int | None = None, depth: float = 0.7, renoise: float = 0.0, strength: float | None = None
    ) -> None:
        self.steps, self.depth, self.renoise, self.strength = steps, depth, renoise, strength

    def tuned(self, model: Any) -> Any:
        """The model with this guidance strength; the model handed in stays as it is."""
        if self.strength is None:
            return model
        tuned = copy.copy(model)
        own = model.sampler.guidance
        tuned.sampler = replace(model.sampler, guidance=Guidance(own.form, self.strength, own.stop))
        return tuned

    def code(self, model: Any, z: Tensor, y: Tensor, seed: int, keys: Sequence[int]) -> Code:
        """The codes of latents z (B, C, ...) given y (B, dim); scan i's noise depends on (seed, keys[i])."""
        noise = normal(z.shape[1:], seed, keys, "edit").to(z) if self.renoise else None
        return self.tuned(model).invert(z, y, self.steps, depth=self.depth, noise=noise, renoise=self.renoise)

    def decode(self, model: Any, code: Code | Tensor, y: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of codes, or of noise, given y."""
        return self.tuned(model).decode(code, y, self.steps)


class Anatomy:
    """Soft volumes of the structures that the table's label maps show, and `brains`, the masks of the scans' own
    reconstructions, which every editor and direction asks for anew.
    """

    def __init__(self, context: Context):
        self.context, self.brains = context, BrainMasks()
        found = {name: soft_volume(context, labels) for name, labels in STRUCTURES.items()}
        self.measures: dict[str, SoftVolume] = {name: measure for name, measure in found.items() if measure}
        if not self.measures:
            log.warning("the table has no usable label maps (labels_path): volumes are not measured")

    @property
    def region(self) -> np.ndarray | None:
        """(X, Y, Z) bool: where disease and age are expected to show, the structures one voxel wider still."""
        from scipy.ndimage import binary_dilation

        if not self.measures:
            return None
        return binary_dilation(np.any([measure.region for measure in self.measures.values()], axis=0))

    def levels(self, rows: Sequence[int], images: Tensor) -> list[dict[str, Levels]]:
        """Intensity levels of each of the scans `rows`, from images (B, 1, X, Y, Z) that show the same anatomy."""
        rows = [int(row) for row in rows]
        arrays, found = as_arrays(images), [{} for _ in rows]
        for name, measure in self.measures.items():
            for levels, image, share in zip(found, arrays, self.context.regions(rows, STRUCTURES[name]), strict=True):
                levels[name] = measure.levels(image, np.asarray(share))
        return found

    def volumes(self, images: Tensor, levels: Sequence[Mapping[str, Levels]]) -> dict[str, np.ndarray]:
        """mm3 by structure, (B,) each."""
        arrays = as_arrays(images)
        return {
            name: np.array([measure.measure(image, own[name]) for image, own in zip(arrays, levels, strict=True)])
            for name, measure in self.measures.items()
        }


def between(first: Mapping[str, Levels], second: Mapping[str, Levels], share: float) -> dict[str, Levels]:
    """Levels on the line between those of two scans."""
    return {
        name: Levels(
            (1 - share) * first[name].inside + share * second[name].inside,
            (1 - share) * first[name].outside + share * second[name].outside,
        )
        for name in first
    }


def as_arrays(images: Tensor) -> np.ndarray:
    """(B, 1, X, Y, Z) -> (B, X, Y, Z) float32 on the CPU."""
    return images[:, 0].detach().float().cpu().numpy()


def own_y(context: Context, rows: Sequence[int]) -> Tensor:
    """y (B, dim) of these rows on the model's device."""
    return torch.from_numpy(np.asarray(context.embeddings[list(rows)], np.float32)).to(context.model.device)


@dataclass(frozen=True)
class InvertedScans:
    """A batch of scans ready to be edited. z: latents; y: (B, dim); levels: from the autoencoder's reconstruction.

    reconstruction: (B, 1, X, Y, Z); mask: the brain, bool of that shape; code: of the inversion.
    """

    rows: list[int]
    z: Tensor
    y: Tensor
    reconstruction: Tensor
    mask: Tensor
    code: Code
    levels: list[dict[str, Levels]]


@torch.no_grad()
def open_scans(context: Context, editor: Editor, anatomy: Anatomy, rows: Sequence[int]) -> InvertedScans:
    """Compress, embed and invert the scans of these rows."""
    model, rows = context.model, [int(row) for row in rows]
    z, y = model.compress(context.volumes(rows).to(model.device)), own_y(context, rows)
    reconstruction = model.decompress(z)
    code = editor.code(model, z, y, context.seed, rows)
    mask, levels = anatomy.brains(reconstruction, rows), anatomy.levels(rows, reconstruction)
    return InvertedScans(rows, z, y, reconstruction, mask, code, levels)
