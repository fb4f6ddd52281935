"""A task of bench=gpu for one variant, compared with the straight port as measured before on the same machine."""

from hydra.utils import instantiate

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.bench.run import measure_variant
from ldae.bench.settings import Bench
from ldae.utils.files import read_json

SHOWN = ("ms", "gflop", "matrix_share", "peak_mb", "wait_share")
STRAIGHT_PORT = "straight"


def measure_speedup(check: GpuCheck, task: str, variant: str) -> Numbers:
    """Numbers of each measurement of the task, with `times_faster` over the straight port."""
    composed = check.bench()
    settings: Bench = instantiate(composed([]).bench)
    overrides = [*settings.variants[variant], f"bench.tasks=[{task}]"]
    costs, rate = measure_variant(composed, variant, overrides, check.scratch / "bench" / variant)
    before = {} if variant == STRAIGHT_PORT else _straight_port(check, task)
    found: dict[str, dict[str, float]] = {}
    for name, cost in costs.items():
        numbers = cost.numbers(rate)
        found[name] = {key: numbers[key] for key in SHOWN}
        if name in before:
            found[name]["times_faster"] = before[name]["ms"] / numbers["ms"]
    return found


def _straight_port(check: GpuCheck, task: str) -> dict[str, dict[str, float]]:
    """Numbers of the straight port from this or an earlier call."""
    path = check.out / "bench.json"
    return read_json(path).get(f"{STRAIGHT_PORT} {task}", {}).get("numbers", {}) if path.exists() else {}
