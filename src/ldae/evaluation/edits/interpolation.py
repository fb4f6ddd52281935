"""Interpolation through time: two visits of a person predict the one between them, against what was really there.

All triples start < target < end of a test subject's visits; t = (target - start) / (end - start) in months. Methods:

    ldae     y on the line, codes on the arc (editing.Editor's depth), decoded
    latent   the autoencoder's latents on the line, decompressed
    voxel    the scans themselves on the line
    nearest  the visit that is nearer in time, the earlier one of two equally near

Against `real`, the target itself; `autoencoded`, the target through the autoencoder, which favours what went through
it too; `noise_free`, on phantoms the target rendered without noise. The ventricles of a prediction are measured with
levels between those of start and end (the nearest visit: its own), so that nothing of the target helps.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.editing.editor import Editor
from ldae.evaluation import figures
from ldae.evaluation.context import Context
from ldae.evaluation.edits import figures as edit_figures
from ldae.evaluation.edits.anatomy import Anatomy, interpolate_levels
from ldae.evaluation.edits.counterfactuals import CounterfactualRenderer
from ldae.evaluation.edits.inverted_scans import embeddings_of
from ldae.evaluation.images.image_metrics import BrainMasks, copy_to_host, mse, ssim_whole_and_masked, to_arrays
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.utils.files import replacing
from ldae.utils.slices import voxel_to_show

log = logging.getLogger(__name__)

OURS, BASELINES = "ldae", ("nearest", "voxel", "latent")
BETTER = {"mse": -1, "mse_mask": -1, "ssim": 1, "ssim_mask": 1, "ventricle_error": -1}
FRAMES = 9


@dataclass(frozen=True)
class Triple:
    """Rows of three visits of one subject and their months."""

    start: int
    target: int
    end: int
    share: float  # t in (0, 1)
    gap: int  # months from start to end

    @property
    def nearest(self) -> int:
        """The row of the visit nearer in time to the target."""
        return self.start if self.share <= 0.5 else self.end


def find_triples(table: pd.DataFrame, rows: np.ndarray) -> list[Triple]:
    """Every start < target < end of every subject among `rows`, in table order of subjects."""
    found = []
    for _, visits in table.iloc[rows].assign(row=rows).groupby("subject", sort=False):
        visits = visits.sort_values("months")
        places, months = visits["row"].tolist(), visits["months"].astype(int).tolist()
        for i in range(len(places)):
            for k in range(i + 2, len(places)):
                for j in range(i + 1, k):
                    if months[i] < months[j] < months[k]:
                        gap = months[k] - months[i]
                        found.append(Triple(places[i], places[j], places[k], (months[j] - months[i]) / gap, gap))
    return found


class Interpolation:
    """`interpolation/<method>/<against>/<metric>` over all triples, intervals over subjects; against `real` also
    `..._gap12` by gap.

    Metrics: mse, mse_mask, ssim, ssim_mask (the mask is the target's brain), ventricle_error (mm3, absolute).
    `interpolation/gain/<against>/<metric>_over_<method>`: how much better ours is, paired, positive = better.
    """

    def __init__(self, editor: Editor, most: int | None = None, pictures: int = 1, resamples: int = 1000):
        """`most` triples at most, in table order (None: all)."""
        self.editor, self.most, self.pictures, self.resamples = editor, most, pictures, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        from tqdm import tqdm

        chosen = find_triples(context.table, context.rows("test"))[: self.most]
        if not chosen:
            log.warning("interpolation is skipped: no test subject has three visits")
            return
        anatomy, source, masks = Anatomy(context), CounterfactualRenderer(context), BrainMasks()
        rows = []
        for number, triple in enumerate(tqdm(chosen, "interpolation")):
            if number < self.pictures:
                self._draw(context, triple, context.out / f"interpolation_{number + 1}")
            rows += self._judge(context, anatomy, source, masks, triple)
        frame = pd.DataFrame(rows)
        with replacing(context.out / "interpolation.csv") as temporary:
            frame.to_csv(temporary, index=False)
        yield "interpolation/triples", float(len(chosen))
        yield "interpolation/subjects", float(frame["subject"].nunique())
        yield from summarise_interpolation(frame, self.resamples, context.seed)
        draw_by_interval(context.out, frame)

    @torch.no_grad()
    def _judge(
        self, context: Context, anatomy: Anatomy, source: CounterfactualRenderer, masks: BrainMasks, triple: Triple
    ) -> list[dict[str, object]]:
        """A row for each method and reference."""
        model = context.model
        places = [triple.start, triple.target, triple.end]
        scans = context.volumes(places)
        x, mask = scans.to(model.device), masks(scans[1:2], [triple.target]).to(model.device)
        reconstructed = model.decompress(model.compress(x))
        raw, soft = anatomy.levels(places, scans), anatomy.levels(places, reconstructed)
        predictions = {
            OURS: (self.predict(context, triple, [triple.share]), interpolate_levels(soft[0], soft[2], triple.share)),
            "latent": (_latent(model, x, triple.share), interpolate_levels(soft[0], soft[2], triple.share)),
            "voxel": (torch.lerp(x[:1], x[2:], triple.share), interpolate_levels(raw[0], raw[2], triple.share)),
            "nearest": (x[:1], raw[0]) if triple.nearest == triple.start else (x[2:], raw[2]),
        }
        references = {"real": (x[1:2], raw[1]), "autoencoded": (reconstructed[1:2], soft[1])}
        if source.available:
            clean = source.render(triple.target).volume[None].to(x)
            references["noise_free"] = (clean, anatomy.levels([triple.target], clean)[0])
        entry = context.table.iloc[triple.target]
        about = {"subject": entry["subject"], "session": entry["session"], "gap": triple.gap, "share": triple.share}
        numbers = _compare(
            {method: image for method, (image, _) in predictions.items()},
            {against: image for against, (image, _) in references.items()},
            mask,
        )
        found = [about | {"method": method, "against": against} | values for (method, against), values in numbers]
        if "ventricle" in anatomy.measures:
            decoded, true = (
                {name: anatomy.volumes(image, [levels])["ventricle"] for name, (image, levels) in images.items()}
                for images in (predictions, references)
            )
            for row in found:
                row["ventricle_error"] = float(np.abs(decoded[row["method"]] - true[row["against"]])[0])
        return found

    @torch.no_grad()
    def predict(self, context: Context, triple: Triple, shares: list[float]) -> Tensor:
        """Our volumes (len(shares), 1, X, Y, Z) between the first and the last visit."""
        model, ends = context.model, [triple.start, triple.end]
        y = embeddings_of(context, ends)
        z = model.compress(context.volumes(ends).to(model.device))
        # One noise for both ends, else renoising would make the scan's code differ where the brain does not.
        code = self.editor.invert(model, z, y, context.seed, [triple.start, triple.start])
        images = []
        for share in shares:
            middle = code[:1].slerp(code[1:], share)
            images.append(self.editor.decode(model, middle, torch.lerp(y[:1], y[1:], share)))
        return torch.cat(images)

    def _draw(self, context: Context, triple: Triple, stem: Path) -> None:
        table = context.table
        x = to_arrays(context.volumes([triple.start, triple.target, triple.end]))
        shares = np.linspace(0, 1, FRAMES).tolist()
        frames = to_arrays(self.predict(context, triple, [*shares, triple.share]))
        months = [int(table["months"].iloc[row]) for row in (triple.start, triple.target, triple.end)]
        shown = [(f"month {month}", volume) for month, volume in zip(months, x, strict=True)]
        shown.insert(2, (f"month {months[1]}, ours", frames[-1]))
        nearest = x[0] if triple.nearest == triple.start else x[2]
        changes = [("ours - real", frames[-1] - x[1]), ("nearest - real", nearest - x[1])]
        cut = voxel_to_show(None, x.shape[1:])
        title = f"{table['subject'].iloc[triple.target]}: the visit at month {months[1]} from the two around it"
        edit_figures.draw_strip(stem.with_suffix(".png"), shown, changes, cut, title)
        captions = [f"month {months[0] + share * triple.gap:.1f}" for share in shares]
        edit_figures.write_animation(stem.with_suffix(".gif"), frames[:-1], captions, cut)


def _latent(model: object, x: Tensor, share: float) -> Tensor:
    ends = model.compress(x[[0, 2]])
    return model.decompress(torch.lerp(ends[:1], ends[1:], share))


def _compare(
    images: Mapping[str, Tensor], references: Mapping[str, Tensor], mask: Tensor
) -> list[tuple[tuple[str, str], dict[str, float]]]:
    """(name of image, name of reference) and the metrics of every pair of (1, 1, X, Y, Z) volumes, read together."""
    pairs = list(product(images, references))
    found: dict[tuple[str, str, str], Tensor] = {}
    for pair in pairs:
        image, reference = images[pair[0]], references[pair[1]]
        found[*pair, "mse"], found[*pair, "mse_mask"] = mse(image, reference), mse(image, reference, mask)
        found[*pair, "ssim"], found[*pair, "ssim_mask"] = ssim_whole_and_masked(image, reference, mask)
    values = copy_to_host(found)
    metrics = ("mse", "mse_mask", "ssim", "ssim_mask")
    return [(pair, {metric: float(values[*pair, metric][0]) for metric in metrics}) for pair in pairs]


def summarise_interpolation(frame: pd.DataFrame, resamples: int, seed: int) -> Iterator[tuple[str, float]]:
    """Metrics of the table that `Interpolation` writes: means, by gap, and our gains over each baseline."""
    metrics = [name for name in BETTER if name in frame]
    for against, part in frame.groupby("against", sort=False):
        by = {method: rows.reset_index(drop=True) for method, rows in part.groupby("method", sort=False)}
        weights = draw_subject_weights(by[OURS]["subject"], resamples, seed)
        total = weights.sum(1)
        for metric in metrics:
            for method, rows in by.items():
                stem = f"interpolation/{method}/{against}/{metric}"
                yield from summarise(stem, weights @ rows[metric].to_numpy() / total)
                for gap, values in rows.groupby("gap")[metric] if against == "real" else ():
                    yield f"{stem}_gap{gap:02d}", float(values.mean())
            for method in BASELINES:
                gain = BETTER[metric] * (by[OURS][metric] - by[method][metric]).to_numpy()
                yield from summarise(f"interpolation/gain/{against}/{metric}_over_{method}", weights @ gain / total)


def draw_by_interval(out: Path, frame: pd.DataFrame) -> None:
    """Curves by gap against the real target."""
    part = frame[frame["against"] == "real"]
    labels = {"ssim_mask": "SSIM in the brain, against the real visit", "ventricle_error": "ventricle error, mm3"}
    for metric, label in labels.items():
        if metric in part:
            means = {
                str(method): rows.groupby("gap")[metric].mean() for method, rows in part.groupby("method", sort=False)
            }
            curves = {method: (values.index.tolist(), values.tolist()) for method, values in means.items()}
            figures.draw_curves(out / f"interpolation_{metric}.png", curves, "months from first to last visit", label)
