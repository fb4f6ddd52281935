"""How close are synthetic scans to real ones, how different from each other, and are they copies of training scans?

Samples come from up to three sources (sample_sources.py): the U-Net alone, whose metrics are `generation/...`; the
Gaussian of y, `generation/gaussian/...`; and the semantic prior, `generation/prior/...`, unless it is that Gaussian.
The sources share their noise. Everything is measured for several seeds; values are means over them, and intervals, of
differences between sources and of volumes and probes, are over test subjects. For each source `<s>` and feature space:

- `<s>/<space>/fid`, `<s>/<space>/mmd`: distance to the test scans (feature_distances.py); `..._real`: that of as many
  training scans, about what a perfect generator would reach; `..._autoencoder`: of the same scans through the
  autoencoder, which no sample of the latent diffusion can be expected to surpass.
- `<s>/<space>/fid_below_unet`, `.../mmd_below_unet`: by how much it is below that of the U-Net alone, paired over
  seeds; `..._seeds`: the number of seeds in which it is. Of the prior also `..._below_gaussian`.
- `<s>/ms_ssim`: mean MS-SSIM between samples, lower = more diverse; `generation/ms_ssim_real`: between test scans.
- `<s>/ventricle_wasserstein`: of ventricle volumes, cm3 (sample_volumes.py).
- `<s>/<space>/share_nearer`, `distance`, `distance_ratio`: memorisation.py; also between images, `<s>/image/...`.
- `<s>/probe/<name>/...`: a probe trained on samples (synthetic_probe.py).

The first space, `own_encoder`, is the model's own encoder. It needs no further weights, but the comparison is not
independent, because the encoder was trained on this cohort; `random` is. generation.png shows samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.images.feature_distances import (
    covariance_root,
    cubic_mmd,
    frechet_distance,
    frechet_of_roots,
    weighted_cubic_mmd,
)
from ldae.evaluation.images.image_metrics import ms_ssim
from ldae.evaluation.images.memorisation import measure_memorisation
from ldae.evaluation.images.sample_sources import GAUSSIAN, PRIOR, UNET, Samples, draw_samples, source_names
from ldae.evaluation.images.sample_volumes import build_ventricle_measure, compare_volumes
from ldae.evaluation.images.synthetic_probe import compare_probes
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.evaluation.probes.targets import Probe

__all__ = ["Generation", "MedicalNetFeatures", "cubic_mmd", "frechet_distance"]
MIN_SCANS = 3


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


@dataclass(frozen=True)
class RealScans:
    """What samples are compared with.

    Attributes:
        train, test: rows of the table.
        images: what the autoencoder makes of the scans, (B, 1, X, Y, Z), by split.
        weights: (1 + R, number of test scans), of the bootstrap over test subjects.
    """

    train: np.ndarray
    test: np.ndarray
    images: Mapping[str, Tensor]
    weights: np.ndarray


def stem_of(source: str) -> str:
    """What the names of a source's metrics begin with."""
    return "generation" if source == UNET else f"generation/{source}"


