"""The smoke chain (three stages and encoding) on the GPU, compared with the CPU's of the same seed, on smooth noise.

Dropout is off, because its draws differ between devices; all other draws are made on the CPU. What remains is rounding,
which a few training steps amplify. The tolerances are relative to the CPU's values.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldae.bench.gpu_check.check import GpuCheck, Numbers

STAGES = ("aekl", "pretrain", "repr")
TOLERANCES = {"fp32": 0.01, "compiled": 0.01, "fp16": 0.05, "bf16": 0.05}
OVERRIDES = {
    "cpu": ["accelerator=cpu"],
    "fp32": ["{auto}"],
    "bf16": ["{bf16}"],
    "fp16": ["{fp16}"],
    "compiled": ["{auto}", "trainer.compile=true"],
}
NO_DROPOUT = (
    "model.unet.dropout=0.0", "model.encoder.dropout=0.0", "model.encoder.slice_dropout=0.0",
)  # fmt: skip
Records = dict[tuple[str, int, str], float]  # (stage, step, name) to value


def make_scans(folder: Path, count: int, shape: Sequence[int], spacing: float) -> Path:
    """Write NIfTIs of blurred noise in a ball, (X, Y, Z), one per subject, and their table, which is returned."""
    import nibabel as nib
    import pandas as pd
    from scipy.ndimage import gaussian_filter

    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    ball = np.square(grid).sum(0) < 0.8
    for number in range(count):
        blurred = gaussian_filter(rng.standard_normal(tuple(shape)), 1.0)
        image = nib.Nifti1Image(
            (ball * (100 + 300 * blurred).clip(1, 999)).astype(np.int16), np.diag([spacing] * 3 + [1])
        )
        nib.save(image, folder / f"{number}.nii.gz")
        about = {"diagnosis": ("CN", "AD")[number % 2], "age": 60 + number}
        rows.append({"subject": f"s{number}", "session": "M000", "path": f"{number}.nii.gz", **about})
    pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
    return folder / "scans.csv"


def run_chain(check: GpuCheck, name: str) -> Path:
    """Train all stages, and encode after the first. Returns the folder of the runs."""
    from ldae.experiment import encode, train

    overrides = [text.format(**{p: check.accelerator(p) for p in ("auto", "bf16", "fp16")}) for text in OVERRIDES[name]]
    given = ["experiment=smoke", *check.size.chain, *NO_DROPOUT, *overrides, f"name={name}"]
    given += [f"paths.{kind}={check.scratch / 'chain' / kind}" for kind in ("runs", "cache")]
    given.append(f"data.table={_table(check)}")
    given += ["trainer.log_every=1", f"trainer.max_steps={check.size.steps}"]
    for stage in STAGES:
        _reset_accelerate()
        train(check.composer("train", f"stage={stage}", *(given if stage == "repr" else _shared(given)))([]))
        if stage == "aekl":
            _reset_accelerate()
            encode(check.composer("encode_latents", *_shared(given))([]))
    return check.scratch / "chain" / "runs" / name


def _table(check: GpuCheck) -> Path:
    folder = check.scratch / "chain" / "data"
    if not (folder / "scans.csv").exists():
        data = check.composer("encode_latents", "experiment=smoke", *_shared(check.size.chain))([]).data
        make_scans(folder, data.phantom.subjects, data.shape, data.spacing)
    return folder / "scans.csv"


def _shared(overrides: Sequence[str]) -> list[str]:
    """Overrides that every script takes: those of `stage` belong to single stages."""
    return [text for text in overrides if not text.startswith("stage.")]


def _reset_accelerate() -> None:
    """Forget the precision of the last training: Accelerate allows one per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def read_records(root: Path) -> Records:
    """All that a run logged, without gradient norms."""
    found: Records = {}
    for stage in STAGES:
        for line in (root / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            step = record.pop("step")
            found |= {(stage, step, name): value for name, value in record.items() if "gradient_norm" not in name}
    return found


def relative_differences(reference: Records, found: Records) -> dict[str, float]:
    """The largest relative difference of the losses, and of the validation metrics, of each stage.

    A missing value counts as an infinite difference, unless float16 overflowed in that step, which then has no loss.
    """
    numbers: dict[str, float] = {}
    for (stage, step, name), value in reference.items():
        kind = "loss" if name == "train/loss" else "val" if name.startswith("val/") else None
        other = found.get((stage, step, name))
        if kind is None or (other is None and kind == "loss" and (stage, step, "train/overflowed") in found):
            continue
        distance = float("inf") if other is None else abs(other - value) / max(abs(value), 1e-3)
        numbers[f"{stage}_{kind}"] = max(numbers.get(f"{stage}_{kind}", 0.0), distance)
    return numbers


def count_skipped(found: Records) -> dict[str, float]:
    """Number of steps of all stages that were skipped, and that overflowed."""
    totals = {}
    for kind in ("skipped", "overflowed"):
        last = {stage: value for (stage, _, name), value in found.items() if name == f"train/{kind}"}
        totals[kind] = float(sum(last.values()))
    return totals


def measure_latent_difference(reference: Path, found: Path) -> float:
    """Root mean square difference of all latents, in standard deviations of the reference's latents."""
    from ldae.data.latents import LatentSet

    one, other = (LatentSet.open(root / "latents").mean.double() for root in (reference, found))
    return float((one - other).square().mean().sqrt() / one.std())


def compare_chain(check: GpuCheck, name: str) -> Numbers:
    """Differences of a chain on the device from the CPU's, and whether they are within the tolerance."""
    reference = check.scratch / "chain" / "runs" / "cpu"
    if not (reference / "repr" / "weights").exists():
        run_chain(check, "cpu")
    root = run_chain(check, name)
    found = read_records(root)
    numbers = relative_differences(read_records(reference), found) | {
        "latents": measure_latent_difference(reference, root)
    }
    tolerance = TOLERANCES[name]
    worst = float(np.max(list(numbers.values())))
    lost = count_skipped(found)
    verdict = "passed" if worst <= tolerance and not lost["skipped"] else "FAILED"
    return {**numbers, **lost, "worst": worst, "tolerance": tolerance, "verdict": verdict}
