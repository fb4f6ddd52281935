"""Variations of a scan: y kept, z_T drawn anew. What varies, and how much of what the probes say of y stays.

y is meant to hold what makes a brain this brain. Where variants differ is what y leaves to chance; that probes, on
variants embedded anew, give the verdict of the scan itself says that labels are in what it holds.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.directions import labelled_rows
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.context import Context
from ldae.evaluation.edits import figures as edit_figures
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.inverted_scans import embeddings_of
from ldae.evaluation.images.image_metrics import brain_mask, to_arrays
from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.evaluation.probes.fitting import fit
from ldae.utils.seeding import draw_normal
from ldae.utils.slices import voxel_to_show

log = logging.getLogger(__name__)


class Variation:
    """`variation/...` on test scans, with intervals over subjects.

    - `std_mask`: standard deviation of a voxel between variants, mean over the brain, in shares of the intensity range;
      `std_ratio`: the same over the deviation between different scans' reconstructions, 1 = y holds nothing.
    - `<probe>_r`: correlation over scans of the probe's decision on the scan with the mean of its variants';
      `<probe>_within`: share of the decision's variance among variants that lies within a scan;
      `<probe>_agreement`: share of variants with the scan's own verdict (classifiers).
    - `<structure>_cv`: coefficient of variation of a structure's volume between a scan's variants.
    """

    def __init__(
        self,
        probes: Mapping[str, Any],
        scans: int | None = 24,
        variants: int = 8,
        steps: int | None = None,
        pictures: int = 3,
        resamples: int = 1000,
    ):
        """`scans` at most (None: all of test), each `variants` times."""
        self.probes, self.scans, self.variants, self.steps = dict(probes or {}), scans, max(2, variants), steps
        self.pictures, self.resamples = pictures, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        rows = subsample_by_subject(context.rows("test"), context.table["subject"].tolist(), self.scans, context.seed)
        if len(rows) < 2:
            log.warning("variation is skipped: test needs two scans")
            return
        models = fit_probes(context, self.probes)
        found, decisions = self._all(context, rows, models)
        subjects = context.table["subject"].to_numpy(str)[rows]
        weights = draw_subject_weights(subjects, self.resamples, context.seed)
        yield "variation/scans", float(len(rows))
        yield "variation/variants", float(self.variants)
        for name, values in found.items():
            yield from summarise(f"variation/{name}", weights @ values / weights.sum(1))
        for name, model in models.items():
            own, varied = model.decision(context.embeddings[rows]), decisions[name]
            yield from summarise_decisions(f"variation/{name}", model, own, varied, weights)

    @torch.no_grad()
    def _all(
        self, context: Context, rows: np.ndarray, models: Mapping[str, LinearModel]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Numbers of each scan, (N,), and decisions of each probe on each variant, (N, V)."""
        from tqdm import tqdm

        anatomy, pictures, collected = Anatomy(context), [], []
        decisions: dict[str, list[np.ndarray]] = {name: [] for name in models}
        total, squares = 0.0, 0.0
        for row in tqdm(rows.tolist(), "variation"):
            reconstruction, variants = self._variants(context, row)
            embedded = context.model.embed(variants).float().cpu().numpy()
            reconstruction, variants = reconstruction.cpu(), variants.cpu()  # what follows is measured there
            deviation, image = to_arrays(variants).std(0, ddof=1), to_arrays(reconstruction)[0]
            mask = brain_mask(reconstruction)[0, 0].numpy()
            total, squares = total + image, squares + image.astype(np.float64) ** 2
            levels = anatomy.levels([row], reconstruction) * self.variants
            numbers = {"std_mask": float(deviation[mask].mean())}
            for name, values in anatomy.volumes(variants, levels).items():
                numbers[f"{name}_cv"] = float(values.std(ddof=1) / values.mean()) if values.mean() > 0 else float("nan")
            collected.append(numbers)
            for name, model in models.items():
                decisions[name].append(model.decision(embedded))
            if len(pictures) < self.pictures:
                label = f"{context.table['subject'].iloc[row]} {context.table['session'].iloc[row]}"
                pictures.append((label, image, deviation))
        count = len(rows)
        across = np.sqrt(np.clip(squares / count - (total / count) ** 2, 0, None) * count / (count - 1))
        typical = float(across[total / count > 0.05].mean())
        found = {name: np.array([numbers[name] for numbers in collected]) for name in collected[0]}
        found["std_ratio"] = found["std_mask"] / typical
        cut = voxel_to_show(anatomy.region, image.shape)
        edit_figures.draw_maps(context.out / "variation.png", pictures, cut, "standard deviation between variants")
        return found, {name: np.stack(values) for name, values in decisions.items()}

    def _variants(self, context: Context, row: int) -> tuple[Tensor, Tensor]:
        """The autoencoder's reconstruction (1, ...) and the variants (V, 1, X, Y, Z)."""
        model = context.model
        z = model.compress(context.volumes([row]).to(model.device))
        noise = draw_normal(z.shape[1:], context.seed, range(self.variants), f"variation/{row}").to(z)
        y = embeddings_of(context, [row]).expand(self.variants, -1)
        return model.decompress(z), model.decode(noise, y, self.steps)


def fit_probes(context: Context, probes: Mapping[str, Any]) -> dict[str, LinearModel]:
    """Probes fitted on train; those without enough labels are left out."""
    fitted, subjects = {}, context.table["subject"].to_numpy(str)
    for name, probe in probes.items():
        rows = labelled_rows(context.table, probe, context.rows("train"))
        truth = probe.target(context.table)[rows]
        why = probe.reason_unusable(truth, subjects[rows], fitting=True)
        if why:
            log.warning("probe %s is left out: train has %s", name, why)
            continue
        fitted[name] = fit(probe, context.embeddings[rows].astype(np.float64), truth, subjects[rows], context.seed)
    return fitted


def summarise_decisions(
    stem: str, model: LinearModel, own: np.ndarray, varied: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[str, float]]:
    """How decisions on variants (N, V) keep to those on the scans (N,)."""
    yield from summarise(f"{stem}_r", scores.pearson(own, varied.mean(1), weights))
    within = varied.var(1, ddof=1).mean()
    across = varied.mean(1).var(ddof=1)
    if within + across > 0:
        yield f"{stem}_within", float(within / (within + across))
    if model.classes is not None:
        agreement = ((varied > 0) == (own > 0)[:, None]).mean(1)
        yield from summarise(f"{stem}_agreement", weights @ agreement / weights.sum(1))
