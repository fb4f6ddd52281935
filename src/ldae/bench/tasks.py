"""What is measured of a variant: every function yields (name, cost)."""

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
from ldae.bench.subject import VariantUnderTest

Costs = Iterator[tuple[str, Cost]]
RAW = (182, 218, 182)  # voxels of 1 mm, as scanners make them


def _step(subject: VariantUnderTest, name: str) -> Costs:
    """An optimiser step of a stage, its data included."""
    with TrainingSteps(subject, name) as steps:
        yield f"train_{name}", measure_step(steps, subject.settings.repeats, count=not subject.config.trainer.compile)


def train_aekl(subject: VariantUnderTest) -> Costs:
    """Stage 1."""
    return _step(subject, "aekl")


def train_pretrain(subject: VariantUnderTest) -> Costs:
    """Stage 2."""
    return _step(subject, "pretrain")


def train_repr(subject: VariantUnderTest) -> Costs:
    """Stage 3."""
    return _step(subject, "repr")


def loading(subject: VariantUnderTest) -> Costs:
    """Batches of volumes alone, none of them computed on."""
    volumes, size = subject.cohort.volumes, subject.settings.batch["repr"]
    rows = np.arange(size) % subject.settings.scans
    yield "loading", time_calls(lambda: volumes.batch(rows), 2 * subject.settings.repeats, subject.device, size)


def reading(subject: VariantUnderTest) -> Costs:
    """A preprocessed scan of 1 mm, from NIfTI to model space: what embedding a new scan starts with."""
    transform = instantiate(subject.config.data.transform)
    voxels = (1000 * np.random.default_rng(0).random(RAW, dtype=np.float32)).astype(np.int16)
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
        path = Path(folder) / "scan.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        yield "reading", time_calls(lambda: transform(path), subject.settings.repeats, subject.device)


def inference(subject: VariantUnderTest) -> Costs:
    """encode, embed, invert, sample, decode of one scan; reconstruct and counterfactual are their sums."""
    model, settings = subject.model(), subject.settings
    x = torch.from_numpy(subject.scan)[None, None].to(subject.device)

    def cost(work: Callable[[], object]) -> Cost:
        return time_calls(work, settings.repeats, subject.device)

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
    """One after the other on the same scans."""
    costs = list(costs)
    seconds, flop = sum(c.seconds for c in costs), sum(c.flop for c in costs)
    return Cost(seconds, costs[0].scans, flop, max(c.peak for c in costs), busy=sum(c.busy for c in costs))


TASKS: dict[str, Callable[[VariantUnderTest], Costs]] = {
    task.__name__: task for task in (loading, reading, inference, train_aekl, train_pretrain, train_repr)
}


def run_tasks(subject: VariantUnderTest) -> Costs:
    """All tasks of the settings; memory is given back between them."""
    for name in subject.settings.tasks:
        yield from TASKS[name](subject)
        gc.collect()
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()
