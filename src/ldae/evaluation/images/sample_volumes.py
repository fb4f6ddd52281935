"""Volumes of the ventricles in samples, which have no label map: their distribution against that of real scans.

As in edits/anatomy.py, a volume is read from intensities in a fixed region. The two intensity levels, of fluid and of
what surrounds it, are the medians of those of training scans. Real scans are measured with the same levels, after the
autoencoder, so that both distributions have the same errors.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.stats import wasserstein_distance
from torch import Tensor

from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.anatomy import VENTRICLES, Levels, SoftVolume, build_soft_volume
from ldae.evaluation.images.image_metrics import to_arrays
from ldae.evaluation.probes.bootstrap import summarise

BATCH = 16


class VentricleMeasure:
    """Measures volumes of the ventricles in images (B, 1, X, Y, Z), in cm3.

    Args:
        measure: of the region.
        context: of the training scans.
        rows: training scans whose levels are measured.
        images: (N, 1, X, Y, Z), what the autoencoder makes of them.
    """

    def __init__(self, measure: SoftVolume, context: Context, rows: np.ndarray, images: Tensor) -> None:
        levels = []
        for part in iterate_batches(range(len(rows)), BATCH):
            fractions = context.regions(rows[part].tolist(), VENTRICLES)
            pairs = zip(to_arrays(images[part]), fractions, strict=True)
            levels += [measure.levels(image, np.asarray(fraction)) for image, fraction in pairs]
        self.measure = measure
        self.levels = Levels(*np.median([(level.inside, level.outside) for level in levels], 0))

    def __call__(self, images: Tensor) -> np.ndarray:
        """(B,) cm3."""
        return np.array([self.measure.measure(image, self.levels) / 1000 for image in to_arrays(images)])


def build_ventricle_measure(context: Context, rows: np.ndarray, images: Tensor) -> VentricleMeasure | None:
    """The measure; None without label maps."""
    measure = build_soft_volume(context, VENTRICLES)
    return None if measure is None else VentricleMeasure(measure, context, rows, images)


def compare_volumes(
    volumes: Mapping[str, np.ndarray], train: np.ndarray, test: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[str, float]]:
    """Wasserstein distance of each source's volumes to those of test scans, cm3, with intervals over test subjects.

    Args:
        volumes: by the stem of the source's metrics.
        weights: (1 + R, number of test scans).
    """
    for stem, found in (*volumes.items(), ("generation/real", train)):
        distances = np.array([wasserstein_distance(found, test, v_weights=row) for row in weights])
        yield from summarise(f"{stem}/ventricle_wasserstein", distances)
        yield f"{stem}/ventricle_mean", float(found.mean())
        yield f"{stem}/ventricle_std", float(found.std())
    yield "generation/test/ventricle_mean", float(test.mean())
    yield "generation/test/ventricle_std", float(test.std())