class Generation:
    """The evaluation that the module describes.

    Args:
        samples: how many samples to draw for each seed.
        features: the first feature space; None: the model's own encoder.
        more_features: further feature spaces.
        pairs: how many pairs of scans MS-SSIM is averaged over.
        seeds: how often all samples are drawn.
        steps: of the sampler; None: the model's.
        train_scans: training scans that are compared with, at most.
        probes: what is predicted by probes trained on samples, by name.
        resamples: of the bootstrap over test subjects.
        pictures: samples that are drawn.
    """

    def __init__(
        self,
        samples: int = 64,
        features: FeatureSpace | None = None,
        batch_size: int = 8,
        pairs: int = 100,
        more_features: Sequence[FeatureSpace] = (),
        seeds: int = 1,
        steps: int | None = None,
        train_scans: int = 600,
        probes: Mapping[str, Probe] | None = None,
        resamples: int = 200,
        pictures: int = 4,
    ) -> None:
        self.samples, self.features, self.batch_size, self.pairs = samples, features, batch_size, pairs
        self.spaces: list[FeatureSpace | None] = [features, *more_features]
        self.seeds, self.steps, self.train_scans = seeds, steps, train_scans
        self.probes, self.resamples, self.pictures = probes or {}, resamples, pictures

    @torch.no_grad()
    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        train, test = context.rows("train"), context.rows("test")
        if min(len(train), len(test), self.samples) < MIN_SCANS:
            context.skip("generation is skipped: at least 3 samples, training scans and test scans are needed")
            return
        names = source_names(context)
        if names == [UNET]:
            context.skip("generation is of the U-Net alone: the model has no prior (train it with stage=prior)")
        samples = {name: self._draw(context, name) for name in names}
        self._draw_picture(context, samples)
        real = self._read_real(context)
        yield "generation/samples", float(self.samples)
        yield "generation/seeds", float(self.seeds)
        for space in self.spaces:
            yield from self._compare_features(context, space, samples, real)
        yield from self._compare_images(context, samples, real)
        for name, found in samples.items():
            similarity = self._mean_similarity(context, lambda i, found=found: found.volumes[i], self.samples)
            yield f"{stem_of(name)}/ms_ssim", similarity
        of_test = self._mean_similarity(context, lambda i: context.volumes(test[i].tolist()), len(test))
        yield "generation/ms_ssim_real", of_test

    def _draw(self, context: Context, source: str) -> Samples:
        sampler = context.model.sampler
        sampler = sampler if self.steps is None else sampler.with_steps(self.steps)
        return draw_samples(context, source, self.samples, self.seeds, sampler, self.batch_size)

    def _draw_picture(self, context: Context, samples: Mapping[str, Samples]) -> None:
        count = min(self.pictures, self.samples)
        shown = [
            (f"{name} {i + 1}", found.volumes[i, 0].numpy()) for name, found in samples.items() for i in range(count)
        ]
        figures.draw_montage(context.out / "generation.png", shown, "samples of each source")

    def _read_real(self, context: Context) -> RealScans:
        rows = {"train": context.sample_rows("train", self.train_scans), "test": context.rows("test")}
        images = {name: self._through_autoencoder(context, chosen) for name, chosen in rows.items()}
        weights = draw_subject_weights(context.subjects(rows["test"]), self.resamples, context.seed)
        return RealScans(rows["train"], rows["test"], images, weights)

    def _through_autoencoder(self, context: Context, rows: np.ndarray) -> Tensor:
        """What the autoencoder makes of these scans, (B, 1, X, Y, Z) on the CPU."""
        from tqdm import tqdm

        model, parts = context.model, []
        for part in tqdm(list(iterate_batches(rows, self.batch_size)), "real scans"):
            z = model.compress(context.volumes(part).to(model.device))
            parts.append(model.decompress(z).float().clamp(0, 1).cpu())
        return torch.cat(parts)

    def _compare_features(
        self, context: Context, space: FeatureSpace | None, samples: Mapping[str, Samples], real: RealScans
    ) -> Iterator[tuple[str, float]]:
        """Distances, memorisation and probes in one feature space."""
        title = "own_encoder" if space is None else space.name
        test, train = (self._real_features(context, space, rows) for rows in (real.test, real.train))
        features = {name: self._features(context, space, found.volumes) for name, found in samples.items()}
        by_seed = {name: samples[name].by_seed(values) for name, values in features.items()}
        subjects = context.table["subject"].tolist()
        reference = subsample_by_subject(real.train, subjects, self.samples, context.seed)
        decoded = real.images["train"][np.searchsorted(real.train, reference)]
        by_seed["real"] = [self._real_features(context, space, reference)]
        by_seed["autoencoder"] = [self._features(context, space, decoded)]
        found = _measure_distances(by_seed, test, real.weights)
        for metric, values in found.items():
            for name in samples:
                # Without an interval: in a resample, scans that are drawn twice raise every distance alike.
                yield f"{stem_of(name)}/{title}/{metric}", float(values[name][:, 0].mean())
            for name in ("real", "autoencoder"):
                yield f"generation/{title}/{metric}_{name}", float(values[name][0, 0])
            for name, other in ((GAUSSIAN, UNET), (PRIOR, UNET), (PRIOR, GAUSSIAN)):
                if name in samples and other in samples:
                    below = values[other] - values[name]
                    key = f"{stem_of(name)}/{title}/{metric}_below_{other}"
                    yield from summarise(key, below.mean(0))
                    yield f"{key}_seeds", float((below[:, 0] > 0).sum())
        for name, values in features.items():
            for metric, value in measure_memorisation(values, train, test, context.seed):
                yield f"{stem_of(name)}/{title}/{metric}", value
            labels = samples[name].labels
            if space is None and labels is not None:
                yield from compare_probes(
                    context, self.probes, stem_of(name), labels, values,
                    lambda rows: self._real_features(context, None, rows), self.resamples,
                )  # fmt: skip

    def _compare_images(
        self, context: Context, samples: Mapping[str, Samples], real: RealScans
    ) -> Iterator[tuple[str, float]]:
        """Memorisation and volumes of ventricles in the images themselves."""
        train, test = (real.images[name].flatten(1).numpy() for name in ("train", "test"))
        for name, found in samples.items():
            for metric, value in measure_memorisation(found.volumes.flatten(1).numpy(), train, test, context.seed):
                yield f"{stem_of(name)}/image/{metric}", value
        measure = build_ventricle_measure(context, real.train, real.images["train"])
        if measure is None:
            context.skip("generation: the table has no usable label maps (labels_path), volumes are not measured")
            return
        volumes = {stem_of(name): measure(found.volumes) for name, found in samples.items()}
        yield from compare_volumes(volumes, measure(real.images["train"]), measure(real.images["test"]), real.weights)

    def _features(self, context: Context, space: FeatureSpace | None, volumes: Tensor) -> np.ndarray:
        """Features (B, D) of volumes (B, 1, X, Y, Z), float64."""
        compute = space or context.model.embed
        parts = [compute(part.to(context.model.device)).double().cpu() for part in volumes.split(self.batch_size)]
        return torch.cat(parts).numpy()

    def _real_features(self, context: Context, space: FeatureSpace | None, rows: np.ndarray) -> np.ndarray:
        """Features of the scans of these rows.

        Samples exist in model space alone. Where the encoder sees more of a scan than that, the scans are compared as
        the samples are.
        """
        if space is None and context.seen is None:
            return context.embeddings[rows].astype(np.float64)
        batches = iterate_batches(rows, self.batch_size)
        return np.concatenate([self._features(context, space, context.volumes(part)) for part in batches])

    def _mean_similarity(self, context: Context, volumes: Callable[[np.ndarray], Tensor], count: int) -> float:
        """Mean MS-SSIM of random pairs among `count` scans, which `volumes` reads by number."""
        rng, device = np.random.default_rng(context.seed), context.model.device
        first = rng.integers(count, size=self.pairs)
        second = (first + rng.integers(1, count, size=self.pairs)) % count
        chunks = [np.array(part) for part in iterate_batches(range(self.pairs), self.batch_size)]
        pairs = ((volumes(first[part]).to(device), volumes(second[part]).to(device)) for part in chunks)
        return float(torch.cat([ms_ssim(x, y) for x, y in pairs]).mean())


def _measure_distances(
    by_seed: Mapping[str, Sequence[np.ndarray]], test: np.ndarray, weights: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """FID and MMD of each source to the test scans, (seeds, 1 + R), by metric and source.

    Args:
        by_seed: features (N, D) of each seed, by source.
        test: features (M, D).
        weights: (1 + R, M), how often each test scan counts.
    """
    roots = {name: [covariance_root(values) for values in parts] for name, parts in by_seed.items()}
    found = {name: np.empty((len(parts), len(weights))) for name, parts in by_seed.items()}
    for index, row in enumerate(weights):
        root = covariance_root(np.repeat(test, row.astype(int), axis=0))
        for name, parts in roots.items():
            found[name][:, index] = [frechet_of_roots(part, root) for part in parts]
    mmd = {name: np.stack([weighted_cubic_mmd(x, test, weights) for x in parts]) for name, parts in by_seed.items()}
    return {"fid": found, "mmd": mmd}
