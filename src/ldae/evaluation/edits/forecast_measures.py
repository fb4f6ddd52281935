"""Measures predictions of later visits: how similar they are to the real visit and to the truth, and their volumes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy, Levels, read_true_volumes
from ldae.evaluation.edits.counterfactuals import CounterfactualRenderer
from ldae.evaluation.edits.forecast_predictions import Visits
from ldae.evaluation.edits.forecast_results import round_gap
from ldae.evaluation.images.image_metrics import copy_to_host, mse, ssim_whole_and_masked


@dataclass(frozen=True)
class VisitMeasurer:
    """Measures the predictions of the later visits of one scan after another."""

    context: Context
    anatomy: Anatomy
    renderer: CounterfactualRenderer

    def targets(self, visits: Visits) -> list[dict[str, Tensor]]:
        """What each later visit is compared with, (1, 1, X, Y, Z) each."""
        real = self.context.volumes(visits.targets).to(self.context.model.device)
        found = [{"real": x[None]} for x in real]
        if self.renderer.available:
            for one, target in zip(found, visits.targets, strict=True):
                one["truth"] = self.renderer.render_later(visits.row, target).volume[None].to(real)
        return found

    def measure(
        self,
        visits: Visits,
        predictions: list[dict[str, Tensor]],
        truths: list[dict[str, Tensor]],
        mask: Tensor,
    ) -> list[dict[str, object]]:
        """One row per later visit, method and target."""
        context, anatomy = self.context, self.anatomy
        x = context.volumes([visits.row]).to(context.model.device)
        raw = anatomy.levels([visits.row], x)[0]
        soft = anatomy.levels([visits.row], context.model.decompress(context.model.compress(x)))[0]
        entry, rows = context.table.iloc[visits.row], []
        for place, (target, years) in enumerate(zip(visits.targets, visits.years, strict=True)):
            scan = {
                "subject": entry["subject"], "session": entry["session"], "row": visits.row, "target": target,
                "years": years, "gap": round_gap(years),
            }  # fmt: skip
            images = predictions[place]
            grown = self._hippocampi(visits.row, target, x, images)
            for against, true in truths[place].items():
                metrics = _compare(images, true, mask[place : place + 1])
                volume = _ventricles(anatomy, true, anatomy.levels([target], true)[0])
                for method, image in images.items():
                    own = metrics[method]
                    if volume is not None:
                        seen = _ventricles(anatomy, image, soft if method == "decoded" else raw)
                        own["ventricle_error"] = abs(seen - volume)
                    if against == "real" and method in grown:
                        own["hippocampus_error"] = grown[method]
                    rows.append(scan | {"method": method, "against": against} | own)
        return rows

    def _hippocampi(self, row: int, target: int, x: Tensor, images: dict[str, Tensor]) -> dict[str, float]:
        """Error of the volume of the hippocampi by method, mm3; none where they are not labelled."""
        if "hippocampus" not in self.anatomy.registered:
            return {}
        names = [name for name in images if name != "decoded"]  # the decoded one is blurred, the scan is not
        after = torch.cat([images[name] for name in names])
        found = self.anatomy.grown_volumes([row] * len(names), x.expand_as(after), after)["hippocampus"]
        true = read_true_volumes(self.context, "hippocampus", [target])[0]
        return {name: float(abs(volume - true)) for name, volume in zip(names, found, strict=True)}


def _compare(images: dict[str, Tensor], true: Tensor, mask: Tensor) -> dict[str, dict[str, float]]:
    """Image metrics of every prediction against one target."""
    together, count = torch.cat(list(images.values())), len(images)
    target, inside = true.expand(count, *true.shape[1:]), mask.expand(count, *mask.shape[1:])
    whole, masked = ssim_whole_and_masked(together, target, inside)
    values = {"mse": mse(together, target), "mse_mask": mse(together, target, inside)}
    found = copy_to_host(values | {"ssim": whole, "ssim_mask": masked})
    return {name: {key: float(one[i]) for key, one in found.items()} for i, name in enumerate(images)}


def _ventricles(anatomy: Anatomy, image: Tensor, levels: dict[str, Levels]) -> float | None:
    return float(anatomy.volumes(image, [levels])["ventricle"][0]) if "ventricle" in anatomy.measures else None
