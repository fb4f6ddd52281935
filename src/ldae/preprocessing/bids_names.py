"""BIDS-derivatives names of the files written for one scan."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

NATIVE_SPACE = "T1w"  # BIDS label of the scan's own space


@dataclass(frozen=True)
class BidsNames:
    """Paths of a scan's files, relative to the derivatives folder.

    Attributes:
        subject: "sub-...".
        session: "ses-...", or "" if there is none.
        space: BIDS label of the space that the scan is registered to, "" for its own.
        spacing: voxel size in mm of a scan that is resampled without registration, None for its own.
        problem_of: path of a scan whose names cannot be used; only its record is written, under a name of its own.
    """

    subject: str
    session: str
    space: str
    spacing: float | None = None
    problem_of: str = ""

    @property
    def stem(self) -> str:
        """Start of every file name: sub-X or sub-X_ses-Y."""
        return "_".join(part for part in (self.subject, self.session) if part)

    @property
    def folder(self) -> Path:
        """Folder of the scan's images."""
        return Path(self.subject, self.session, "anat")

    @property
    def record(self) -> Path:
        """The record of what was done; it is written last and marks the scan as finished."""
        if self.problem_of:
            return Path("records", f"unused_{hashlib.sha256(self.problem_of.encode()).hexdigest()[:16]}.json")
        return Path("records", f"{self.stem}.json")

    @property
    def figure(self) -> Path:
        """The picture for quality control."""
        return Path("figures", f"{self.stem}_desc-qc_T1w.jpg")

    @property
    def scan(self) -> Path:
        """The preprocessed scan."""
        return self._image("desc-preproc_T1w.nii.gz")

    @property
    def mask(self) -> Path:
        """The brain mask on the grid of the preprocessed scan."""
        return self._image("desc-brain_mask.nii.gz")

    @property
    def labels(self) -> Path:
        """The label map on the grid of the preprocessed scan."""
        return self._image("dseg.nii.gz")

    @property
    def native_mask(self) -> Path:
        """The brain mask on the grid of the raw scan."""
        return self.folder / f"{self.stem}_desc-brain_mask.nii.gz"

    def transform(self, to_template: bool, suffix: str) -> Path:
        """A file of the transform; one affine (.mat) serves both directions, a warp has a file for each."""
        start, end = (NATIVE_SPACE, self.space) if to_template else (self.space, NATIVE_SPACE)
        return self.folder / f"{self.stem}_from-{start}_to-{end}_mode-image_xfm{suffix}"

    def _image(self, ending: str) -> Path:
        space = f"space-{self.space}_" if self.space else ""
        if not space and self.spacing is not None:  # the native mask has no space in its name either
            space = f"res-{self.spacing:g}mm_".replace(".", "p")
        return self.folder / f"{self.stem}_{space}{ending}"


def bids_label(text: str) -> str:
    """Reduce `text` to a BIDS label: letters and digits only."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def bids_entity(name: str, key: str) -> str:
    """Value of an entity in a BIDS file name, "" if absent: bids_entity("sub-1_ses-M00_T1w.nii", "ses") is "M00"."""
    match = re.search(rf"(?:^|_){key}-([^_]+)", strip_suffix(name))
    return match[1] if match else ""


def path_entity(path: Path, key: str) -> str:
    """Value of an entity in a file's name, or else in the innermost of its folders that names it, "" if absent."""
    folders = (part.removeprefix(f"{key}-") for part in path.parts[-2::-1] if part.startswith(f"{key}-"))
    return bids_entity(path.name, key) or next(folders, "")


def strip_suffix(name: str) -> str:
    """The name of a file without the suffix of its format; other dots stay, such as those of a DICOM UID."""
    return re.sub(r"\.(?:nii(?:\.gz)?|mgz|mgh|img|hdr|json)$", "", name, flags=re.IGNORECASE)
