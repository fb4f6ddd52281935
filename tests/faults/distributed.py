"""Several processes do what one does: 2 with batch b train as 1 with batch 2 b, and 1, 2 and 3 give the same tables."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from . import small_chain

TOLERANCE = 1e-5
WITHOUT_EFFECT = ("encoder/score.bias", "encoder/key.bias", "encoder/value.bias")
# No dropout, whose masks belong to a process: stage 3 takes the U-Net's from stage 2, if the estimator has none of its
# own. A discriminator whose norm does not see the batch. The learning rate is the usual one.
EQUAL = (
    "model.unet.dropout=0", "+model.estimator.dropout=0", "model.encoder.slice_dropout=0",
    "model.discriminator.norm=INSTANCE", "trainer.accumulate=2", "trainer.ema=0.9",
)  # fmt: skip


def relative_distance(run: Path, other: Path) -> float:
    """The largest of relative differences: of all weights and averages together, of what is published, of any loss.

    Not of single weights: Adam turns the rounding of a gradient that should be 0 into a step of full size.
    """
    found = [_apart(*(_effective(load(path)) for path in (run, other))) for load in (_state, _published)]
    losses = zip(*(_losses(path) for path in (run, other)), strict=True)
    return max(*found, *(abs(a - b) / abs(b) for a, b in losses))


def _apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    return (apart / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5


def _state(run: Path) -> dict[str, Tensor]:
    """Weights and averages of the newest state."""
    whole = load_file(sorted((run / "state").glob("*.safetensors"))[-1])
    return {name: tensor for name, tensor in whole.items() if name.startswith(("modules/", "averages/"))}


def _published(run: Path) -> dict[str, Tensor]:
    """The weights that later stages and users read."""
    files = sorted((run / "weights").glob("*.safetensors"))
    return {f"{path.stem}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def _effective(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, without those that no output depends on.

    A softmax over slices does not see what is added to all scores or keys; and y, a difference of two means of values
    whose weights sum to 1, not what is added to all values. The gradient of these four biases is rounding alone, and
    Adam makes steps of the learning rate of it: in stage 3 nine tenths of the squared difference lie there.
    """
    kept = {}
    for name, tensor in tensors.items():
        if name.endswith(WITHOUT_EFFECT):
            continue
        if name.endswith("cross_attention.in_proj_bias"):
            tensor = tensor[: len(tensor) // 3]  # queries, keys, values
        if tensor.is_floating_point():
            kept[name] = tensor.double()
    return kept


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def training_settings(steps: int, processes: int) -> tuple[str, ...]:
    """Of a training of `steps` that is the same whatever the number of processes."""
    return (*EQUAL, f"trainer.max_steps={steps}", f"trainer.batch_size={2 // processes}")


def compare_training(folder: Path, steps: int, stages: tuple[str, ...] = small_chain.STAGES) -> dict[str, float]:
    """Train each of `stages` for `steps` in 1 process, `folder`/one, and in 2; the relative distances.

    In 2 processes each stage begins from what 1 process has left of the others.
    """
    one = folder / "one"
    small_chain.train_chain(one, stages, *training_settings(steps, 1))
    found = {}
    for stage in stages:
        place = folder / f"{stage}-2"
        data = small_chain.copy_runs(one, place, stage)
        small_chain.run_distributed(
            "train", small_chain.train_overrides(stage, data, *training_settings(steps, 2)), place, 2
        )
        name = f"{stage}: 2 processes against 1"
        found[name] = relative_distance(place / "runs/smoke" / stage, one / "runs/smoke" / stage)
        assert found[name] <= TOLERANCE, found
    return found


def compare_outputs(whole: Path, folder: Path, counts: tuple[int, ...] = (1, 2, 3)) -> dict[str, int]:
    """Encode and evaluate the cohort of `whole` in each number of processes; how many files are the same to the bit.

    Batches of 2 and processes that do not divide their number: shares of different lengths.
    """
    contents = []
    for count in counts:
        place = folder / f"together-{count}"
        data = small_chain.copy_runs(whole, place, "latents", "evaluation")
        arguments = [text for text in small_chain.SETTINGS if not text.startswith("stage.")]
        arguments += [data, "trainer.batch_size=2", "evaluation=attention"]
        for script in ("encode_latents", "evaluate"):
            small_chain.run_distributed(script, arguments, place, count)
        found = [place / "runs/smoke" / name for name in ("latents", "evaluation")]
        files = [path for at in found for end in ("safetensors", "csv", "json") for path in sorted(at.glob(f"*.{end}"))]
        contents.append({str(path.relative_to(place)): path.read_bytes() for path in files})
    for count, other in zip(counts, contents, strict=True):
        assert other.keys() == contents[0].keys(), f"{counts[0]} and {count} processes write other files"
        different = [name for name in other if other[name] != contents[0][name]]
        assert not different, f"{counts[0]} and {count} processes differ in {different}"
    ends = ("latents/latents.json", "evaluation/embeddings.csv", "evaluation/metrics.json")
    assert all(any(name.endswith(end) for name in contents[0]) for end in ends), sorted(contents[0])
    assert any(name.endswith(".safetensors") for name in contents[0]), sorted(contents[0])
    return {f"files of encode_latents.py and evaluate.py, the same from {counts} processes": len(contents[0])}
