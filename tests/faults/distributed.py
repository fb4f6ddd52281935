"""Several processes do what one does: 2 with batch b train as 1 with batch 2 b, and 1, 2 and 3 give the same tables."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from . import work

TOLERANCE = 1e-5
WITHOUT_EFFECT = ("encoder/score.bias", "encoder/key.bias", "encoder/value.bias")
# No dropout, whose masks belong to a process: stage 3 takes the U-Net's from stage 2, if the estimator has none of its
# own. A discriminator whose norm does not see the batch. The learning rate is the usual one.
EQUAL = (
    "model.unet.dropout=0", "+model.estimator.dropout=0", "model.discriminator.norm=INSTANCE", "trainer.accumulate=2",
    "trainer.ema=0.9",
)  # fmt: skip


def distance(run: Path, other: Path) -> float:
    """The larger of two relative differences: of all weights and averages together, and of any step's loss.

    Not of single weights: Adam turns the rounding of a gradient that should be 0 into a step of full size.
    """
    states = [sorted((path / "state").glob("*.safetensors"))[-1] for path in (run, other)]
    mine, theirs = (_effective(load_file(path)) for path in states)
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    whole = sum(float(theirs[name].square().sum()) for name in theirs)
    losses = zip(*(_losses(path) for path in (run, other)), strict=True)
    return max((apart / whole) ** 0.5, *(abs(a - b) / abs(b) for a, b in losses))


def _effective(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and averages of a state, in float64, without those that no output depends on.

    A softmax over slices does not see what is added to all scores or keys; and y, a difference of two means of values
    whose weights sum to 1, not what is added to all values. The gradient of these four biases is rounding alone, and
    Adam makes steps of the learning rate of it: in stage 3 nine tenths of the squared difference lie there.
    """
    kept = {}
    for name, tensor in state.items():
        if not name.startswith(("modules/", "averages/")) or name.endswith(WITHOUT_EFFECT):
            continue
        if name.endswith("cross_attention.in_proj_bias"):
            tensor = tensor[: len(tensor) // 3]  # queries, keys, values
        if tensor.is_floating_point():
            kept[name] = tensor.double()
    return kept


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def as_one(folder: Path, steps: int, stages: tuple[str, ...] = work.STAGES) -> dict[str, float]:
    """Train each of `stages` for `steps` in 1 and in 2 processes on `folder`/whole; the relative distances."""
    found = {}
    for stage in stages:
        runs = []
        for count in (1, 2):
            place = folder / f"{stage}-{count}"
            data = work.copied(folder / "whole", place, stage)
            more = (*EQUAL, data, f"trainer.max_steps={steps}", f"trainer.batch_size={2 // count}")
            work.together("train", work.overrides(stage, *more), place, count)
            runs.append(place / "runs/smoke" / stage)
        found[f"{stage}: 2 processes against 1"] = distance(runs[1], runs[0])
        assert found[f"{stage}: 2 processes against 1"] <= TOLERANCE, found
    return found


def same_tables(folder: Path) -> dict[str, int]:
    """Encode and evaluate `folder`/whole in 1, 2 and 3 processes; how many files were the same to the bit in all.

    Batches of 2 and processes that do not divide their number: shares of different lengths.
    """
    contents = []
    for count in (1, 2, 3):
        place = folder / f"together-{count}"
        data = work.copied(folder / "whole", place, "latents", "evaluation")
        arguments = [text for text in work.SETTINGS if not text.startswith("stage.")]
        arguments += [data, "trainer.batch_size=2", "evaluation=attention"]
        for script in ("encode_latents", "evaluate"):
            work.together(script, arguments, place, count)
        found = [place / "runs/smoke" / name for name in ("latents", "evaluation")]
        files = [path for at in found for end in ("safetensors", "csv", "json") for path in sorted(at.glob(f"*.{end}"))]
        contents.append({str(path.relative_to(place)): path.read_bytes() for path in files})
    assert contents[0] == contents[1] == contents[2], "1, 2 and 3 processes encode or evaluate differently"
    assert any(name.endswith("evaluation/embeddings.csv") for name in contents[0])
    return {"files of encode_latents.py and evaluate.py, the same from 1, 2 and 3 processes": len(contents[0])}
