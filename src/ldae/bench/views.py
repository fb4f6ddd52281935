"""Compares what the semantic encoder could see of a scan: `python -m ldae.bench.views TABLE`.

Every candidate is made of each scan of the table and brought to one grid. A ridge regression on all its values then
predicts age, sex and diagnosis, where the table has them, in 5 x 5 folds by subject, its penalty chosen inside the
folds. Nothing of ours is trained: what is compared is the input alone.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd

from ldae.data.nifti import BadScan, LoadedScan, load_scan
from ldae.data.table import read_table
from ldae.data.tissue_mixture import Divisions, TissueMixture, TissuesNotFound, fit_tissues
from ldae.data.tissues import Mixture, PartialVolume, Ramps, SoftSegmentation
from ldae.data.transforms import Transform
from ldae.utils.errors import UserError

Maker = Callable[[LoadedScan], np.ndarray]  # a scan -> maps (C, X, Y, Z) float32 on its own grid

FOLDS, REPEATS, RESAMPLES = 5, 5, 1000
PENALTIES = 10.0 ** np.arange(-5, 2.1, 0.5)  # over the mean squared length of a training scan


def over_white_matter(scan: LoadedScan) -> np.ndarray:
    """The intensities over those of white matter."""
    return np.clip(scan.data / fit_tissues(_brain(scan), Divisions.shared(3)).means[2] / 1.5, 0, 1)[None]


def mixture(scan: LoadedScan) -> np.ndarray:
    """Probabilities of CSF, grey and white matter."""
    return Mixture()(scan.data).values


def ramps(scan: LoadedScan) -> np.ndarray:
    """Two ramps between the means of the tissues."""
    return Ramps()(scan.data).values


def partial_volume(scan: LoadedScan) -> np.ndarray:
    """Fractions of CSF, grey and white matter."""
    return PartialVolume()(scan.data).values


def soft(scan: LoadedScan) -> np.ndarray:
    """The soft segmentation of `data/view=tissues`."""
    return SoftSegmentation()(scan.data).values


def grey(scan: LoadedScan) -> np.ndarray:
    """Grey matter of the soft segmentation alone."""
    return SoftSegmentation()(scan.data).values[1:2]


def mixture_with_priors(scan: LoadedScan) -> np.ndarray:
    """Probabilities with the ICBM 152 maps as the shares of the tissues at each voxel; for scans in that space."""
    brain, values = scan.data > 0, _brain(scan)
    prior = _icbm_priors(scan.affine, scan.data.shape)[:, brain]
    found = fit_tissues(values, Divisions.pure())
    some = slice(None, None, max(1, len(values) // 50_000))
    for _ in range(30):
        posterior = _posterior(found, values[some], prior[:, some])
        shares = posterior.sum(1)
        means = posterior @ values[some] / shares
        spread = (posterior * (values[some] - means[:, None]) ** 2).sum(1) / shares
        found = TissueMixture(found.divisions, means, np.sqrt(spread), found.weights)
    maps = np.zeros((3, *scan.data.shape), np.float32)
    maps[:, brain] = _posterior(found, values, prior)
    return maps


def atropos(scan: LoadedScan) -> np.ndarray:
    """ANTs Atropos: a mixture with a Markov random field, started by k-means."""
    import ants

    image, mask = (ants.from_numpy(part.astype(np.float32)) for part in (scan.data, scan.data > 0))
    found = ants.atropos(a=image, x=mask, i="KMeans[3]", m="[0.1,1x1x1]", c="[5,0]")
    return np.stack([part.numpy() for part in found["probabilityimages"]]).astype(np.float32)


MAKERS: dict[str, Maker | None] = {
    "t1": None, "t1_over_white": over_white_matter, "ramps": ramps, "partial_volume": partial_volume, "soft": soft,
    "grey": grey, "mixture": mixture, "mixture_priors": mixture_with_priors, "atropos": atropos,
}  # fmt: skip


def _brain(scan: LoadedScan) -> np.ndarray:
    return scan.data[scan.data > 0].astype(np.float64)


def _posterior(mixture: TissueMixture, values: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Probabilities of the tissues at voxels with the intensities `values` (N,) and the shares `prior` (3, N)."""
    inside = np.clip(values, mixture.means[0], mixture.means[2])
    scaled = (inside - mixture.means[:, None]) / mixture.sds[:, None]
    likelihood = np.exp(-(scaled**2) / 2) / mixture.sds[:, None] * prior
    return likelihood / likelihood.sum(0)


