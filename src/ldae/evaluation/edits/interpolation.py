"""Can the visit between two visits of a subject be predicted from them?

All triples start < target < end of a test subject's visits, with t = (target - start) / (end - start) in months.
Synthetic cohorts have fresh subjects with visits over years for that (ldae.evaluation.longitudinal). The prediction is
compared with what was really scanned, for several methods:

    ldae     the nearer visit plus the change to the decoded image at t, as the console tool writes it
    decoded  that image: y on a straight line, codes on an arc (inverted to the editor's depth), decoded
    latent   the autoencoder's latents on a straight line, decompressed
    voxel    the scans themselves on a straight line
    nearest  the visit nearer in time; the earlier one if both are equally near

and against three targets:

    real         the target scan
    autoencoded  the target scan as the autoencoder reconstructs it, which favours methods that use the autoencoder
    noise_free   for phantoms, the target rendered without noise

Metrics, with intervals over subjects:

- `interpolation/<method>/<against>/{mse,mse_mask,ssim,ssim_mask}`, the mask being the target's brain.
- `interpolation/<method>/<against>/ventricle_error`: absolute error of the ventricle volume, mm3. It is measured with
  intensity levels between those of start and end (the nearest visit: its own), so that the target gives nothing away.
- `interpolation/<method>/real/<metric>_gap<months>`: for triples whose first and last visit are so far apart.
- `interpolation/gain/<against>/<metric>_over_<method>`: how much better `ldae` is, paired; positive = better.
- `interpolation/triples`, `interpolation/subjects`: how many there were.

interpolation.csv has one row per triple, method and target; figures show the metrics by months between visits, and the
first triples as slices and animations.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.editing.editor import Editor
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy, Levels, interpolate_levels
from ldae.evaluation.edits.counterfactuals import CounterfactualRenderer
from ldae.evaluation.edits.edited_scans import add_change
from ldae.evaluation.edits.figures import draw_strip, write_animation
from ldae.evaluation.edits.visits import Triple, find_triples, spread_over_subjects
from ldae.evaluation.figures import draw_curves
from ldae.evaluation.images.image_metrics import BrainMasks, copy_to_host, mse, ssim_whole_and_masked, to_arrays
from ldae.evaluation.longitudinal import use_longitudinal_cohort
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise_mean
from ldae.utils.slices import voxel_to_show

log = logging.getLogger(__name__)

OURS, DECODED, BASELINES = "ldae", "decoded", ("nearest", "voxel", "latent")
SIGNS = {"mse": -1, "mse_mask": -1, "ssim": 1, "ssim_mask": 1, "ventricle_error": -1}  # 1: higher is better
LABELS = {
    "ldae": "nearest visit + change by LDAE",
    "decoded": "LDAE, decoded",
    "latent": "blend of latents",
    "voxel": "blend of scans",
    "nearest": "nearest visit",
}
FRAMES = 9
Measured = tuple[Tensor, dict[str, Levels]]  # a volume (1, 1, X, Y, Z), and the levels that its anatomy is read with


class Interpolation:
    """The evaluation that the module describes.

    Args:
        most: at most this many triples, of as many subjects as possible; None: all of them.
        pictures: how many triples are drawn.
        longitudinal: whether test subjects are those of the longitudinal cohort, where the cohort has one.
    """

    def __init__(
        self,
        editor: Editor,
        most: int | None = None,
        pictures: int = 1,
        resamples: int = 1000,
        longitudinal: bool = True,
    ) -> None:
        self.editor, self.most, self.pictures, self.resamples = editor, most, pictures, resamples
        self.longitudinal = longitudinal

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        from tqdm import tqdm

        context = use_longitudinal_cohort(context, self.longitudinal)
        triples = find_triples(context.table, context.rows("test"))
        triples = spread_over_subjects(triples, context.subjects([triple.target for triple in triples]), self.most)
        if not triples:
            context.skip("interpolation is skipped: no test subject has three visits")
            return
        anatomy, renderer, masks = Anatomy(context), CounterfactualRenderer(context), BrainMasks()
        rows = []
        for number, triple in enumerate(tqdm(triples, "interpolation")):
            if number < self.pictures:
                self._draw(context, triple, f"interpolation_{number + 1}")
            rows += self._compare(context, anatomy, renderer, masks, triple)
        table = pd.DataFrame(rows)
        context.write_csv("interpolation.csv", table)
        yield "interpolation/triples", float(len(triples))
        yield "interpolation/subjects", float(table["subject"].nunique())
        yield from summarise_interpolation(table, self.resamples, context.seed)
        draw_by_interval(context.out, table)

    @torch.no_grad()
    def _compare(
        self, context: Context, anatomy: Anatomy, renderer: CounterfactualRenderer, masks: BrainMasks, triple: Triple
    ) -> list[dict[str, object]]:
        """One row per method and target."""
        model, scans = context.model, context.volumes(triple.rows)
        x, mask = scans.to(model.device), masks(scans[1:2], [triple.target]).to(model.device)
        reconstructed = model.decompress(model.compress(x))
        raw, soft = anatomy.levels(triple.rows, scans), anatomy.levels(triple.rows, reconstructed)
        between = interpolate_levels(soft[0], soft[2], triple.t)
        ends = model.compress(x[[0, 2]])
        between_raw, is_start = interpolate_levels(raw[0], raw[2], triple.t), triple.nearest == triple.start
        near, own = (x[:1], raw[0]) if is_start else (x[2:], raw[2])
        decoded = self.predict(context, triple, [triple.t, 0.0 if is_start else 1.0])
        predictions: dict[str, Measured] = {
            OURS: (add_change(near, decoded[:1] - decoded[1:]), between_raw),
            DECODED: (decoded[:1], between),
            "latent": (model.decompress(torch.lerp(ends[:1], ends[1:], triple.t)), between),
            "voxel": (torch.lerp(x[:1], x[2:], triple.t), between_raw),
            "nearest": (near, own),
        }
        targets: dict[str, Measured] = {"real": (x[1:2], raw[1]), "autoencoded": (reconstructed[1:2], soft[1])}
        if renderer.available:
            clean = renderer.render(triple.target).volume[None].to(x)
            targets["noise_free"] = (clean, anatomy.levels([triple.target], clean)[0])
        entry = context.table.iloc[triple.target]
        scan = {"subject": entry["subject"], "session": entry["session"], "gap": triple.months, "share": triple.t}
        return [
            scan | {"method": method, "against": against} | metrics
            for (method, against), metrics in _measure_pairs(anatomy, predictions, targets, mask).items()
        ]

    @torch.no_grad()
    def predict(self, context: Context, triple: Triple, ts: list[float]) -> Tensor:
        """Our decoded volumes at each t between the first and the last visit, (len(ts), 1, X, Y, Z)."""
        model, ends = context.model, [triple.start, triple.end]
        y = context.y(ends)
        z = model.compress(context.volumes(ends).to(model.device))
        # Both ends get the same noise; otherwise renoising would make codes differ where the brain does not.
        code = self.editor.invert(model, z, y, context.seed, [triple.start, triple.start])
        images = []
        for t in ts:
            between = code[:1].slerp(code[1:], t)
            images.append(self.editor.decode(model, between, torch.lerp(y[:1], y[1:], t)))
        return torch.cat(images)

    def _draw(self, context: Context, triple: Triple, stem: str) -> None:
        """Real and predicted visits as slices, and an animation from the first visit to the last."""
        x = to_arrays(context.volumes(triple.rows))
        ts = np.linspace(0, 1, FRAMES).tolist()
        is_start = triple.nearest == triple.start
        frames = to_arrays(self.predict(context, triple, [*ts, triple.t]))
        nearest = context.volumes([triple.nearest])
        change = torch.from_numpy(frames[-1] - frames[0 if is_start else FRAMES - 1])[None, None]
        ours, nearest = (to_arrays(image)[0] for image in (add_change(nearest, change), nearest))
        months = [int(context.table["months"].iloc[row]) for row in triple.rows]
        volumes = [(f"month {month}", volume) for month, volume in zip(months, x, strict=True)]
        volumes.insert(2, (f"month {months[1]}, LDAE", ours))
        changes = [("LDAE - real", ours - x[1]), ("nearest - real", nearest - x[1])]
        cut = voxel_to_show(None, x.shape[1:])
        subject = context.table["subject"].iloc[triple.target]
        title = f"{subject}: visit at month {months[1]} predicted from months {months[0]} and {months[2]}"
        draw_strip(context.out / f"{stem}.png", volumes, changes, cut, title)
        captions = [f"month {months[0] + t * triple.months:.1f}" for t in ts]
        write_animation(context.out / f"{stem}.gif", frames[:-1], captions, cut)


def _measure_pairs(
    anatomy: Anatomy, predictions: Mapping[str, Measured], targets: Mapping[str, Measured], mask: Tensor
) -> dict[tuple[str, str], dict[str, float]]:
    """Every metric of every prediction against every target, by both names."""
    found: dict[tuple[str, str, str], Tensor] = {}
    pairs = list(product(predictions, targets))
    for pair in pairs:
        image, target = predictions[pair[0]][0], targets[pair[1]][0]
        found[*pair, "mse"], found[*pair, "mse_mask"] = mse(image, target), mse(image, target, mask)
        found[*pair, "ssim"], found[*pair, "ssim_mask"] = ssim_whole_and_masked(image, target, mask)
    metrics: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in pairs}
    for (method, against, metric), values in copy_to_host(found).items():
        metrics[method, against][metric] = float(values[0])
    if "ventricle" in anatomy.measures:
        predicted, true = (
            {name: anatomy.volumes(image, [levels])["ventricle"][0] for name, (image, levels) in volumes.items()}
            for volumes in (predictions, targets)
        )
        for method, against in pairs:
            metrics[method, against]["ventricle_error"] = float(np.abs(predicted[method] - true[against]))
    return metrics


def summarise_interpolation(table: pd.DataFrame, resamples: int, seed: int) -> Iterator[tuple[str, float]]:
    """Metrics of the rows of interpolation.csv: means, means by months between visits, and gains over each baseline."""
    metrics = [name for name in SIGNS if name in table]
    for against, part in table.groupby("against", sort=False):
        by_method = {method: rows.reset_index(drop=True) for method, rows in part.groupby("method", sort=False)}
        ours = by_method[OURS]
        weights = draw_subject_weights(ours["subject"], resamples, seed)
        for metric in metrics:
            for method, rows in by_method.items():
                stem = f"interpolation/{method}/{against}/{metric}"
                yield from summarise_mean(stem, rows[metric].to_numpy(), weights)
                for months, values in rows.groupby("gap")[metric] if against == "real" else ():
                    yield from summarise_mean(f"{stem}_gap{months:02d}", values.to_numpy(), weights[:, values.index])
            for method in (*BASELINES, DECODED):
                gain = SIGNS[metric] * (ours[metric] - by_method[method][metric]).to_numpy()
                yield from summarise_mean(f"interpolation/gain/{against}/{metric}_over_{method}", gain, weights)


def draw_by_interval(out: Path, table: pd.DataFrame) -> None:
    """Metrics against the real target by months between the first and the last visit, a curve per method."""
    part = table[table["against"] == "real"]
    labels = {
        "ssim_mask": "SSIM in the brain to the real visit",
        "ventricle_error": "error of the ventricle volume, mm3",
    }
    for metric in (name for name in labels if name in part):
        means = {method: rows.groupby("gap")[metric].mean() for method, rows in part.groupby("method", sort=False)}
        curves = {LABELS[method]: (values.index.tolist(), values.tolist()) for method, values in means.items()}
        file = out / f"interpolation_{metric}.png"
        draw_curves(file, curves, "months between first and last visit", labels[metric])
