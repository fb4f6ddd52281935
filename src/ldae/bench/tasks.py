"""The tasks that the bench measures. Each is a function of a variant that yields (name, cost) pairs."""

import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from hydra.utils import instantiate

from ldae.bench.measure import Cost, time_calls
from ldae.bench.steps import TrainingSteps, measure_step
from ldae.bench.variant import VariantUnderTest

Costs = Iterator[tuple[str, Cost]]
RAW = (182, 218, 182)  # voxels of 1 mm, as of a raw scan


def _step(variant: VariantUnderTest, name: str) -> Costs:
    """An optimiser step of a stage with its data."""
    with TrainingSteps(variant, name) as steps:
        yield f"train_{name}", measure_step(steps, variant.settings.repeats, count=not variant.config.trainer.compile)


def train_aekl(variant: VariantUnderTest) -> Costs:
    """Stage 1."""
    return _step(variant, "aekl")


def train_pretrain(variant: VariantUnderTest) -> Costs:
    """Stage 2."""
    return _step(variant, "pretrain")


def train_repr(variant: VariantUnderTest) -> Costs:
    """Stage 3."""
    return _step(variant, "repr")


def loading(variant: VariantUnderTest) -> Costs:
    """Reading a batch of volumes."""
    volumes, size = variant.cohort.volumes, variant.settings.batch["repr"]
    rows = np.arange(size) % variant.settings.scans
    yield "loading", time_calls(lambda: volumes.batch(rows), 2 * variant.settings.repeats, variant.device, size)


def reading(variant: VariantUnderTest) -> Costs:
    """A preprocessed scan of 1 mm from its NIfTI to model space, the first step of embedding a new scan."""
    transform = instantiate(variant.config.data.transform)
    voxels = (1000 * np.random.default_rng(0).random(RAW, dtype=np.float32)).astype(np.int16)
    with tempfile.TemporaryDirectory(dir=variant.folder) as folder:
        path = Path(folder) / "scan.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        yield "reading", time_calls(lambda: transform(path), variant.settings.repeats, variant.device)


def inference(variant: VariantUnderTest) -> Costs:
    """The methods of class LDAE on one scan; `reconstruct` and `counterfactual` are sums of others."""
    model, settings = variant.model(), variant.settings
    x = torch.from_numpy(variant.scan)[None, None].to(variant.device)

    def cost(work: Callable[[], object]) -> Cost:
        return time_calls(work, settings.repeats, variant.device)

    costs = {"encode": cost(lambda: model.compress(x)), "embed": cost(lambda: model.embed(x))}
    z, y = model.compress(x), model.embed(x)
    steps = settings.timed_steps or model.sampler.steps
    share = model.sampler.evaluations / model.sampler.with_steps(steps).evaluations
    costs["invert"] = cost(lambda: model.invert(z, y, steps=steps)).scaled(share)
    costs["sample"] = cost(lambda: model.generate(z, y, steps=steps)).scaled(share)
    costs["decode"] = cost(lambda: model.decompress(z))
    costs["reconstruct"] = sum_costs(costs[name] for name in ("invert", "sample", "decode"))
    costs["counterfactual"] = sum_costs([costs["encode"], costs["embed"], costs["reconstruct"]])
    yield from costs.items()


def sum_costs(costs: Iterator[Cost] | list[Cost]) -> Cost:
    """Cost of several tasks on the same scans, one after the other."""
    costs = list(costs)
    seconds, flop = sum(c.seconds for c in costs), sum(c.flop for c in costs)
    return Cost(seconds, costs[0].scans, flop, max(c.peak for c in costs), busy=sum(c.busy for c in costs))


TASKS: dict[str, Callable[[VariantUnderTest], Costs]] = {
    task.__name__: task for task in (loading, reading, inference, train_aekl, train_pretrain, train_repr)
}


def run_tasks(variant: VariantUnderTest) -> Costs:
    """All tasks of the settings; unused memory is released between them."""
    for name in variant.settings.tasks:
        yield from TASKS[name](variant)
        gc.collect()
        if variant.device.type == "cuda":
            torch.cuda.empty_cache()
