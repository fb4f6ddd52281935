"""Are samples copies of training scans? Distances to the nearest training scan, of samples and of real test scans.

Distances are Euclidean, between features or between images. For a model that copies, samples are much nearer to a
training scan than scans of new people are. For images, all real scans are passed through the autoencoder, as samples
are, whose images are smoother and therefore nearer to everything.
"""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 500


def measure_memorisation(
    samples: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> Iterator[tuple[str, float]]:
    """Metrics of samples (S, D) against training scans (N, D) and test scans (M, D).

    Yields:
        share_nearer: share of samples nearer to a training scan than any test scan is.
        distance: median distance of samples to the nearest training scan over that of test scans; 1: like new people.
        distance_ratio: median ratio of the distances to the nearest training and to the nearest test scan, among
            equally many of each; 1: samples lean to neither, with an interval over samples.
    """
    to_train, of_test = nearest(samples, train), nearest(test, train)
    rng = np.random.default_rng(seed)
    equal = min(len(train), len(test))
    ratio = nearest(samples, train[rng.permutation(len(train))[:equal]]) / np.maximum(
        nearest(samples, test[rng.permutation(len(test))[:equal]]), 1e-12
    )
    draws = np.median(rng.choice(ratio, (RESAMPLES, len(ratio))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    yield "share_nearer", float((to_train < of_test.min()).mean())
    yield "distance", float(np.median(to_train) / max(np.median(of_test), 1e-12))
    yield from (("distance_ratio", float(np.median(ratio))), ("distance_ratio_low", low), ("distance_ratio_high", high))


def nearest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distance of each row of `first` (N, D) to the nearest row of `second` (M, D), (N,)."""
    centre = second.mean(0)  # smaller numbers round less
    a, b = first - centre, second - centre
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared.min(1), 0))
