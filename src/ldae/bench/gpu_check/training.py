"""Training steps of one stage: their cost, where the host waits for the device, and which kernels take the time."""

import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.bench.steps import WARM_UP, TrainingSteps, measure_seconds, measure_step
from ldae.bench.variant import VariantUnderTest
from ldae.training.checkpoint import Progress
from ldae.training.guard import StepGuard

SYNCHRONISING = "called a synchronizing"  # how PyTorch's warning begins
SOURCES = f"{Path(__file__).parents[2]}/"  # of this package
PROFILED, KERNELS = 3, 10


@dataclass(frozen=True)
class Setting:
    """Settings with which a stage is trained."""

    stage: str
    model: str = "base"
    precision: str = "bf16"
    channels_last: bool | None = None
    cuda_graph: bool = True
    compile: bool = False
    autotune: bool = True


def build_variant(check: GpuCheck, setting: Setting, checkpointing: bool = False) -> VariantUnderTest:
    """A variant with these settings. Its made-up volumes are shared with other variants."""
    options = {
        "channels_last": "null" if setting.channels_last is None else setting.channels_last,
        "cuda_graph": setting.cuda_graph, "compile": setting.compile, "checkpointing": checkpointing,
    }  # fmt: skip
    overrides = [f"model={setting.model}", check.accelerator(setting.precision), f"bench.autotune={setting.autotune}"]
    overrides += [f"trainer.{name}={value}" for name, value in options.items()]
    return VariantUnderTest(check.bench(), overrides, check.scratch / "steps" / setting.model)


def measure_steps(check: GpuCheck, setting: Setting) -> Numbers:
    """Cost of a step; with checkpointing only if it does not fit into memory without."""
    try:
        return _measure_steps(check, setting, checkpointing=False)
    except torch.cuda.OutOfMemoryError:
        pass  # what the failed attempt had allocated is released with its exception
    torch.cuda.empty_cache()
    return _measure_steps(check, setting, checkpointing=True)


def _measure_steps(check: GpuCheck, setting: Setting, checkpointing: bool) -> Numbers:
    variant = build_variant(check, setting, checkpointing)
    key = f"{setting.model} {setting.stage}"
    extra: dict[str, float] = {}
    with TrainingSteps(variant, setting.stage) as steps:
        if setting.compile:
            extra["compile_s"] = measure_seconds(steps, steps.device)
        # Compiled code hides its operations from the counter; they are those of the same step uncompiled.
        cost = measure_step(steps, variant.settings.repeats, count=not setting.compile)
    numbers = cost.numbers(check.matrix_rate(variant.dtype))
    if setting.compile:
        numbers["gflop"] = check.flop.get(key, float("nan")) / 1e9
        numbers["matrix_share"] = check.flop.get(key, float("nan")) / cost.seconds / check.matrix_rate(variant.dtype)
    elif not checkpointing:  # which computes activations twice
        check.flop[key] = cost.flop
    return {**numbers, **extra, "batch": float(cost.scans), "checkpointing": float(checkpointing)}


@contextmanager
def record_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count the waits of the host for the device, by the innermost line of this package that caused each."""
    found: Counter[str] = Counter()

    def show(message: Warning | str, *details: Any) -> None:
        if str(message).startswith(SYNCHRONISING):
            found[_place(traceback.extract_stack())] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _place(stack: traceback.StackSummary) -> str:
    thread = threading.current_thread()
    inside = "" if thread is threading.main_thread() else f" (thread {thread.name})"
    ours = [frame for frame in stack if frame.filename.startswith(SOURCES) and frame.filename != __file__]
    frame = ours[-1] if ours else stack[0]
    called = next((other for other in reversed(stack) if other.filename != __file__ and other is not frame), frame)
    via = "" if called in ours else f", in {Path(called.filename).name}:{called.lineno} {called.name}"
    return f"{frame.filename.removeprefix(SOURCES)}:{frame.lineno} {frame.name}: {frame.line}{via}{inside}"


def count_waits(steps: Callable[[], None], count: int, device: torch.device) -> Numbers:
    """Waits of the host for the device per step, over `count` steps, and the lines that caused them."""
    with record_waits(device) as found:
        for _ in range(count):
            steps()
    lines = [f"{number / count:g} a step: {place}" for place, number in found.most_common()]
    return {"synchronisations_a_step": sum(found.values()) / count, "steps": float(count), "places": lines}


def measure_waits(check: GpuCheck, setting: Setting) -> Numbers:
    """Waits of the real stage, with the guard that reads the flags of a step one step later."""
    variant = build_variant(check, setting)
    with TrainingSteps(variant, setting.stage) as steps:
        steps.warm_up(WARM_UP)
        progress = Progress(step=steps.number)
        guard = StepGuard(
            variant.accelerator, steps.stage, progress, check.size.watched,
            describe_newest=lambda: "", stop_requested=lambda: False,
        )  # fmt: skip

        def step() -> None:
            steps.number = progress.step
            guard.run_step(steps.fetch())
            progress.step += 1

        step()
        return count_waits(step, check.size.watched, steps.device)


def _is_kernel(event: Any) -> bool:
    """Whether the event is a kernel. Named ranges, such as an optimiser's step, contain kernels already counted."""
    return str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)


def profile_steps(check: GpuCheck, setting: Setting) -> Numbers:
    """The kernels that take the most time, and the share in which the GPU is idle; the long table goes to a file."""
    variant = build_variant(check, setting)
    on_gpu = variant.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with TrainingSteps(variant, setting.stage) as steps:
        steps.warm_up(WARM_UP)

        def some() -> None:
            for _ in range(PROFILED):
                steps()

        plain = measure_seconds(some, steps.device)  # the profiler slows the host
        with profile(activities=activities) as profiler:
            measure_seconds(some, steps.device)
    averages = profiler.key_averages()
    kernels = [event for event in averages if _is_kernel(event)] if on_gpu else list(averages)

    def spent(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    kernels.sort(key=spent, reverse=True)
    total = sum(spent(event) for event in kernels) or float("nan")
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path = check.out / f"profile_{setting.stage}.txt"
    path.write_text(averages.table(sort_by=order, row_limit=4 * KERNELS, max_name_column_width=100), encoding="utf-8")
    lines = [
        f"{spent(event) / 1e3 / PROFILED:.2f} ms a step, {spent(event) / total:.0%}, {event.count // PROFILED} calls: "
        f"`{event.key[:110]}`"
        for event in kernels[:KERNELS]
    ]
    host = sum(e.self_cpu_time_total for e in averages if "Synchronize" not in e.key) / 1e3 / PROFILED
    numbers = {"ms": 1e3 * plain / PROFILED, "kernel_ms": total / 1e3 / PROFILED, "host_ms": host}
    return {**numbers, "idle_share": max(0.0, 1 - total / 1e6 / plain), "kernels": lines, "file": path.name}
