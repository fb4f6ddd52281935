"""How well are scans restored from their latent, from their inverted code, and from y alone?

The autoencoder, the best possible, is measured on all test scans, with intervals over subjects; samplers are compared
on a few of them, at several numbers of steps. Metrics:

- `reconstruction/autoencoder/<metric>`: every metric of image_metrics.compare_images against the scan; `scans`.
- `reconstruction/<sampler>_<steps>/encoded/...`: the same for scans decoded from their inverted code and y;
  `ssim_drop`, SSIM below the autoencoder's on the same scans; `latent_error`, root mean square error of the latent.
- `reconstruction/<sampler>_<steps>/semantic/...`: the same for scans decoded from fixed noise and y.
- Metrics of images have intervals over the subjects of these scans. Both with `evaluations` of the network and
  `seconds` per scan.
- `reconstruction/<sampler>_<steps>/code/{mean,std,kurtosis,norm_ratio,norm_ks}`: how far the code is from standard
  normal noise (diffusion/diagnostics.py).
- `code/error` of z_T and `semantic/error` of z_0: root mean square difference from a reference sampler of many steps,
  in units of the latent's standard deviation.

Also writes reconstruction.csv, reconstruction.png (quality against evaluations of the network) and
reconstruction_scan.png (one scan, decoded by the model's own sampler).
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.diffusion.diagnostics import measure_gaussianity
from ldae.diffusion.samplers import Sampler
from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.images.image_metrics import brain_mask, compare_images, copy_to_host
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise_mean
from ldae.utils.seeding import draw_normal

log = logging.getLogger(__name__)

STEM = "reconstruction"
T = TypeVar("T")


class Reconstruction:
    """The evaluation that the module describes.

    Args:
        samplers: samplers by name; a sampler that is None is not used.
        steps: numbers of steps for each sampler.
        scans: number of test scans that samplers are compared on.
        reference_sampler: a sampler with many steps that `code/error` and `semantic/error` are measured against; None:
            they are not measured.
        reference_scans: how many of `scans` the reference sampler processes.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler | None],
        steps: Sequence[int] = (5, 10, 20, 50, 100),
        scans: int = 8,
        reference_sampler: Sampler | None = None,
        reference_scans: int = 2,
        batch_size: int = 8,
        resamples: int = 1000,
    ):
        self.samplers = {name: sampler for name, sampler in samplers.items() if sampler is not None}
        self.steps, self.scans = list(steps), scans
        self.reference_sampler, self.reference_scans = reference_sampler, reference_scans
        self.batch_size, self.resamples = batch_size, resamples

    @torch.no_grad()
    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        test = context.rows("test")
        if not len(test):
            context.skip("reconstruction is skipped: the table has no test scans")
            return
        yield f"{STEM}/autoencoder/scans", float(len(test))
        weights = draw_subject_weights(context.subjects(test), self.resamples, context.seed)
        for name, values in self._measure_autoencoder(context, test).items():
            yield from summarise_mean(f"{STEM}/autoencoder/{name}", values, weights)
        benchmark = SamplerBenchmark(context, context.sample_rows("test", self.scans).tolist())
        reference = None
        if self.reference_sampler is not None:
            reference = benchmark.run_reference(self.reference_sampler, self.reference_scans)
        table = [{"method": "autoencoder", "source": "latent"} | benchmark.autoencoder]
        for name, sampler in self.samplers.items():
            for steps in self.steps:
                for source, metrics in benchmark.run(sampler.with_steps(steps), reference).items():
                    means = {metric: float(np.mean(value)) for metric, value in metrics.items()}
                    table.append({"method": name, "steps": steps, "source": source} | means)
                    yield from self._summarise(f"{STEM}/{name}_{steps}/{source}", context, benchmark.rows, metrics)
        context.write_csv(f"{STEM}.csv", pd.DataFrame(table))
        _draw_quality(context, pd.DataFrame(table), benchmark.autoencoder["ssim_mask"])
        _draw_scan(context, benchmark)

    def _summarise(
        self, stem: str, context: Context, rows: Sequence[int], metrics: Mapping[str, np.ndarray | float]
    ) -> Iterator[tuple[str, float]]:
        """Metrics of one sampler; those of every scan (B,) with intervals."""
        weights = draw_subject_weights(context.subjects(rows), self.resamples, context.seed)
        for metric, value in metrics.items():
            if isinstance(value, np.ndarray):
                yield from summarise_mean(f"{stem}/{metric}", value, weights)
            else:
                yield f"{stem}/{metric}", value

    def _measure_autoencoder(self, context: Context, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric of scans that are compressed and decompressed, (N,) each."""
        from tqdm import tqdm

        model, found = context.model, {}
        for part in tqdm(list(iterate_batches(rows, self.batch_size)), "autoencoder"):
            scans = context.volumes(part)
            x, mask = scans.to(model.device), brain_mask(scans).to(model.device)
            metrics = compare_images(model.decompress(model.compress(x)), x, mask, context.perceptual)
            for name, values in copy_to_host(metrics).items():
                found.setdefault(name, []).append(values)
        return {name: np.concatenate(parts) for name, parts in found.items()}


class SamplerBenchmark:
    """Compares samplers on one batch of scans, those of `rows`.

    Attributes:
        autoencoder: mean of every metric of the autoencoder's reconstructions of these scans.
    """

    def __init__(self, context: Context, rows: list[int]):
        self.context, self.model, self.rows = context, context.model, rows
        scans = context.volumes(rows)
        self.x, self.mask = scans.to(self.model.device), brain_mask(scans).to(self.model.device)
        self.z, self.y = self.model.compress(self.x), context.y(rows)
        self.noise = draw_normal(self.z.shape[1:], context.seed, rows, STEM).to(self.z)
        self.decompressed = self.model.decompress(self.z)
        measured = _by_source(self._quality(self.decompressed, "latent"))["latent"]
        self.autoencoder = {name: float(values.mean()) for name, values in measured.items()}

    def _quality(self, volumes: Tensor, source: str) -> dict[tuple[str, str], Tensor]:
        """Every metric of every scan (B,), by (source, metric)."""
        found = compare_images(volumes, self.x, self.mask, self.context.perceptual)
        return {(source, name): values for name, values in found.items()}

    def _time(self, work: Callable[[], T]) -> tuple[T, float]:
        """The result, and the seconds that it took per scan."""
        is_cuda = self.z.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self.z.device)
        start = time.perf_counter()
        result = work()
        if is_cuda:
            torch.cuda.synchronize(self.z.device)
        return result, (time.perf_counter() - start) / len(self.z)

    def run_reference(self, sampler: Sampler, scans: int) -> tuple[Tensor, Tensor]:
        """z_T of the first scans, and z_0 from their noise, by a sampler of many steps."""
        z, y, noise = (tensor[:scans] for tensor in (self.z, self.y, self.noise))
        log.info("reference sampler: %d steps each way for %d scans", sampler.steps, len(z))
        return self.model.invert(z, y, sampler=sampler).z, self.model.generate(noise, y, sampler=sampler)

    def run(
        self, sampler: Sampler, reference: tuple[Tensor, Tensor] | None
    ) -> dict[str, dict[str, np.ndarray | float]]:
        """Metrics of one sampler, by source: `encoded`, `semantic` and `code`; those of images for every scan (B,)."""
        model, z, y = self.model, self.z, self.y
        code, inversion_seconds = self._time(lambda: model.invert(z, y, sampler=sampler))
        encoded, encoded_seconds = self._time(lambda: model.generate(code, y, sampler=sampler))
        semantic, semantic_seconds = self._time(lambda: model.generate(self.noise, y, sampler=sampler))
        measured = self._quality(model.decompress(encoded), "encoded")
        measured |= self._quality(model.decompress(semantic), "semantic")
        found: dict[str, dict[str, np.ndarray | float]] = {"code": {}} | _by_source(measured)
        found["encoded"]["latent_error"] = _rms(encoded - z)
        if reference is not None:
            z_t, z_0 = reference
            found["code"]["error"] = _rms(code.z[: len(z_t)] - z_t)
            found["semantic"]["error"] = _rms(semantic[: len(z_0)] - z_0)
        found["encoded"] |= {
            "ssim_drop": self.autoencoder["ssim"] - float(np.mean(found["encoded"]["ssim"])),
            "evaluations": 2.0 * sampler.evaluations,
            "seconds": inversion_seconds + encoded_seconds,
        }
        found["semantic"] |= {"evaluations": float(sampler.evaluations), "seconds": semantic_seconds}
        found["code"] |= {name: float(value) for name, value in asdict(measure_gaussianity(code.z)).items()}
        return found


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _by_source(measured: Mapping[tuple[str, str], Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of every scan (B,) by (source, metric) as arrays by source and metric."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for (source, name), values in copy_to_host(measured).items():
        found.setdefault(source, {})[name] = values
    return found


def _draw_quality(context: Context, table: pd.DataFrame, autoencoder: float) -> None:
    """SSIM in the brain against evaluations of the network, a curve per sampler and source."""
    sources = {"encoded": "from z_T and y", "semantic": "from y alone"}
    groups = table[table["source"].isin(sources)].groupby(["method", "source"], sort=False)
    curves = {
        f"{method}, {sources[source]}": (group["evaluations"].tolist(), group["ssim_mask"].tolist())
        for (method, source), group in groups
    }
    if curves:
        figures.draw_curves(
            context.out / f"{STEM}.png",
            curves,
            "evaluations of the network per scan",
            "SSIM in the brain",
            log_x=True,
            level=("autoencoder alone", autoencoder),
        )


def _draw_scan(context: Context, benchmark: SamplerBenchmark) -> None:
    """The first scan beside its reconstructions."""
    model, first = context.model, slice(0, 1)
    y, noise = benchmark.y[first], benchmark.noise[first]
    volumes = {
        "scan": benchmark.x[first],
        "autoencoder": benchmark.decompressed[first],
        "from z_T and y": model.decode(model.invert(benchmark.z[first], y), y),
        "from y alone": model.decode(noise, y),
    }
    montage = [(name, volume[0, 0].float().cpu().numpy()) for name, volume in volumes.items()]
    figures.draw_montage(context.out / f"{STEM}_scan.png", montage, "a test scan and its reconstructions")
