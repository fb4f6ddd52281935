"""How well a scan comes back: from its latent, from its inverted code, and from y alone, by sampler and steps.

Names: `reconstruction/autoencoder/<metric>` (the ceiling, all test scans, with intervals over subjects), and for every
sampler and number of steps on a few scans `reconstruction/<sampler>_<steps>/encoded/...` (decoded from the inverted
code and y) and `.../semantic/...` (from fixed noise and y): the metrics of image_metrics.compare against the scan,
`evaluations` of the network and `seconds` a scan; `encoded/ssim_drop` below the autoencoder on the same scans;
`code/{mean,std,kurtosis,norm_ratio,norm_ks}`, the code's distance from a standard normal; and against a reference of
many steps, root mean squares in units of the latent's deviation: `code/error` of z_T, `semantic/error` of z_0.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.diffusion.diagnostics import measure_gaussianity
from ldae.diffusion.samplers import Sampler
from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.images.image_metrics import brain_mask, compare_images, copy_to_host
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.utils.files import replacing
from ldae.utils.seeding import draw_normal

log = logging.getLogger(__name__)

STEM = "reconstruction"


class Reconstruction:
    """See the module's docstring. Also writes reconstruction.csv, reconstruction.png (quality against evaluations) and
    a montage of one scan decoded by the model's own sampler.

    Args:
        samplers: by name, each with `with_steps(n)`, `sample`, `invert`, `evaluations`; None leaves one out.
        steps: numbers of steps, for each sampler.
        scans: of test that samplers are tried on.
        reference_sampler: a sampler with many steps that errors are measured against; None leaves them out.
        reference_scans: of `scans` that the reference is computed for.
    """

    def __init__(
        self,
        samplers: Mapping[str, Any],
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
            log.warning("reconstruction is skipped: the table has no test scans")
            return
        subjects = context.table["subject"].to_numpy(str)
        yield f"{STEM}/autoencoder/scans", float(len(test))
        weights = draw_subject_weights(subjects[test], self.resamples, context.seed)
        for name, values in self._autoencoder(context, test).items():
            yield from summarise(f"{STEM}/autoencoder/{name}", weights @ values / weights.sum(1))
        rows = subsample_by_subject(test, subjects, self.scans, context.seed)
        trial = SamplerBenchmark(context, rows.tolist())
        reference = (
            trial.run_reference(self.reference_sampler, self.reference_scans) if self.reference_sampler else None
        )
        table = [{"method": "autoencoder", "source": "latent"} | trial.ceiling]
        for name, sampler in self.samplers.items():
            for steps in self.steps:
                for source, numbers in trial.run(sampler.with_steps(steps), reference).items():
                    table.append({"method": name, "steps": steps, "source": source} | numbers)
                    for metric, value in numbers.items():
                        yield f"{STEM}/{name}_{steps}/{source}/{metric}", value
        _draw(context, pd.DataFrame(table), trial)

    def _autoencoder(self, context: Context, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric of compress-then-decompress, (N,) each."""
        from tqdm import tqdm

        model, found = context.model, {}
        for part in tqdm(list(iterate_batches(rows, self.batch_size)), "autoencoder"):
            scans = context.volumes(part)
            x, mask = scans.to(model.device), brain_mask(scans).to(model.device)
            numbers = compare_images(model.decompress(model.compress(x)), x, mask, context.perceptual)
            for name, values in copy_to_host(numbers).items():
                found.setdefault(name, []).append(values)
        return {name: np.concatenate(parts) for name, parts in found.items()}


