"""What a model's methods take: volumes in model space, or scans, which become such volumes.

A scan is a NIfTI's path, a nibabel image, an opened `native.Scan`, or a list of these. What comes back is a tensor;
`Scan.restored` and `Scan.edited` make a NIfTI of it that overlays on the scan.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ldae.data.transforms import Source
from ldae.scans.ood_check import OodCheck
from ldae.scans.raw_scan import TrainingPreprocessing
from ldae.scans.scan import Scan, open_scan
from ldae.utils.errors import UserError

Scans = Tensor | Scan | Source | Sequence[Scan | Source]


class Inputs:
    """Methods of pipeline.LDAE, which has the transform and the bundle that these use."""

    @cached_property
    def likeness(self) -> OodCheck | None:
        """What the training scans look like; None where nobody measured it."""
        stored = None if self.bundle is None else self.bundle.likeness
        return None if stored is None else OodCheck.from_dict(stored)

    def open(self, source: Source, check: bool = True, preprocess: bool | None = None) -> Scan:
        """A scan in model space, and the way back.

        Args:
            check: refuse a scan that is unlike the training scans and cannot be made alike.
            preprocess: make it as the training scans were made (raw_scans.py): None where it is unlike them and it is
                known that they were preprocessed, True in any case, False never. Needs `check`, or True.

        Raises:
            BadScan: it cannot be used; the message says why.
        """
        if self.transform is None:
            raise UserError("this model was put together without a transform and takes tensors only")
        steps = self.preprocess if preprocess is not False else None
        if preprocess and steps is None:
            raise UserError("this model was loaded without preprocessing")
        if preprocess is None and isinstance(steps, TrainingPreprocessing) and not steps.known:
            steps = None
        return open_scan(source, self.transform, self.likeness if check else None, steps, bool(preprocess))

    def volumes(self, x: Scans) -> Tensor:
        """(B, 1, X, Y, Z) on the model's device, of a tensor in model space as it is, of scans through `open`."""
        if isinstance(x, Tensor):
            return x.to(self.device)
        if isinstance(x, list | tuple):
            return torch.cat([self.volumes(item) for item in x])
        return (x if isinstance(x, Scan) else self.open(x)).volume.to(self.device)
