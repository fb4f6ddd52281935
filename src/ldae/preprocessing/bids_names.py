"""BIDS-derivatives names of what is written for one scan."""

import re
from dataclasses import dataclass
from pathlib import Path

NATIVE = "T1w"  # the scan's own space


@dataclass(frozen=True)
class BidsNames:
    """Paths relative to the derivatives' folder.

    subject: "sub-..."; session: "ses-..." or ""; space: BIDS label, "" for the scan's own; spacing: voxel size in mm of
    scans that were resampled there, None for the scan's own.
    """

    subject: str
    session: str
    space: str
    spacing: float | None = None

    @property
    def stem(self) -> str:
        """sub-X or sub-X_ses-Y."""
        return "_".join(part for part in (self.subject, self.session) if part)

    @property
    def folder(self) -> Path:
        """Of the scan's images."""
        return Path(self.subject, self.session, "anat")

    @property
    def record(self) -> Path:
        """What is known of the scan, written last: it makes the scan count as done."""
        return Path("records", f"{self.stem}.json")

    @property
    def figure(self) -> Path:
        """The mosaic."""
        return Path("figures", f"{self.stem}_desc-qc_T1w.jpg")

    @property
    def scan(self) -> Path:
        """The scan as models take it."""
        return self._image("desc-preproc_T1w.nii.gz")

    @property
    def mask(self) -> Path:
        """The brain mask on the same grid."""
        return self._image("desc-brain_mask.nii.gz")

    @property
    def labels(self) -> Path:
        """The label map on the same grid."""
        return self._image("dseg.nii.gz")

    @property
    def native_mask(self) -> Path:
        """The brain mask on the raw scan's grid."""
        return self.folder / f"{self.stem}_desc-brain_mask.nii.gz"

    def transform(self, to_template: bool, suffix: str) -> Path:
        """A transform's file; an affine (.mat) serves both ways, a warp has one file a way."""
        start, end = (NATIVE, self.space) if to_template else (self.space, NATIVE)
        return self.folder / f"{self.stem}_from-{start}_to-{end}_mode-image_xfm{suffix}"

    def _image(self, rest: str) -> Path:
        space = f"space-{self.space}_" if self.space else ""
        if not space and self.spacing is not None:  # the native mask has no space in its name either
            space = f"res-{self.spacing:g}mm_".replace(".", "p")
        return self.folder / f"{self.stem}_{space}{rest}"


def bids_label(text: str) -> str:
    """`text` as a BIDS label: letters and digits alone."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def bids_entity(name: str, key: str) -> str:
    """The value of `key` in a BIDS file name, or "": entity("sub-1_ses-M00_T1w.nii.gz", "ses") is "M00"."""
    match = re.search(rf"(?:^|[_/]){key}-([A-Za-z0-9]+)", name)
    return match[1] if match else ""
