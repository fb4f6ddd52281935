"""What each CPU kernel saves: `python -m ldae.bench.cpu_kernels [overrides]`.

Training steps and the uses of a model are timed with a kernel and without it, in turn and in one process, while all
other kernels are in use. The shortest time of many counts, in seconds of the process's cores, so that a busy machine
changes little. Writes runs/bench_cpu_kernels/cpu_kernels.json, flat names to numbers, and logs a table.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from monai.networks.blocks import UpSample
from omegaconf import DictConfig
from torch import nn

from ldae.bench.settings import Bench
from ldae.bench.steps import TrainingSteps
from ldae.bench.variant import VariantUnderTest
from ldae.config import conf_dir, register
from ldae.models.cpu_kernels import CpuSemanticEncoder, CpuUpSample, SmallVolumeConv3d
from ldae.models.placement import remove_kernels, use_kernels
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.utils.entrypoint import one_line_errors
from ldae.utils.files import write_json

log = logging.getLogger(__name__)
register()


class ProjectsAllTokens(CpuSemanticEncoder):
    """The encoder without the kernel of its attention."""

    attend = SemanticEncoder.attend


class ReadsAllSlices(CpuSemanticEncoder):
    """The encoder without the kernel that reads blank slices once."""

    read_slices = SemanticEncoder.read_slices


# Name of a kernel -> its class and the class that computes the same without it.
WITHOUT: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "small volume convolution": {SmallVolumeConv3d: nn.Conv3d},
    "fused upsampling": {CpuUpSample: UpSample},
    "attention of one query": {CpuSemanticEncoder: ProjectsAllTokens},
    "blank slices once": {CpuSemanticEncoder: ReadsAllSlices},
}
Call = Callable[[], object]


def compare_kernel(
    modules: Sequence[nn.Module], without: dict[type[nn.Module], type[nn.Module]], work: Call, repeats: int
) -> tuple[float, float]:
    """Shortest time of `work` with a kernel and without it, in seconds of this process's cores.

    Args:
        modules: the networks that `work` uses.
        without: an entry of WITHOUT.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * repeats):
        for module in modules if number else ():
            (use_kernels if number % 2 else remove_kernels)(module, without)
        start = time.process_time()
        work()
        times[number % 2].append(time.process_time() - start)
    for module in modules:
        remove_kernels(module, without)
    return min(times[0]), min(times[1])


def list_tasks(variant: VariantUnderTest) -> Iterator[tuple[str, list[nn.Module], Call]]:
    """Name, networks and call of each training step and each use of a model in the setting `tasks`."""
    tasks = variant.settings.tasks
    for name in (task.removeprefix("train_") for task in tasks if task.startswith("train_")):
        with TrainingSteps(variant, name) as steps:
            steps.warm_up(2)
            stage = steps.stage
            networks = [*stage.modules.values(), *(v for v in vars(stage).values() if isinstance(v, nn.Module))]
            yield f"train_{name}", networks, steps
            steps.check()
    model, count = variant.model(), variant.settings.timed_steps
    networks = [model.autoencoder, model.encoder, model.denoiser.unet, model.denoiser.estimator]
    x = torch.from_numpy(variant.scan)[None, None]
    z, y = model.compress(x), model.embed(x)
    calls: dict[str, Call] = {
        "encode": lambda: model.compress(x),
        "embed": lambda: model.embed(x),
        "sample": lambda: model.generate(z, y, steps=count),
        "decode": lambda: model.decompress(z),
    }
    for name in (task for task in tasks if task in calls):
        yield name, networks, calls[name]


def compare_kernels(config: DictConfig, compose: Callable[[Sequence[str]], DictConfig]) -> dict[str, float]:
    """Times by `<variant>/<task>/<kernel>/ms` and `.../without_ms`, and the share that is saved, `.../saved`."""
    settings: Bench = instantiate(config.bench)
    numbers: dict[str, float] = {"machine/threads": float(torch.get_num_threads())}
    for name, overrides in settings.variants.items():
        with tempfile.TemporaryDirectory(prefix="ldae-bench-") as folder:
            variant = VariantUnderTest(compose, overrides, Path(folder))
            for task, networks, work in list_tasks(variant):
                for kernel, without in WITHOUT.items():
                    found, plain = compare_kernel(networks, without, work, variant.settings.repeats)
                    prefix, saved = f"{name}/{task}/{kernel}", 1 - found / plain
                    numbers |= {f"{prefix}/ms": 1e3 * found, f"{prefix}/without_ms": 1e3 * plain}
                    numbers[f"{prefix}/saved"] = saved
                    log.info(
                        "%-6s %-14s %-25s %8.1f ms, without %8.1f ms: %5.1f %% saved",
                        name, task, kernel, 1e3 * found, 1e3 * plain, 100 * saved,
                    )  # fmt: skip
    write_json(Path(settings.output) / "cpu_kernels.json", numbers)
    return numbers


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="bench")
def main(config: DictConfig) -> None:
    with one_line_errors():
        from hydra import compose
        from hydra.core.hydra_config import HydraConfig

        given = list(HydraConfig.get().overrides.task)
        compare_kernels(config, lambda more: compose("bench", [*given, *more]))


if __name__ == "__main__":
    sys.argv.insert(1, "bench=cpu_kernels")
    main()
