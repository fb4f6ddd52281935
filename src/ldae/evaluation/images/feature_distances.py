"""Distances between two sets of scans in a feature space: Frechet distance and maximum mean discrepancy.

- Frechet distance (Heusel et al. 2017, arXiv 1706.08500), of Gaussians fitted to both; biased upwards for few scans.
- Maximum mean discrepancy with a cubic kernel (KID, arXiv 1801.01401), unbiased.
"""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians fitted to features (N, D) and (M, D).

    With A = Ra' Ra / (N - 1) and B = Rb' Rb / (M - 1) by QR of the centred features, tr (A B)^(1/2) is the sum of the
    singular values of Ra Rb' / sqrt((N - 1) (M - 1)). This needs no matrix square root and is exact for N or M < D too.
    """
    return frechet_of_roots(covariance_root(a), covariance_root(b))


def covariance_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,) of features (N, D), and R with R' R their covariance, as `frechet_of_roots` takes them."""
    mean = features.mean(0)
    return mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(max(len(features) - 1, 1))


def frechet_of_roots(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """`frechet_distance` of two sets of features, each given by its `covariance_root`."""
    cross = np.linalg.svd(a[1] @ b[1].T, compute_uv=False).sum()
    traces = (a[1] ** 2).sum() + (b[1] ** 2).sum()
    return float(((a[0] - b[0]) ** 2).sum() + traces - 2 * cross)


def cubic_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with k(u, v) = (u.v / D + 1)^3, about 0 for equal distributions."""
    return float(weighted_cubic_mmd(a, b, np.ones((1, len(b))))[0])


def weighted_cubic_mmd(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`cubic_mmd` for each row of weights (R, M) of the scans of b, (R,)."""

    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (u @ v.T / u.shape[1] + 1) ** 3

    own, between, other = kernel(a, a), kernel(a, b).mean(0), kernel(b, b)
    within_a = (own.sum() - np.trace(own)) / (len(a) * (len(a) - 1))
    np.fill_diagonal(other, 0)
    total = weights.sum(1)
    pairs = total**2 - (weights**2).sum(1)
    within_b = np.einsum("ri,ij,rj->r", weights, other, weights, optimize=True) / np.maximum(pairs, 1e-12)
    return within_a + within_b - 2 * (weights @ between) / total
