"""The list of measurements, the most useful first, and about how many seconds each takes on an H100."""

import tempfile
from pathlib import Path

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.bench.gpu_check.items import Item

STAGES = ("pretrain", "repr", "aekl")
VARIATIONS = (
    ("contiguous", "channels_last", False), ("unrecorded", "cuda_graph", False), ("compile", "compile", True),
    ("as_cudnn_guesses", "autotune", False),
)  # fmt: skip


def _device(check: GpuCheck) -> Numbers:
    from ldae.bench.gpu_check.machine import measure_matrix_rates

    return measure_matrix_rates(check)


def _kernels(check: GpuCheck) -> Numbers:
    from ldae.bench.gpu_check.kernels import compare_kernels

    return compare_kernels(check)


def _chain(name: str, seconds: float) -> Item:
    def work(check: GpuCheck) -> Numbers:
        from ldae.bench.gpu_check.chain import compare_chain

        return compare_chain(check, name)

    return Item(name, seconds, work)


def _training(measure: str, seconds: float, stage: str, **options: object) -> Item:
    """A measurement of training.py. It is imported late, because missing packages are named first."""
    names = [options.get("model", "base"), stage]
    names += [name for name, option, value in VARIATIONS if options.get(option) is value]

    def work(check: GpuCheck) -> Numbers:
        from ldae.bench.gpu_check import training

        return getattr(training, measure)(check, training.Setting(stage, **options))

    return Item("_".join(map(str, names)), seconds, work)


def _bench(task: str, variant: str, seconds: float) -> Item:
    def work(check: GpuCheck) -> Numbers:
        from ldae.bench.gpu_check.speedups import measure_speedup

        return measure_speedup(check, task, variant)

    return Item(f"{variant} {task}", seconds, work)


def _voxels(check: GpuCheck) -> Numbers:
    from hydra.utils import instantiate

    from ldae.bench.voxels import compare_spaces

    composed = check.bench()
    with tempfile.TemporaryDirectory(dir=check.scratch) as folder:
        found = compare_spaces(composed, instantiate(composed([]).bench).voxels, Path(folder))
    rows = {"counted": "voxels/full/", "timed": "voxels/reduced/", "times faster, timed": "speedup/"}
    return {
        row: {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
        for row, start in rows.items()
    }


def _steps(*items: tuple[str, float, dict[str, object]]) -> list[Item]:
    return [_training("measure_steps", seconds, stage, **options) for stage, seconds, options in items]


PUBLISHED, COMPILED = {"model": "published"}, {"compile": True}
CONTIGUOUS, UNRECORDED, GUESSED = {"channels_last": False}, {"cuda_graph": False}, {"autotune": False}
STRAIGHT_PORT, KERNELS, ARCHITECTURE, OURS = "straight", "kernels", "architecture", "evaluations"
PARTS: dict[str, list[Item]] = {
    "device": [Item("matrix products", 5, _device), Item("kernels", 15, _kernels)],
    "chain": [_chain("fp32", 60), _chain("bf16", 20)],
    "steps": _steps(
        ("pretrain", 36, {}), ("repr", 36, {}), ("aekl", 12, {}),
        ("pretrain", 30, CONTIGUOUS), ("repr", 20, CONTIGUOUS), ("aekl", 20, CONTIGUOUS),
        ("pretrain", 20, UNRECORDED), ("repr", 20, UNRECORDED),
        ("pretrain", 15, GUESSED), ("repr", 15, GUESSED), ("aekl", 10, GUESSED),
    ),
    "syncs": [_training("measure_waits", 6, stage, model="small") for stage in STAGES],
    "bench": [
        _bench("inference", STRAIGHT_PORT, 20), _bench("inference", OURS, 10),
        *(_bench(f"train_{stage}", name, 12) for stage in STAGES for name in (STRAIGHT_PORT, OURS)),
    ],
    "voxels": [Item("both spaces", 40, _voxels)],
    "profile": [_training("profile_steps", 15, stage) for stage in STAGES],
    "chain_more": [_chain("fp16", 20), _chain("compiled", 90)],
    "steps_more": _steps(
        ("pretrain", 25, PUBLISHED), ("repr", 20, PUBLISHED), ("aekl", 15, PUBLISHED),
        ("pretrain", 90, COMPILED), ("repr", 90, COMPILED), ("aekl", 60, COMPILED),
        ("pretrain", 120, PUBLISHED | COMPILED),
    ),
    "bench_more": [
        _bench(task, name, 15)
        for task in ("inference", *(f"train_{stage}" for stage in STAGES))
        for name in (KERNELS, ARCHITECTURE)
    ],
}  # fmt: skip
