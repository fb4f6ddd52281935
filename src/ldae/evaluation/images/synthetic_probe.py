"""A probe trained on synthetic scans and their labels, tested on real ones, beside the probe trained on real scans.

If samples show what their labels say, the first is nearly as good as the second. Both read y of the image: a sample is
embedded like any other scan.
"""

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd

from ldae.evaluation.context import Context
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.evaluation.probes.targets import Probe

log = logging.getLogger(__name__)


def compare_probes(
    context: Context,
    probes: Mapping[str, Probe],
    stem: str,
    labels: pd.DataFrame,
    features: np.ndarray,
    real_features: Callable[[np.ndarray], np.ndarray],
    resamples: int,
) -> Iterator[tuple[str, float]]:
    """`<stem>/probe/<name>/{auc,mae}` of probes trained on samples, `..._real` on real scans, and their difference.

    Args:
        labels: of the samples, one row each.
        features: y of the samples' images, (N, dim).
        real_features: y of real scans by their rows, made as that of the samples is.
    """
    train, test = context.rows("train"), context.rows("test")
    people = np.arange(len(labels)).astype(str)
    for name, probe in probes.items():
        real, synthetic = probe.target(context.table), probe.target(labels)
        fit, known = np.isfinite(synthetic), test[np.isfinite(real[test])]
        used = train[np.isfinite(real[train])]
        reasons = (
            probe.reason_unusable(synthetic[fit], people[fit], fitting=True),
            probe.reason_unusable(real[used], context.subjects(used), fitting=True),
            probe.reason_unusable(real[known], context.subjects(known), fitting=False),
        )
        if any(reasons):
            log.info("no synthetic probe of %s: %s", name, next(filter(None, reasons)))
            continue
        metric = "auc" if probe.classes else "mae"
        weights = draw_subject_weights(context.subjects(known), resamples, context.seed)
        age = np.full(len(known), np.nan)
        found, tested = {}, real_features(known)
        for suffix, x, truth, subjects in (
            ("", features[fit], synthetic[fit], people[fit]),
            ("_real", real_features(used), real[used], context.subjects(used)),
        ):
            model = probe.fit(x, truth, subjects, context.seed)
            predicted = model.predict(tested)
            found[suffix] = probe.scores(real[known], predicted, age, weights)[metric]
            yield from summarise(f"{stem}/probe/{name}/{metric}{suffix}", found[suffix])
        yield from summarise(f"{stem}/probe/{name}/{metric}_difference", found[""] - found["_real"])
