"""Is a later visit foretold better than by the last one?

The forecast (ldae.editing.forecast_fit) is fitted to pairs of visits of training subjects, stored as
forecast.safetensors, and applied to every earlier visit of every test subject. Its image of each later visit is
compared with what was really scanned, beside the baselines of forecast_predictions.py, and against two targets:

    real   the later scan, with its own noise and contrast
    truth  for phantoms: the later anatomy without noise, in the contrast of the earlier scan

Metrics, with intervals over subjects; the parts `_gap12`, `_gap24`, ... are of visits so many months apart:

- `forecast/<method>/<against>/{mse,mse_mask,ssim,ssim_mask}`, the mask being the brain of the later scan.
- `forecast/<method>/<against>/ventricle_error`: absolute error of the ventricle volume in mm3, measured with the
  intensity levels of the earlier scan. `hippocampus_error`, of the true volumes: how much the hippocampi of the earlier
  scan shrink to those of the prediction is measured by registration (deformation.py).
- `forecast/gain/<against>/<metric>_over_<method>`: how much better `ldae` is, paired; positive = better.
- `forecast/verdict/<against>/<metric>_gap<months>`: 1 if `ldae` is better than the last visit, with an interval that
  excludes 0; -1 if it is worse; 0 if the last visit is as good.
- `forecast/interval/<structure>/{coverage,width_percent,error_percent,unchanged_percent}`: share of true volumes within
  the 95 % interval, its width, and the error of its middle and of no change, in percent of the earlier volume.
- `forecast/deviation_r`: correlation, within brains, of the map of the standard deviation and the absolute error.
- `forecast/{pairs,subjects,training_pairs,training_subjects}`.

forecast.csv has one row per pair of visits, method and target, forecast_volumes.csv one per pair and structure.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.editor import Editor
from ldae.editing.forecast_file import write_forecaster
from ldae.editing.forecast_fit import FittedForecast, find_pairs, fit_forecaster
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import STRUCTURES, Anatomy
from ldae.evaluation.edits.counterfactuals import CounterfactualRenderer
from ldae.evaluation.edits.effects import correlation
from ldae.evaluation.edits.forecast_figures import draw_forecast, draw_forecast_curves
from ldae.evaluation.edits.forecast_measures import VisitMeasurer
from ldae.evaluation.edits.forecast_predictions import (
    LearnedBaselines,
    Visits,
    decode_forecasts,
    list_visits,
    predict_visits,
)
from ldae.evaluation.edits.forecast_results import (
    known_volumes,
    measure_intervals,
    summarise_forecasts,
    summarise_intervals,
)
from ldae.evaluation.images.image_metrics import BrainMasks, to_arrays
from ldae.evaluation.longitudinal import use_longitudinal_cohort
from ldae.utils.errors import UserError
from ldae.utils.slices import voxel_to_show

log = logging.getLogger(__name__)

FILE = "forecast.safetensors"
SHOWN_YEARS = 5.0  # pictures are of the visit that is closest to this many years later


class Forecast:
    """The evaluation that the module describes.

    Args:
        editor: inverts and decodes scans; it is stored with the forecast.
        columns: of the table that the forecast reads beside y.
        longitudinal: whether test subjects are those of the longitudinal cohort, where the cohort has one.
        scans: at most this many earlier visits, from as many subjects as possible; None: all.
        draws: random draws for each map of the standard deviation.
        maps: scans, at most, of which such a map is compared with the error.
        pictures: scans that are drawn.
    """

    def __init__(
        self,
        editor: Editor,
        columns: Sequence[str] = ("age", "diagnosis"),
        longitudinal: bool = True,
        scans: int | None = None,
        draws: int = 8,
        maps: int = 10,
        pictures: int = 2,
        resamples: int = 1000,
    ) -> None:
        self.editor, self.columns, self.longitudinal = editor, list(columns), longitudinal
        self.scans, self.resamples = scans, resamples
        self.draws, self.maps, self.pictures = draws, max(maps, pictures), pictures

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        context = use_longitudinal_cohort(context, self.longitudinal)
        train = context.rows("train")
        try:
            fitted = self._fit(context, train)
        except UserError as error:
            context.skip(f"forecast is skipped: {error}")
            return
        yield "forecast/training_pairs", float(len(fitted.pairs))
        yield "forecast/training_subjects", float(fitted.forecaster.subjects)
        test = self._choose_visits(context)
        if not test:
            context.skip("the forecast is stored, but not tested: no test subject has two visits")
            return
        yield from self._compare_all(context, fitted, LearnedBaselines.fit(context, fitted, train), test)

    def _fit(self, context: Context, train: np.ndarray) -> FittedForecast:
        """Fit the forecast on training rows, and store it."""
        volumes = {name: known_volumes(context, name, train) for name in STRUCTURES}
        fitted = fit_forecaster(context.table, context.embeddings, train, self.columns, volumes, context.seed)
        fitted = replace(fitted, forecaster=replace(fitted.forecaster, editor=self.editor))
        one = fitted.forecaster
        log.info("forecast: learned from %d pairs of visits of %d subjects", one.pairs, one.subjects)
        log.info("penalties of y, columns and regression to the mean (inf: left out): %s", fitted.penalties)
        write_forecaster(context.out / FILE, fitted.forecaster, context.weights)
        return fitted

    def _choose_visits(self, context: Context) -> list[Visits]:
        found = list_test_visits(context)
        rows = np.array([visits.row for visits in found], int)
        chosen = subsample_by_subject(rows, context.table["subject"].tolist(), self.scans, context.seed)
        return [visits for visits in found if visits.row in set(chosen.tolist())]

    def _compare_all(
        self, context: Context, fitted: FittedForecast, baselines: LearnedBaselines, test: list[Visits]
    ) -> Iterator[tuple[str, float]]:
        from tqdm import tqdm

        measurer, masks = VisitMeasurer(context, Anatomy(context), CounterfactualRenderer(context)), BrainMasks()
        rows, correlations, drawn = [], [], 0
        with_map = set(choose_numbers(test, context, self.maps))
        for number, visits in enumerate(tqdm(test, "forecast")):
            predictions = predict_visits(context, fitted, baselines, visits)
            truths = measurer.targets(visits)
            mask = masks(context.volumes(visits.targets), visits.targets).to(context.model.device)
            rows += measurer.measure(visits, predictions, truths, mask)
            if number in with_map:
                place = int(np.argmin(np.abs(visits.years - SHOWN_YEARS)))
                deviation = self._deviation(context, fitted, visits, place)
                error = (predictions[place]["ldae"] - truths[place]["real"]).abs()
                inside = mask[place, 0].cpu().numpy()
                correlations.append(correlation(to_arrays(deviation)[0], to_arrays(error)[0], inside))
                if drawn < self.pictures:
                    drawn += 1
                    self._draw(measurer, visits, place, predictions, truths, deviation, drawn)
        table = pd.DataFrame(rows)
        context.write_csv("forecast.csv", table)
        yield "forecast/pairs", float(len(table.drop_duplicates(["row", "target"])))
        yield "forecast/subjects", float(table["subject"].nunique())
        yield from summarise_forecasts(table, self.resamples, context.seed)
        draw_forecast_curves(context.out, table)
        yield "forecast/deviation_r", float(np.nanmean(correlations))
        volumes = measure_intervals(context, fitted.forecaster, list_test_visits(context))  # nothing is decoded: all
        if len(volumes):
            context.write_csv("forecast_volumes.csv", volumes)
            yield from summarise_intervals(volumes, self.resamples, context.seed)

    def _deviation(self, context: Context, fitted: FittedForecast, visits: Visits, place: int) -> Tensor:
        """Standard deviation over draws of one forecast, (1, 1, X, Y, Z)."""
        z, years = context.model.compress(context.volumes([visits.row])), float(visits.years[place])
        drawn = fitted.forecaster.draw(years, self.draws, context.seed)
        _, change = decode_forecasts(context, fitted, visits.row, z, np.full(self.draws, years), drawn)
        return change.std(0, keepdim=True)

    def _draw(
        self,
        measurer: VisitMeasurer,
        visits: Visits,
        place: int,
        predictions: list[dict[str, Tensor]],
        truths: list[dict[str, Tensor]],
        deviation: Tensor,
        number: int,
    ) -> None:
        context, renderer = measurer.context, measurer.renderer
        scan, forecast = context.volumes([visits.row]), predictions[place]["ldae"]
        true = truths[place].get("truth", truths[place]["real"])
        start = renderer.render(visits.row).volume[None].to(true) if renderer.available else scan.to(true)
        volumes = {"scan": scan, "forecast": forecast, "real visit": truths[place]["real"]}
        changes = {"forecast change": forecast - scan.to(forecast), "true change": true - start}
        if renderer.available:
            volumes["truth without noise"] = true
            changes["forecast - truth"] = forecast - true
        ventricle = measurer.anatomy.measures.get("ventricle")
        draw_forecast(
            context.out / f"forecast_{number}.png",
            {name: to_arrays(image)[0] for name, image in volumes.items()},
            {name: to_arrays(image)[0] for name, image in changes.items()},
            to_arrays(deviation)[0],
            voxel_to_show(None if ventricle is None else ventricle.region, tuple(scan.shape[2:])),
            f"{context.scan_name(visits.row)}: {visits.years[place]:g} years later",
        )


def list_test_visits(context: Context) -> list[Visits]:
    """Every scan of a test subject that has later visits."""
    return list_visits(find_pairs(context.table, context.rows("test")))


def choose_numbers(test: Sequence[Visits], context: Context, count: int) -> list[int]:
    """Numbers of `count` scans of different subjects, those whose last visit is latest first."""
    subjects = context.subjects([visits.row for visits in test])
    order = sorted(range(len(test)), key=lambda number: -test[number].years[-1])
    first = {subjects[number]: number for number in reversed(order)}
    return [number for number in order if first[subjects[number]] == number][:count]
