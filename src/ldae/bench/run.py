"""The bench: measures all variants one after the other in one process and writes bench.json."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from ldae.bench.measure import Cost, measure_matrix_rate
from ldae.bench.memory import compute_footprint
from ldae.bench.results import compare_with_earlier, format_table, to_flat_numbers
from ldae.bench.settings import Bench, MemoryCase
from ldae.bench.tasks import TASKS, run_tasks
from ldae.bench.variant import VariantUnderTest
from ldae.bench.voxels import compare_spaces
from ldae.config import check_constructor_arguments
from ldae.utils.errors import UserError
from ldae.utils.files import write_json

log = logging.getLogger(__name__)
Compose = Callable[[Sequence[str]], DictConfig]


def run_bench(config: DictConfig, compose: Compose) -> dict[str, float]:
    """Measure, write bench.json and log the table.

    Args:
        compose: further overrides to a config with them.

    Returns:
        The numbers of bench.json.

    Raises:
        UserError: there is no such task, or the file to compare with is not a bench.json.
    """
    check_constructor_arguments(config)
    settings: Bench = instantiate(config.bench)
    for name in settings.tasks:
        if name not in TASKS:
            raise UserError(f"bench.tasks: there is no {name!r}; choose from {', '.join(TASKS)}")
    partial = Path(settings.output) / "partial.json"
    costs: dict[str, dict[str, Cost]] = {}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="ldae-bench-") as folder:
        for variant, overrides in settings.variants.items():
            costs[variant], rates[variant] = measure_variant(compose, variant, overrides, Path(folder) / variant)
            write_json(
                partial, to_flat_numbers(costs, rates)
            )  # so that a later failure does not lose an hour's measurements
        voxels = compare_spaces(compose, settings.voxels, Path(folder) / "voxels") if settings.voxels else {}
    numbers = to_flat_numbers(costs, rates) | voxels
    for name, case in settings.memory.items():
        numbers |= compute_memory(compose, name, case)
    write_report(numbers, settings, list(costs))
    partial.unlink(missing_ok=True)
    return numbers


def measure_variant(
    compose: Compose, name: str, overrides: Sequence[str], folder: Path
) -> tuple[dict[str, Cost], float]:
    """Costs by task of the variant `name`, and the rate of matrix products, in FLOP/s, that the machine reaches."""
    folder.mkdir(parents=True, exist_ok=True)
    variant = VariantUnderTest(compose, overrides, folder)
    edge = variant.settings.matrix
    rates = [measure_matrix_rate(edge, variant.device, variant.dtype)]
    costs = {}
    for task, cost in run_tasks(variant):
        costs[task] = cost
        log.info("%s %s: %.1f ms", name, task, 1e3 * cost.seconds)
    # The machine may be busier at one end than at the other: the better of the two rates counts.
    rates.append(measure_matrix_rate(edge, variant.device, variant.dtype))
    return costs, max(rates)


def compute_memory(compose: Compose, name: str, case: MemoryCase) -> dict[str, float]:
    """GB of a training step with checkpointing in 16 bits, and the peak of one in float32 without checkpointing."""
    config = compose(case.overrides)
    ema = case.stage != "aekl"
    lean, plain = (compute_footprint(config, case.stage, case.batch, lean, lean, ema) for lean in (True, False))
    found = {f"memory/{name}/{key}": value for key, value in lean.numbers(case.gigabytes).items()}
    found[f"memory/{name}/peak_plain"] = plain.peak / 2**30
    log.info(
        "%s, batch %d: %.1f GB of %g with checkpointing in 16 bits, %.1f GB in float32 without",
        name, case.batch, lean.peak / 2**30, case.gigabytes, plain.peak / 2**30,
    )  # fmt: skip
    return found


def write_report(numbers: dict[str, float], settings: Bench, variants: list[str]) -> None:
    """Write bench.json; log the table and, if `settings.against` is given, the comparison with an earlier run."""
    numbers["machine/threads"] = float(torch.get_num_threads())
    numbers["machine/cuda"] = float(torch.cuda.is_available())
    path = Path(settings.output) / "bench.json"
    tasks = list(dict.fromkeys(name.split("/")[-2] for name in numbers if name.endswith("/ms")))
    log.info("\n%s\n\n%s", format_table(numbers, variants, tasks), path)
    if settings.against is not None:
        lines, slower = compare_with_earlier(numbers, settings.against, settings.tolerance)
        log.info("\n%s\n%s", lines, f"slower than {settings.against}: {', '.join(slower) or 'nothing'}")
    write_json(path, numbers)