class SamplerBenchmark:
    """A few scans that every sampler is tried on, one batch."""

    def __init__(self, context: Context, rows: list[int]):
        self.context, model = context, context.model
        scans = context.volumes(rows)
        self.x, self.mask = scans.to(model.device), brain_mask(scans).to(model.device)
        self.z = model.compress(self.x)
        self.y = torch.from_numpy(context.embeddings[rows]).to(model.device)
        self.noise = draw_normal(self.z.shape[1:], context.seed, rows, STEM).to(self.z)
        self.decompressed = model.decompress(self.z)
        self.ceiling = _read(self._quality(self.decompressed, "latent"))["latent"]

    def _quality(self, volumes: Tensor, source: str) -> dict[tuple[str, str], Tensor]:
        """Every metric's mean over the scans, under (source, metric)."""
        found = compare_images(volumes, self.x, self.mask, self.context.perceptual)
        return {(source, name): values.mean() for name, values in found.items()}

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds a scan."""
        cuda = self.z.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.z.device)
        start = time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize(self.z.device)
        return result, (time.perf_counter() - start) / len(self.z)

    def _with(self, sampler: Any) -> Any:
        """The model with another default sampler, whose guidance then holds both ways."""
        model = copy(self.context.model)
        model.sampler = sampler
        return model

    def run_reference(self, sampler: Any, scans: int) -> tuple[Tensor, Tensor]:
        """z_T of the first scans, and z_0 from their noise, by a sampler of many steps."""
        model = self._with(sampler)
        z, y, noise = (tensor[:scans] for tensor in (self.z, self.y, self.noise))
        log.info("reference: %d steps each way for %d scans", sampler.steps, len(z))
        return model.invert(z, y).z, model.generate(noise, y)

    def run(self, sampler: Any, reference: tuple[Tensor, Tensor] | None) -> dict[str, dict[str, float]]:
        """Numbers of `encoded`, `semantic` and `code` for one sampler."""
        model = self._with(sampler)
        code, inverting = self._timed(lambda: model.invert(self.z, self.y))
        back, sampling = self._timed(lambda: model.generate(code, self.y))
        dreamt, dreaming = self._timed(lambda: model.generate(self.noise, self.y))
        measured = self._quality(model.decompress(back), "encoded")
        measured |= self._quality(model.decompress(dreamt), "semantic")
        measured["encoded", "latent_error"] = _rms(back - self.z)
        if reference is not None:
            z_t, z_0 = reference
            measured["code", "error"] = _rms(code.z[: len(z_t)] - z_t)
            measured["semantic", "error"] = _rms(dreamt[: len(z_0)] - z_0)
        found = {"code": {}} | _read(measured)
        found["encoded"] |= {
            "ssim_drop": self.ceiling["ssim"] - found["encoded"]["ssim"],
            "evaluations": 2.0 * sampler.evaluations,
            "seconds": inverting + sampling,
        }
        found["semantic"] |= {"evaluations": float(sampler.evaluations), "seconds": dreaming}
        found["code"] |= {name: float(value) for name, value in asdict(measure_gaussianity(code.z)).items()}
        return found


def _rms(difference: Tensor) -> Tensor:
    return difference.double().square().mean().sqrt()


def _read(measured: Mapping[tuple[str, str], Tensor]) -> dict[str, dict[str, float]]:
    """Scalars under (source, metric) as numbers by source and metric."""
    found: dict[str, dict[str, float]] = {}
    for (source, name), value in copy_to_host(measured).items():
        found.setdefault(source, {})[name] = float(value)
    return found


def _draw(context: Context, table: pd.DataFrame, trial: SamplerBenchmark) -> None:
    """The table, quality against evaluations, and one scan."""
    with replacing(context.out / f"{STEM}.csv") as temporary:
        table.to_csv(temporary, index=False)
    scored = table[table["source"].isin(["encoded", "semantic"])]
    curves = {
        f"{method}, {'encoded z_T' if source == 'encoded' else 'from y alone'}": (
            group["evaluations"].tolist(),
            group["ssim_mask"].tolist(),
        )
        for (method, source), group in scored.groupby(["method", "source"], sort=False)
    }
    if curves:
        ceiling = ("autoencoder", trial.ceiling["ssim_mask"])
        figures.draw_curves(
            context.out / f"{STEM}.png", curves, "network evaluations", "SSIM in the brain", True, ceiling
        )
    model, first = context.model, slice(0, 1)
    code = model.invert(trial.z[first], trial.y[first])
    rows = {
        "scan": trial.x[first],
        "autoencoder": trial.decompressed[first],
        "encoded z_T": model.decode(code, trial.y[first]),
        "from y alone": model.decode(trial.noise[first], trial.y[first]),
    }
    montage = [(name, volume[0, 0].float().cpu().numpy()) for name, volume in rows.items()]
    figures.draw_montage(context.out / f"{STEM}_scan.png", montage, "one test scan")
