"""Small BIDS datasets whose preprocessing takes a second: ellipsoids of tissue on a background of 0, without ANTs."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from ldae.preprocessing.brain import Stripped
from ldae.preprocessing.job import Job
from ldae.preprocessing.participant_rows import Columns
from ldae.preprocessing.participants import Participants
from ldae.preprocessing.preprocess_cohort import preprocess_cohort
from ldae.preprocessing.regions import Regions
from ldae.preprocessing.session_scans import FIRST, RunChoice
from ldae.preprocessing.sources import find_scans
from ldae.preprocessing.steps import PreprocessingSteps
from ldae.preprocessing.volume import Volume

WITHOUT_ANTS = PreprocessingSteps(bias=None, brain=Stripped(), registration=None, spacing=4.0)


def brain(spacing=4.0, half=(65, 80, 60), shape=(44, 52, 40), seed=0, noise=2.0) -> Volume:
    """An ellipsoid of white matter, grey matter and CSF, from inside to outside; about 1300 cm3."""
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    place = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    radius = np.sqrt(((place / half) ** 2).sum(-1))
    data = np.select([radius < 0.7, radius < 0.9, radius < 1], [100.0, 70.0, 25.0], 0.0)
    data += np.random.default_rng(seed).normal(0, noise, shape) * (data > 0)
    return Volume(data.astype(np.float32), affine)


def bids(root: Path, scans: dict[str, Volume], participants: str | None = None) -> Path:
    """Write a BIDS dataset; `scans` maps "sub-1/ses-M000" to a Volume."""
    for name, volume in scans.items():
        volume.write(root / name / "anat" / f"{name.replace('/', '_')}_T1w.nii.gz")
    if participants:
        (root / "participants.tsv").write_text(participants.replace(" ", "\t"))
    return root


def run(
    source: Path,
    out: Path,
    steps: PreprocessingSteps = WITHOUT_ANTS,
    labels: Path | None = None,
    regions: Regions | None = None,
    choice: RunChoice = FIRST,
) -> pd.DataFrame:
    """Preprocess a dataset or a CSV of paths into `out`, in this process."""
    job = Job(steps, out, regions, choice, str(source))
    participants = Participants(source if source.is_dir() else None, Columns())
    return preprocess_cohort(find_scans(source), participants, job, labels, workers=0, progress=False)
