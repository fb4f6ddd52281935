"""A small cohort of raw scans, and `ldae cohort` on it."""

import os
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from ldae.cli import main
from small_datasets import bids, brain

SUBJECTS = 20
WITHOUT_ANTS = [
    f"--set={text}"
    for text in (
        "preprocess/bias=none", "preprocess/brain=stripped", "preprocess/registration=none", "preprocess.spacing=4.0",
    )
]  # fmt: skip
SMALL = (
    "--experiment", "smoke", "--start", "smoke", "data=cohort", "evaluation=[cross_validation]",
    "evaluation.cross_validation.repeats=1", "evaluation.cross_validation.resamples=20",
    "evaluation.cross_validation.baselines=[mean,pca]", "evaluation.cross_validation.pca_widths=[4]",
    "data.split={train: 0.8, val: 0.2, test: 0.0}", "data.workers=1", "-j", "1",
)  # fmt: skip


def dataset(root: Path, count: int = SUBJECTS, ages: bool = True) -> Path:
    """Write a BIDS dataset of so many subjects of both sexes, with or without ages."""
    rng = np.random.default_rng(0)
    scans = {f"sub-{i:02d}/ses-M000": brain(half=65 + rng.normal(0, 3, 3) + (0, 15, -5), seed=i) for i in range(count)}
    table = ["participant_id sex" + " age" * ages]
    table += [f"sub-{i:02d} {'MF'[i % 2]}" + f" {40 + i}" * ages for i in range(count)]
    return bids(root, scans, "\n".join(table) + "\n")


def run(folder: Path, *arguments: str) -> Result:
    """Run `ldae cohort` in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(main, ["cohort", *arguments])
    finally:
        os.chdir(before)
