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

from ldae.diffusion.diagnostics import gaussianity
from ldae.evaluation import figures
from ldae.evaluation.bootstrap import subject_weights, summarise
from ldae.evaluation.context import Context, batches, spread
from ldae.evaluation.image_metrics import compare
from ldae.files import replacing
from ldae.noise import normal

log = logging.getLogger(__name__)

STEM = "reconstruction"


class Reconstruction:
    """See the module's docstring. Also writes reconstruction.csv, reconstruction.png (quality against evaluations) and
    a montage of one scan decoded by the model's own sampler.

    Args:
        samplers: by name, each with `with_steps(n)`, `sample`, `invert`, `evaluations`; None leaves one out.
        steps: numbers of steps, for each sampler.
        scans: of test that samplers are tried on.
        reference: a sampler with many steps that errors are measured against; None leaves them out.
        reference_scans: of `scans` that the reference is computed for.
    """

    def __init__(
        self,
        samplers: Mapping[str, Any],
        steps: Sequence[int] = (5, 10, 20, 50, 100),
        scans: int = 8,
        reference: Any = None,
        reference_scans: int = 2,
        batch_size: int = 8,
        resamples: int = 1000,
    ):
        self.samplers = {name: sampler for name, sampler in samplers.items() if sampler is not None}
        self.steps, self.scans = list(steps), scans
        self.reference, self.reference_scans = reference, reference_scans
        self.batch_size, self.resamples = batch_size, resamples

    @torch.no_grad()
    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        test = context.rows("test")
        if not len(test):
            log.warning("reconstruction is skipped: the table has no test scans")
            return
        subjects = context.table["subject"].to_numpy(str)
        yield f"{STEM}/autoencoder/scans", float(len(test))
        weights = subject_weights(subjects[test], self.resamples, context.seed)
        for name, values in self._autoencoder(context, test).items():
            yield from summarise(f"{STEM}/autoencoder/{name}", weights @ values / weights.sum(1))
        rows = spread(test, subjects, self.scans, context.seed)
        trial = Trial(context, rows.tolist())
        reference = trial.reference(self.reference, self.reference_scans) if self.reference else None
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
        for part in tqdm(list(batches(rows, self.batch_size)), "autoencoder"):
            x = context.volumes(part).to(model.device)
            numbers = compare(model.decompress(model.compress(x)), x, perceptual=context.perceptual)
            for name, values in numbers.items():
                found.setdefault(name, []).append(values.double().cpu().numpy())
        return {name: np.concatenate(parts) for name, parts in found.items()}


class Trial:
    """A few scans that every sampler is tried on, one batch."""

    def __init__(self, context: Context, rows: list[int]):
        self.context, model = context, context.model
        self.x = context.volumes(rows).to(model.device)
        self.z = model.compress(self.x)
        self.y = torch.from_numpy(context.embeddings[rows]).to(model.device)
        self.noise = normal(self.z.shape[1:], context.seed, rows, STEM).to(self.z)
        self.decompressed = model.decompress(self.z)
        self.ceiling = self._quality(self.decompressed)

    def _quality(self, volumes: Tensor) -> dict[str, float]:
        found = compare(volumes, self.x, perceptual=self.context.perceptual)
        return {name: float(values.mean()) for name, values in found.items()}

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

    def reference(self, sampler: Any, scans: int) -> tuple[Tensor, Tensor]:
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
        encoded, semantic = self._quality(model.decompress(back)), self._quality(model.decompress(dreamt))
        encoded |= {
            "ssim_drop": self.ceiling["ssim"] - encoded["ssim"],
            "latent_error": _rms(back - self.z),
            "evaluations": 2.0 * sampler.evaluations,
            "seconds": inverting + sampling,
        }
        semantic |= {"evaluations": float(sampler.evaluations), "seconds": dreaming}
        shape = {name: float(value) for name, value in asdict(gaussianity(code.z)).items()}
        if reference is not None:
            z_t, z_0 = reference
            shape["error"] = _rms(code.z[: len(z_t)] - z_t)
            semantic["error"] = _rms(dreamt[: len(z_0)] - z_0)
        return {"encoded": encoded, "semantic": semantic, "code": shape}


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _draw(context: Context, table: pd.DataFrame, trial: Trial) -> None:
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
        figures.lines(context.out / f"{STEM}.png", curves, "network evaluations", "SSIM in the brain", True, ceiling)
    model, first = context.model, slice(0, 1)
    code = model.invert(trial.z[first], trial.y[first])
    rows = {
        "scan": trial.x[first],
        "autoencoder": trial.decompressed[first],
        "encoded z_T": model.decode(code, trial.y[first]),
        "from y alone": model.decode(trial.noise[first], trial.y[first]),
    }
    montage = [(name, volume[0, 0].float().cpu().numpy()) for name, volume in rows.items()]
    figures.montage(context.out / f"{STEM}_scan.png", montage, "one test scan")
