"""Compares several processes with one: 2 with batch size b train as 1 with 2 b; 1, 2 and 3 write the same outputs."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from . import small_chain

TOLERANCE = 1e-5  # largest relative distance that rounding explains
WITHOUT_EFFECT = ("encoder/score.bias", "encoder/key.bias", "encoder/value.bias")
# Settings under which the number of processes changes rounding only. Dropout is off, because each process draws its own
# masks (stage 3 inherits the U-Net's rate unless the estimator has its own), and the discriminator's norm does not
# depend on the batch. The learning rate is the usual one.
EQUAL = (
    "model.unet.dropout=0", "+model.estimator.dropout=0", "model.encoder.slice_dropout=0",
    "model.discriminator.norm=INSTANCE", "trainer.accumulate=2", "trainer.ema=0.9",
)  # fmt: skip
OUTPUTS = ("safetensors", "csv", "json")


def relative_distance(run: Path, other: Path) -> float:
    """Largest of three relative differences between two runs: trained state, published weights, and losses.

    Weights are compared as one vector, not one by one: Adam turns the rounding of a gradient that should be 0 into a
    step of full size.
    """
    distances = [_distance(load(run), load(other)) for load in (_load_state, _load_published)]
    losses = zip(_read_losses(run), _read_losses(other), strict=True)
    return max(*distances, *(abs(a - b) / abs(b) for a, b in losses))


def _distance(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    mine, theirs = _keep_effective(mine), _keep_effective(theirs)
    assert mine.keys() == theirs.keys()
    squares = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    return (squares / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5


def _load_state(run: Path) -> dict[str, Tensor]:
    """Weights and their moving averages in the newest checkpoint."""
    tensors = load_file(max((run / "state").glob("*.safetensors")))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("modules/", "averages/"))}


def _load_published(run: Path) -> dict[str, Tensor]:
    """Weights that later stages and users read."""
    files = sorted((run / "weights").glob("*.safetensors"))
    return {f"{path.stem}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def _keep_effective(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in float64, without the four biases that no output depends on.

    A softmax over slices is unchanged by what is added to all scores or to all keys. y is the difference of two means
    of values, each with weights that sum to 1, so it is unchanged by what is added to all values. The gradients of
    these biases are rounding alone, and Adam turns them into steps of the learning rate: in stage 3 they make up nine
    tenths of the squared distance.
    """
    kept = {}
    for name, tensor in tensors.items():
        if name.endswith(WITHOUT_EFFECT):
            continue
        if name.endswith("cross_attention.in_proj_bias"):
            tensor = tensor[: len(tensor) // 3]  # the biases of queries; those of keys and values follow
        if tensor.is_floating_point():
            kept[name] = tensor.double()
    return kept


def _read_losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def training_settings(steps: int, processes: int) -> tuple[str, ...]:
    """Overrides for a training of `steps` optimiser steps, the same for any number of processes that divides 2."""
    return (*EQUAL, f"trainer.max_steps={steps}", f"trainer.batch_size={2 // processes}")


def compare_training(one: Path, folder: Path, stage: str, steps: int) -> float:
    """Train `stage` in 2 processes, in `folder`, after the earlier stages of `one`; return the distance between both.

    Args:
        one: folder in which 1 process has trained this stage for `steps` steps with `training_settings`.
    """
    data = small_chain.copy_runs(one, folder, stage)
    overrides = small_chain.train_overrides(stage, data, *training_settings(steps, 2))
    small_chain.run_distributed("train", overrides, folder, 2)
    return relative_distance(folder / "runs/smoke" / stage, one / "runs/smoke" / stage)


def write_outputs(trained: Path, folder: Path, processes: int) -> dict[str, bytes]:
    """Run encode_latents.py and evaluate.py on the cohort of `trained` in some processes; contents of files by name.

    The batch size is 2, so that the shares of 2 or 3 processes have different lengths.
    """
    data = small_chain.copy_runs(trained, folder, "latents", "evaluation")
    overrides = [*small_chain.SETTINGS, data, "trainer.batch_size=2", "evaluation=attention"]
    for script in ("encode_latents", "evaluate"):
        small_chain.run_distributed(script, overrides, folder, processes)
    run = folder / "runs/smoke"
    files = [path for at in ("latents", "evaluation") for end in OUTPUTS for path in (run / at).glob(f"*.{end}")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def compare_outputs(trained: Path, folder: Path, counts: tuple[int, ...]) -> None:
    """Write the outputs in each number of processes, and check that all files have the same content.

    Raises:
        AssertionError: a file differs, or latents, embeddings or metrics are missing.
    """
    first, *others = (write_outputs(trained, folder / f"outputs-{count}", count) for count in counts)
    expected = {
        "latents/latents.json",
        "latents/latents.safetensors",
        "evaluation/embeddings.csv",
        "evaluation/metrics.json",
    }
    assert expected <= first.keys(), sorted(first)
    for count, other in zip(counts[1:], others, strict=True):
        assert other.keys() == first.keys(), f"{counts[0]} and {count} processes write different files"
        different = [name for name in other if other[name] != first[name]]
        assert not different, f"{counts[0]} and {count} processes differ in {different}"
