"""Checks of the output folder before anything is written."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError

WRITTEN = ("scans.csv", "rejected.csv", "qc.html")


def check_output(source: Path, out: Path, scans: Sequence[SourceScan]) -> None:
    """Refuse an output folder whose files would be overwritten, or in which the raw scans would be mixed with results.

    A folder inside `source`, such as SOURCE/derivatives/ldae, is accepted where its results are not found as raw scans.

    Raises:
        UserError: says which.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"the output folder {out} is a file: give a folder")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"the output folder {out} cannot be made: {parent} is not a folder that can be written")
    folder = os.path.realpath(out)
    if os.path.realpath(source) == folder:
        raise UserError(f"the output folder {out} is the source: give another folder, such as {source / 'derivatives'}")
    resolve = cache(os.path.realpath)  # scans of a subject share their folder
    for scan in scans:
        place = resolve(scan.path.parent)
        if place.startswith(os.path.join(folder, "sub-")):
            raise UserError(f"{scan.printable_path} is where results in {out} would be written: give another folder")
    if not (out / "records").is_dir():
        for name in WRITTEN:
            if (out / name).exists():
                raise UserError(f"{out / name} was not written by ldae preprocess and is kept: give another folder")
