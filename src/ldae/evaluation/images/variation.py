"""What does y leave open? Variants of a scan: its y, decoded with different random codes z_T.

Where variants differ, y does not determine the image. If probes applied to variants that are embedded anew predict what
they predict for the scan, the label is part of what y determines.

Metrics on test scans, with intervals over subjects:

- `variation/std_mask`: standard deviation of a voxel between variants, mean over the brain (intensity range = 1).
- `variation/std_ratio`: the same over the deviation between reconstructions of different scans; 1 = y determines
  nothing.
- `variation/<probe>_r`: correlation over scans of the probe's output for the scan with its mean output for variants.
- `variation/<probe>_within`: share of the variance of the probe's output for variants that is within scans.
- `variation/<probe>_agreement`: share of variants that a classifier assigns to the same class as the scan.
- `variation/<structure>_cv`: coefficient of variation of a structure's volume between the variants of a scan.
- `variation/scans`, `variation/variants`: how many there were.

variation.png shows where the variants of a few scans differ.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ldae.editing.directions import labelled_rows
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.figures import draw_maps
from ldae.evaluation.images.image_metrics import MASK_THRESHOLD, brain_mask, to_arrays
from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise, summarise_mean
from ldae.evaluation.probes.targets import Probe
from ldae.utils.seeding import draw_normal
from ldae.utils.slices import voxel_to_show


class Variation:
    """The evaluation that the module describes.

    Args:
        scans: at most this many test scans; None: all of them.
        variants: how many variants each scan gets.
        steps: of the sampler; None: its own number.
        pictures: how many scans are drawn.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        scans: int | None = 24,
        variants: int = 8,
        steps: int | None = None,
        pictures: int = 3,
        resamples: int = 1000,
    ):
        self.probes, self.scans, self.variants, self.steps = dict(probes or {}), scans, max(2, variants), steps
        self.pictures, self.resamples = pictures, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        rows = context.sample_rows("test", self.scans)
        if len(rows) < 2:
            context.skip("variation is skipped: it needs two test scans")
            return
        models = fit_probes(context, self.probes)
        found, decisions = self._measure(context, rows, models)
        weights = draw_subject_weights(context.subjects(rows), self.resamples, context.seed)
        yield "variation/scans", float(len(rows))
        yield "variation/variants", float(self.variants)
        for name, values in found.items():
            yield from summarise_mean(f"variation/{name}", values, weights)
        for name, model in models.items():
            own = model.decision(context.embeddings[rows])
            yield from summarise_decisions(f"variation/{name}", model, own, decisions[name], weights)

    @torch.no_grad()
    def _measure(
        self, context: Context, rows: np.ndarray, models: Mapping[str, LinearModel]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Metrics of each scan, (N,), and decisions of each probe on each variant, (N, variants)."""
        from tqdm import tqdm

        anatomy, pictures, metrics = Anatomy(context), [], []
        decisions: dict[str, list[np.ndarray]] = {name: [] for name in models}
        total, squares = 0.0, 0.0
        for row in tqdm(rows.tolist(), "variation"):
            reconstruction, variants = self._decode_variants(context, row)
            embedded = context.model.embed(variants).float().cpu().numpy()
            for name, model in models.items():
                decisions[name].append(model.decision(embedded))
            reconstruction, variants = reconstruction.cpu(), variants.cpu()
            image, deviation = to_arrays(reconstruction)[0], to_arrays(variants).std(0, ddof=1)
            total, squares = total + image, squares + image.astype(np.float64) ** 2
            mask = brain_mask(reconstruction)[0, 0].numpy()
            volumes = anatomy.volumes(variants, anatomy.levels([row], reconstruction) * self.variants)
            cvs = {f"{name}_cv": _coefficient_of_variation(values) for name, values in volumes.items()}
            metrics.append({"std_mask": float(deviation[mask].mean()), **cvs})
            if len(pictures) < self.pictures:
                pictures.append((context.scan_name(row), image, deviation))
        found = {name: np.array([numbers[name] for numbers in metrics]) for name in metrics[0]}
        found["std_ratio"] = found["std_mask"] / _deviation_between_scans(total, squares, len(rows))
        cut = voxel_to_show(anatomy.region, total.shape)
        draw_maps(context.out / "variation.png", pictures, cut, "standard deviation\n(intensity range = 1)")
        return found, {name: np.stack(values) for name, values in decisions.items()}

    def _decode_variants(self, context: Context, row: int) -> tuple[Tensor, Tensor]:
        """The autoencoder's reconstruction (1, 1, X, Y, Z), and the variants (variants, 1, X, Y, Z)."""
        model = context.model
        z = model.compress(context.volumes([row]).to(model.device))
        noise = draw_normal(z.shape[1:], context.seed, range(self.variants), f"variation/{row}").to(z)
        y = context.y([row]).expand(self.variants, -1)
        return model.decompress(z), model.decode(noise, y, self.steps)


def _coefficient_of_variation(volumes: np.ndarray) -> float:
    return float(volumes.std(ddof=1) / volumes.mean()) if volumes.mean() > 0 else float("nan")


def _deviation_between_scans(total: np.ndarray, squares: np.ndarray, count: int) -> float:
    """Standard deviation of a voxel between `count` scans, mean over the brain, from sums of values and of squares."""
    mean = total / count
    deviation = np.sqrt(np.clip(squares / count - mean**2, 0, None) * count / (count - 1))
    return float(deviation[mean > MASK_THRESHOLD].mean())


def fit_probes(context: Context, probes: Mapping[str, Probe]) -> dict[str, LinearModel]:
    """The probes fitted on the train split; a probe that has too few labels there is skipped."""
    fitted = {}
    for name, probe in probes.items():
        rows = labelled_rows(context.table, probe, context.rows("train"))
        truth, subjects = probe.target(context.table)[rows], context.subjects(rows)
        reason = probe.reason_unusable(truth, subjects, fitting=True)
        if reason:
            context.skip(f"variation of probe {name} is skipped: train has {reason}")
            continue
        fitted[name] = probe.fit(context.embeddings[rows].astype(np.float64), truth, subjects, context.seed)
    return fitted


def summarise_decisions(
    stem: str, model: LinearModel, own: np.ndarray, varied: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[str, float]]:
    """How a probe's decisions on variants (N, variants) agree with those on the scans (N,)."""
    yield from summarise(f"{stem}_r", scores.pearson(own, varied.mean(1), weights))
    within = varied.var(1, ddof=1).mean()
    across = varied.mean(1).var(ddof=1)
    if within + across > 0:
        yield f"{stem}_within", float(within / (within + across))
    if model.classes is not None:
        agreement = ((varied > 0) == (own > 0)[:, None]).mean(1)
        yield from summarise_mean(f"{stem}_agreement", agreement, weights)