def _icbm_priors(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """CSF, grey and white matter of the template, blurred by 4 mm, (3, X, Y, Z); at least 5 % each."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    from nilearn.image import resample_img, smooth_img

    parts = [load(resolution=2) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)]
    whole, grey, white = (
        resample_img(smooth_img(part, 4), affine, shape, force_resample=True, copy_header=True).get_fdata()
        for part in parts
    )
    csf = np.clip((whole > 0.15 * whole.max()) - grey - white, 0, 1)
    prior = np.clip(np.stack([csf, grey, white]), 0.05, 1)
    return prior / prior.sum(0)


@dataclass(frozen=True)
class Candidate:
    """One view of all scans.

    Attributes:
        values: (N, D) float32.
        seconds: per scan.
    """

    values: np.ndarray
    seconds: float


def make(paths: Sequence[str], maker: Maker | None, transform: Transform) -> Candidate:
    """A view of the scans at `paths`.

    Raises:
        UserError: a scan has none.
    """
    rows, start = [], time.perf_counter()
    for path in paths:
        try:
            if maker is None:
                rows.append(transform(path).ravel())
                continue
            scan = load_scan(path)
            rows.append(transform.maps(maker(scan), scan.affine).ravel())
        except (BadScan, TissuesNotFound) as error:
            raise UserError(f"{path}: {error}") from error
    return Candidate(np.stack(rows).astype(np.float32), (time.perf_counter() - start) / len(paths))


def predict(kernel: np.ndarray, target: np.ndarray, subjects: np.ndarray, seed: int) -> np.ndarray:
    """Predictions of each row by a ridge regression that has not seen its subject, (N,).

    Args:
        kernel: (N, N) products of the rows of features.
        target: (N,).
    """
    predicted = np.empty(len(target))
    for train, test in split_by_subject(subjects, FOLDS, seed):
        errors = np.zeros(len(PENALTIES))
        for inner, held_out in split_by_subject(subjects[train], FOLDS, seed + 1):
            found = _ridge(kernel, target, train[inner], train[held_out])
            errors += ((found - target[train[held_out]]) ** 2).sum(1)
        predicted[test] = _ridge(kernel, target, train, test)[errors.argmin()]
    return predicted


def split_by_subject(subjects: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of training and test of each fold; no subject is in both."""
    names, number = np.unique(subjects, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(names)) % folds
    return [(np.flatnonzero(fold[number] != part), np.flatnonzero(fold[number] == part)) for part in range(folds)]


def _ridge(kernel: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Predictions (penalties, test rows) of ridge regressions with an unpenalised mean."""
    inner, cross = kernel[np.ix_(train, train)], kernel[np.ix_(test, train)]
    columns, mean = inner.mean(0), target[train].mean()
    cross = cross - columns - (cross.mean(1) - inner.mean())[:, None]
    inner = inner - columns - columns[:, None] + inner.mean()
    values, vectors = np.linalg.eigh(inner)
    scale = np.trace(inner) / len(train)
    weights = (vectors.T @ (target[train] - mean))[:, None] / (values[:, None] + PENALTIES * scale * len(train))
    return (cross @ vectors @ weights).T + mean


def auc(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive has a higher score than a negative."""
    values, counts = np.unique(score, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[np.searchsorted(values, score)]
    number = int(positive.sum())
    return float((rank[positive].sum() - number * (number + 1) / 2) / (number * (len(score) - number)))


def targets(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What is predicted, (N,) float64 with NaN where it is unknown: age in years, sex and diagnosis as -1 and 1."""
    found = {"age": pd.to_numeric(table["age"], errors="coerce").to_numpy(float)}
    for name, (low, high) in {"sex": ("F", "M"), "diagnosis": ("CN", "AD")}.items():
        if name in table:
            words = table[name].astype(str).str.upper()
            found[name] = words.map({low: -1.0, high: 1.0}).to_numpy(float)
    return {name: values for name, values in found.items() if len(set(values[np.isfinite(values)])) > 1}


def score(values: np.ndarray, target: np.ndarray, subjects: np.ndarray) -> tuple[float, float, float]:
    """Mean absolute error of a number, or AUC of two classes, mean over the repeats; with its 95 % interval."""
    rows = np.flatnonzero(np.isfinite(target))
    x, target, subjects = values[rows].astype(np.float64), target[rows], subjects[rows]
    x -= x.mean(0)
    predicted = np.stack([predict(x @ x.T, target, subjects, seed) for seed in range(REPEATS)])
    is_class = set(target) == {-1.0, 1.0}

    def measure(chosen: np.ndarray) -> float:
        if not is_class:
            return float(np.abs(predicted[:, chosen] - target[chosen]).mean())
        return float(np.mean([auc(target[chosen] > 0, row[chosen]) for row in predicted]))

    names, number = np.unique(subjects, return_inverse=True)
    places = [np.flatnonzero(number == name) for name in range(len(names))]
    generator, count = np.random.default_rng(0), len(names)
    resamples = (generator.integers(count, size=count) for _ in range(RESAMPLES))
    draws = [measure(np.concatenate([places[i] for i in chosen])) for chosen in resamples]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return measure(np.arange(len(rows))), float(low), float(high)


def format_row(name: str, candidate: Candidate, scores: Mapping[str, tuple[float, float, float]]) -> str:
    """One line of the table."""
    cells = [f"{key} {value:.3f} [{low:.3f}, {high:.3f}]" for key, (value, low, high) in scores.items()]
    return f"{name:16s} {candidate.seconds:5.2f} s/scan  " + "  ".join(cells)


@click.command()
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--spacing", default=4.75, show_default=True, help="Voxel size of the view in mm.")
@click.option("--shape", default="32,40,32", show_default=True, help="Voxels of the view.")
@click.option(
    "--makers", default="t1,ramps,partial_volume,mixture,soft", show_default=True, help=f"Of {', '.join(MAKERS)}."
)
def main(table: Path, spacing: float, shape: str, makers: str) -> None:
    """Compare views of the scans of TABLE by ridge regression: MAE of age, AUC of sex and of AD against CN."""
    names = makers.split(",")
    if unknown := set(names) - set(MAKERS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: one of {', '.join(MAKERS)} is needed")
    rows = read_table(table)
    transform = Transform([int(size) for size in shape.split(",")], spacing)
    subjects, wanted = rows["subject"].to_numpy(str), targets(rows)
    for name in names:
        candidate = make(rows["path"].tolist(), MAKERS[name], transform)
        found = {key: score(candidate.values, target, subjects) for key, target in wanted.items()}
        click.echo(format_row(name, candidate, found))


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except UserError as error:
        sys.exit(str(error))
