"""How close are unconditional samples to real scans, and how different from each other?

Samples come from the U-Net alone. They are compared with test scans in a feature space:

- `generation/<space>/fid`: Frechet distance (Heusel et al. 2017, arXiv 1706.08500), biased upwards for few samples.
- `generation/<space>/mmd`: maximum mean discrepancy, unbiased, with a cubic kernel (KID, arXiv 1801.01401).
- `..._real`: the same between training and test scans, about what a perfect generator would reach.
- `generation/ms_ssim`: mean MS-SSIM between samples, lower = more diverse; `..._real`: between test scans.
- `generation/samples`: how many samples were drawn.

The default space, `own_encoder`, is the model's own encoder. It needs no further weights, but the comparison is not
independent, because the encoder was trained on this cohort. generation.png shows a few samples.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.images.image_metrics import ms_ssim
from ldae.utils.seeding import draw_normal


class FeatureSpace(Protocol):
    """A network whose features scans are compared by; `name` becomes part of the metrics' names."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """Features (B, D) of scans (B, 1, X, Y, Z)."""
        ...


class MedicalNetFeatures:
    """Features of the last stage of a MedicalNet 3D ResNet, averaged over space; weights from a local file."""

    name = "medicalnet"

    def __init__(self, weights: str, depth: int = 10):
        from ldae.losses.perceptual import MedicalNetDistance

        self.network = MedicalNetDistance(weights, depth)

    def __call__(self, x: Tensor) -> Tensor:
        return self.network.to(x.device).features(x)[-1].mean((2, 3, 4))


class Generation:
    """The evaluation that the module describes.

    Args:
        samples: how many samples to draw.
        features: the feature space; None: the model's own encoder.
        pairs: how many pairs of scans MS-SSIM is averaged over.
    """

    def __init__(
        self, samples: int = 64, features: FeatureSpace | None = None, batch_size: int = 8, pairs: int = 100
    ) -> None:
        self.samples, self.features, self.batch_size, self.pairs = samples, features, batch_size, pairs

    @torch.no_grad()
    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        train, test = context.rows("train"), context.rows("test")
        if min(len(train), len(test), self.samples) < 3:
            context.skip("generation is skipped: at least 3 samples, training scans and test scans are needed")
            return
        stem = f"generation/{'own_encoder' if self.features is None else self.features.name}"
        samples = self._draw_samples(context)
        generated = self._features(context, samples)
        train_features, test_features = self._real_features(context, train), self._real_features(context, test)
        yield "generation/samples", float(self.samples)
        yield f"{stem}/fid", frechet_distance(generated, test_features)
        yield f"{stem}/fid_real", frechet_distance(train_features, test_features)
        yield f"{stem}/mmd", cubic_mmd(generated, test_features)
        yield f"{stem}/mmd_real", cubic_mmd(train_features, test_features)
        similarity = self._mean_similarity(context, lambda chosen: samples[chosen], self.samples)
        yield "generation/ms_ssim", similarity
        real = self._mean_similarity(context, lambda chosen: context.volumes(test[chosen].tolist()), len(test))
        yield "generation/ms_ssim_real", real
        shown = [(f"sample {i + 1}", samples[i, 0].numpy()) for i in range(min(4, self.samples))]
        figures.draw_montage(context.out / "generation.png", shown, "unconditional samples")

    def _draw_samples(self, context: Context) -> Tensor:
        """(samples, 1, X, Y, Z) on the CPU; sample i depends on (seed, i) only."""
        from tqdm import tqdm

        model, parts = context.model, []
        latent = model.compress(context.volumes([0]).to(model.device))  # for its shape
        for keys in tqdm(list(iterate_batches(range(self.samples), self.batch_size)), "samples"):
            noise = draw_normal(latent.shape[1:], context.seed, keys, "generation").to(latent)
            z0 = model.sampler.sample(model.denoiser.eps, noise, model.denoiser.schedule)
            parts.append(model.decompress(z0).float().cpu())
        return torch.cat(parts)

    def _features(self, context: Context, volumes: Tensor) -> np.ndarray:
        """Features (B, D) of volumes (B, 1, X, Y, Z), float64."""
        compute = self.features or context.model.embed
        parts = [compute(part.to(context.model.device)).double().cpu() for part in volumes.split(self.batch_size)]
        return torch.cat(parts).numpy()

    def _real_features(self, context: Context, rows: np.ndarray) -> np.ndarray:
        """Features of the scans of these rows.

        Samples exist in model space alone. Where the encoder sees more of a scan than that, the scans are compared as
        the samples are.
        """
        if self.features is None and context.seen is None:
            return context.embeddings[rows].astype(np.float64)
        batches = iterate_batches(rows, self.batch_size)
        return np.concatenate([self._features(context, context.volumes(part)) for part in batches])

    def _mean_similarity(self, context: Context, volumes: Callable[[np.ndarray], Tensor], count: int) -> float:
        """Mean MS-SSIM of random pairs among `count` scans, which `volumes` reads by number."""
        rng, device = np.random.default_rng(context.seed), context.model.device
        first = rng.integers(count, size=self.pairs)
        second = (first + rng.integers(1, count, size=self.pairs)) % count
        chunks = [np.array(part) for part in iterate_batches(range(self.pairs), self.batch_size)]
        pairs = ((volumes(first[part]).to(device), volumes(second[part]).to(device)) for part in chunks)
        return float(torch.cat([ms_ssim(x, y) for x, y in pairs]).mean())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians fitted to features (N, D) and (M, D).

    With A = Ra' Ra / (N - 1) and B = Rb' Rb / (M - 1) by QR of the centred features, tr (A B)^(1/2) is the sum of the
    singular values of Ra Rb' / sqrt((N - 1) (M - 1)). This needs no matrix square root and is exact for N or M < D too.
    """
    roots = [np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(max(len(x) - 1, 1)) for x in (a, b)]
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    traces = sum((root**2).sum() for root in roots)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * cross)


def cubic_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with k(u, v) = (u.v / D + 1)^3, about 0 for equal distributions."""

    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: np.ndarray) -> float:
        values = kernel(u, u)
        return float((values.sum() - np.trace(values)) / (len(u) * (len(u) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())
