"""Scans from noise with the U-Net alone: how close to real ones in a feature space, and how different from each other.

Names: `generation/<space>/{fid,mmd}`, each with `..._real`, the same number of training against test scans (what a
perfect generator would score at about this size), and `generation/ms_ssim` between samples, with `..._real` (lower =
more diverse). FID: Heusel et al. 2017 (arXiv 1706.08500), biased upwards for few samples. MMD: the unbiased estimate
with a cubic kernel (KID, arXiv 1801.01401). The offline default space is the model's own encoder, called `own_encoder`:
it has seen this cohort and is no independent judge.
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.images.image_metrics import ms_ssim
from ldae.utils.seeding import draw_normal

log = logging.getLogger(__name__)


class MedicalNetFeatures:
    """Mean-pooled features of the last stage of a MedicalNet 3D ResNet (local weights): (B, 1, X, Y, Z) -> (B, D)."""

    name = "medicalnet"

    def __init__(self, weights: str, depth: int = 10):
        from ldae.losses.perceptual import MedicalNetDistance

        self.network = MedicalNetDistance(weights, depth)

    def __call__(self, x: Tensor) -> Tensor:
        return self.network.to(x.device).features(x)[-1].mean((2, 3, 4))


class Generation:
    """See the module's docstring.

    Args:
        samples: how many to draw.
        features: maps (B, 1, X, Y, Z) to (B, D) and has a `name`; None: the model's own encoder.
        pairs: how many pairs of scans MS-SSIM is averaged over.
    """

    def __init__(
        self,
        samples: int = 64,
        features: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 8,
        pairs: int = 100,
    ):
        self.samples, self.features, self.batch_size, self.pairs = samples, features, batch_size, pairs

    @torch.no_grad()
    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        train, test = context.rows("train"), context.rows("test")
        if min(len(train), len(test), self.samples) < 3:
            log.warning("generation is skipped: at least 3 samples, training scans and test scans are needed")
            return
        space = "own_encoder" if self.features is None else self.features.name
        samples = self._draw(context)
        generated = self._features(context, samples)
        real = {name: self._real_features(context, rows) for name, rows in (("train", train), ("test", test))}
        yield "generation/samples", float(self.samples)
        yield f"generation/{space}/fid", frechet_distance(generated, real["test"])
        yield f"generation/{space}/fid_real", frechet_distance(real["train"], real["test"])
        yield f"generation/{space}/mmd", cubic_mmd(generated, real["test"])
        yield f"generation/{space}/mmd_real", cubic_mmd(real["train"], real["test"])
        yield "generation/ms_ssim", self._likeness(context, lambda rows: samples[rows], self.samples)
        yield (
            "generation/ms_ssim_real",
            self._likeness(context, lambda rows: context.volumes(test[rows].tolist()), len(test)),
        )
        shown = [(f"sample {i + 1}", samples[i, 0].numpy()) for i in range(min(4, self.samples))]
        figures.draw_montage(context.out / "generation.png", shown, "unconditional samples")

    def _draw(self, context: Context) -> Tensor:
        """(samples, 1, X, Y, Z) on the CPU; sample i depends on (seed, i) alone."""
        from tqdm import tqdm

        model, parts = context.model, []
        like = model.compress(context.volumes([0]).to(model.device))
        for keys in tqdm(list(iterate_batches(range(self.samples), self.batch_size)), "samples"):
            noise = draw_normal(like.shape[1:], context.seed, keys, "generation").to(like)
            z0 = model.sampler.sample(model.denoiser.eps, noise, model.denoiser.schedule)
            parts.append(model.decompress(z0).float().cpu())
        return torch.cat(parts)

    def _features(self, context: Context, volumes: Tensor) -> np.ndarray:
        function = self.features or context.model.embed
        parts = [function(part.to(context.model.device)).double().cpu() for part in volumes.split(self.batch_size)]
        return torch.cat(parts).numpy()

    def _real_features(self, context: Context, rows: np.ndarray) -> np.ndarray:
        if self.features is None:
            return context.embeddings[rows].astype(np.float64)
        return np.concatenate(
            [self._features(context, context.volumes(part)) for part in iterate_batches(rows, self.batch_size)]
        )

    def _likeness(self, context: Context, volumes: Callable[[np.ndarray], Tensor], count: int) -> float:
        """Mean MS-SSIM of random pairs of different scans, computed on the model's device."""
        rng, device = np.random.default_rng(context.seed), context.model.device
        first = rng.integers(count, size=self.pairs)
        second = (first + rng.integers(1, count, size=self.pairs)) % count
        chunks = [np.array(part) for part in iterate_batches(range(self.pairs), self.batch_size)]
        pairs = ((volumes(first[part]).to(device), volumes(second[part]).to(device)) for part in chunks)
        return float(torch.cat([ms_ssim(x, y) for x, y in pairs]).mean())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians fitted to features (N, D) and (M, D).

    With A = Ra' Ra / N' and B = Rb' Rb / M' by QR of the centred features, tr (A B)^(1/2) is the sum of the singular
    values of Ra Rb' / sqrt(N' M'): no matrix square root, and exact for N or M below D too.
    """
    roots = [np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(max(len(x) - 1, 1)) for x in (a, b)]
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    traces = sum((root**2).sum() for root in roots)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * cross)


def cubic_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with k(u, v) = (u.v / D + 1)^3; about 0 for equal distributions."""

    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: np.ndarray) -> float:
        values = kernel(u, u)
        return float((values.sum() - np.trace(values)) / (len(u) * (len(u) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())
