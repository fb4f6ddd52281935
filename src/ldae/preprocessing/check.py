"""Check the brain masks and registrations of a cohort: `python -m ldae.preprocessing.check DERIVATIVES [LABELS]`.

The reference masks come from label maps in native space: all labels together, closed over the sulci and filled, cover
the brain with its CSF. Writes DERIVATIVES/check.csv, one row for each scan, and prints the median of every measure.
"""

import sys
from pathlib import Path

import click
import numpy as np
import pandas as pd

from ldae.preprocessing.bids_names import bids_entity
from ldae.preprocessing.brain import close_sulci
from ldae.preprocessing.regions import find_label_maps
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, replacing


def dice_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Dice coefficient 2 |A and B| / (|A| + |B|) of two masks; 1 if both are empty."""
    total = first.sum() + second.sum()
    return float(2 * (first & second).sum() / total) if total else 1.0


def compare_masks(out: Path, labels: Path | None) -> pd.DataFrame:
    """Collect the measures of every finished scan, and the Dice coefficient of its mask with its label map.

    Args:
        out: output folder of `ldae preprocess`.
        labels: folder of label maps in native space, or None.

    Returns:
        subject, session, dice (NaN without a label map) and the measures of the record; one row for each scan.

    Raises:
        UserError: `out` has no finished scan, or a label map is on another grid than its scan.
    """
    label_maps = find_label_maps(labels) if labels else {}
    rows = []
    for path in sorted((out / "records").glob("*.json")):
        record = read_json(path)
        if record["status"] != "done":
            continue
        key = bids_entity(path.stem, "sub"), bids_entity(path.stem, "ses")
        dice = np.nan
        if key in label_maps and "native_mask" in record["files"]:
            dice = _compare_with_labels(out / record["files"]["native_mask"], label_maps[key])
        rows.append({"subject": f"sub-{key[0]}", "session": key[1], "dice": dice, **record["measures"]})
    if not rows:
        raise UserError(f"no finished scan in {out}: run `ldae preprocess` first")
    return pd.DataFrame(rows)


def _compare_with_labels(mask: Path, labels: Path) -> float:
    ours, reference = Volume.read_labels(mask), Volume.read_labels(labels)
    if ours.data.shape != reference.data.shape or not np.allclose(ours.affine, reference.affine, atol=1e-2):
        raise UserError(f"{labels} is on another grid than the scan of {mask}: give label maps in native space")
    return dice_overlap(ours.data > 0, close_sulci(reference.data > 0, reference.spacing))


@click.command()
@click.argument("derivatives", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path), required=False)
def main(derivatives: Path, labels: Path | None) -> None:
    """Compare the output of `ldae preprocess` in DERIVATIVES with the label maps *_dseg.nii.gz in the folder LABELS."""
    try:
        table = compare_masks(derivatives, labels)
    except UserError as error:
        click.echo(f"check: {error}", err=True)
        sys.exit(2)
    with replacing(derivatives / "check.csv") as temporary:
        table.to_csv(temporary, index=False)
    click.echo(f"{len(table)} scans; median (smallest to largest)")
    for name in table.columns[2:]:
        values = table[name].dropna()
        if len(values):
            click.echo(f"{name:<22} {values.median():.4g} ({values.min():.4g} to {values.max():.4g})")


if __name__ == "__main__":
    main()
