"""A task of bench=gpu for one variant, beside the straight port's, which was measured before it on the same machine."""

from hydra.utils import instantiate

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.bench.run import measure_variant
from ldae.bench.settings import Bench
from ldae.utils.files import read_json

SHOWN = ("ms", "gflop", "matrix_share", "peak_mb", "wait_share")
YARDSTICK = "straight"


def measure_speedup(check: GpuCheck, task: str, variant: str) -> Numbers:
    """By name of what the task measures: its figures, and how many times faster than the straight port it is."""
    composed = check.bench()
    settings: Bench = instantiate(composed([]).bench)
    overrides = [*settings.variants[variant], f"bench.tasks=[{task}]"]
    costs, rate = measure_variant(composed, variant, overrides, check.scratch / "bench" / variant)
    before = {} if variant == YARDSTICK else _yardstick(check, task)
    found: dict[str, dict[str, float]] = {}
    for name, cost in costs.items():
        numbers = cost.numbers(rate)
        found[name] = {key: numbers[key] for key in SHOWN}
        if name in before:
            found[name]["times_faster"] = before[name]["ms"] / numbers["ms"]
    return found


def _yardstick(check: GpuCheck, task: str) -> dict[str, dict[str, float]]:
    """What this or an earlier call measured of the straight port."""
    path = check.out / "bench.json"
    return read_json(path).get(f"{YARDSTICK} {task}", {}).get("numbers", {}) if path.exists() else {}
