"""Proves `make gpu-check` without a GPU: every kind of measurement gives its numbers at smoke size, results are written
one by one and survive failures, the budget is kept, and waits and differences are found where they are.
"""

import json
import threading
import time
import warnings

import pytest
import torch

from ldae.bench.gpu_check import parts as parts_module
from ldae.bench.gpu_check import run as run_module
from ldae.bench.gpu_check.__main__ import main
from ldae.bench.gpu_check.chain import count_skipped, read_records, relative_differences
from ldae.bench.gpu_check.check import FULL, SMOKE, GpuCheck
from ldae.bench.gpu_check.items import Item, run_item
from ldae.bench.gpu_check.parts import PARTS
from ldae.bench.gpu_check.run import choose_items, run_check
from ldae.bench.gpu_check.training import count_waits
from ldae.utils.errors import UserError

CPU = torch.device("cpu")


def read(out, part):
    return json.loads((out / f"{part}.json").read_text())


def test_every_kind_of_part_measures_something_at_smoke_size(tmp_path):
    """One measurement of each kind, by the command line; the chain on a CPU equals the reference bit for bit."""
    wanted = [
        "device", "chain/fp32", "steps/base_repr", "syncs/small_pretrain", "bench/*train_pretrain",
        "profile/base_pretrain",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(["--size", "smoke", "--out", str(tmp_path), "--parts", ",".join(wanted), "--budget", "600"])
    assert left.value.code == 0, (tmp_path / "gpu_check.md").read_text()
    assert read(tmp_path, "device")["matrix products"]["numbers"]["float32_tflops"] > 0
    chain = read(tmp_path, "chain")["fp32"]["numbers"]
    assert chain["verdict"] == "passed"
    assert chain["worst"] == 0
    assert {f"{stage}_loss" for stage in ("aekl", "pretrain", "repr")} | {"repr_val", "latents"} <= chain.keys()
    steps = read(tmp_path, "steps")["base_repr"]["numbers"]
    assert min(steps[name] for name in ("ms", "gflop", "matrix_share", "batch")) > 0
    assert 0 <= steps["wait_share"] < 1
    assert read(tmp_path, "syncs")["small_pretrain"]["numbers"]["steps"] == SMOKE.watched
    bench = read(tmp_path, "bench")
    names = ("straight", "evaluations")
    straight, ours = (bench[f"{name} train_pretrain"]["numbers"]["train_pretrain"] for name in names)
    assert ours["times_faster"] == pytest.approx(straight["ms"] / ours["ms"])
    profiled = read(tmp_path, "profile")["base_pretrain"]["numbers"]
    assert len(profiled["kernels"]) == 10
    assert "convolution" in (tmp_path / profiled["file"]).read_text()
    table = (tmp_path / "gpu_check.md").read_text()
    for text in ("torch: ", "date: ", "## chain", "evaluations train_pretrain", profiled["kernels"][0]):
        assert text in table


def fake(monkeypatch, **items):
    """Replace PARTS by one part, 'made_up', with these functions."""
    chosen = {"made_up": [Item(name, seconds, work) for name, (seconds, work) in items.items()]}
    monkeypatch.setattr(parts_module, "PARTS", chosen)
    monkeypatch.setattr(run_module, "PARTS", chosen)


def fail(check):
    raise ValueError("the deepest reason")


def test_a_failed_measurement_is_reported_and_the_others_continue(tmp_path, monkeypatch):
    seen = []

    def last(check):
        seen.append(read(tmp_path, "made_up"))  # what came before is on disk already
        return {"ms": 2.0, "places": ["here.py:1"]}

    fake(monkeypatch, first=(1, lambda check: {"ms": 1.5}), bad=(1, fail), last=(1, last))
    assert run_check(FULL, ["made_up"], tmp_path, budget=60) == 1
    assert seen[0]["first"]["numbers"] == {"ms": 1.5}
    assert "the deepest reason" in seen[0]["bad"]["reason"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert "bad (failed)" in table
    assert "- here.py:1" in table


def test_a_measurement_beyond_the_budget_is_skipped_and_an_earlier_result_of_it_stays(tmp_path, monkeypatch):
    fake(monkeypatch, cheap=(1, lambda check: {"ms": 1.0}), dear=(1000, lambda check: {"ms": 2.0}))
    assert run_check(FULL, ["made_up"], tmp_path, budget=30) == 0
    found = read(tmp_path, "made_up")
    assert found["cheap"]["state"] == "done"
    assert found["dear"]["state"] == "skipped"
    assert "1000 s" in found["dear"]["reason"]
    run_check(FULL, ["made_up/dear"], tmp_path, budget=2000)
    run_check(FULL, ["made_up/dear"], tmp_path, budget=30)
    found = read(tmp_path, "made_up")
    assert found["dear"]["numbers"] == {"ms": 2.0}
    assert found["cheap"]["numbers"] == {"ms": 1.0}


def test_the_budget_ends_a_measurement_that_takes_longer_than_estimated(tmp_path):
    def sleep(check):
        try:
            time.sleep(30)
        except Exception:  # noqa: BLE001 - as a compiler does, which wraps all exceptions
            pytest.fail("the end of the budget was caught as an Exception")
        return {}

    start = time.monotonic()
    outcome = run_item(Item("long", 0.0, sleep), GpuCheck(FULL, tmp_path, tmp_path, budget=0.3))
    assert outcome.state == "skipped"
    assert time.monotonic() - start < 10


def test_parts_are_chosen_by_name_and_order():
    assert [item.name for _, item in choose_items(["chain_more", "chain/fp32"])] == ["fp16", "compiled", "fp32"]
    assert {part for part, _ in choose_items(list(PARTS))} == set(PARTS)
    with pytest.raises(UserError, match="nosuch"):
        choose_items(["nosuch"])


def test_a_wait_for_the_device_is_counted_with_the_line_that_caused_it():
    """Warnings as PyTorch gives them with set_sync_debug_mode("warn"), in any thread."""

    def read_back():
        warnings.warn("called a synchronizing CUDA operation (function of torch)", stacklevel=1)

    def step():
        warnings.warn("something else", stacklevel=1)
        read_back()
        thread = threading.Thread(target=read_back, name="reader")
        thread.start()
        thread.join()

    found = count_waits(step, 3, CPU)
    assert found["synchronisations_a_step"] == 2
    assert any("thread reader" in place for place in found["places"])
    assert all(place.startswith("1 a step") for place in found["places"])


def chain_run(root, loss, skipped=None):
    for stage in ("aekl", "pretrain", "repr"):
        (root / stage).mkdir(parents=True)
        lines = [{"step": 1, "train/loss": 1.0, "train/gradient_norm": 5.0}, {"step": 2, "train/loss": loss}]
        lines += [{"step": 2, "val/l1": 0.5}] + ([{"step": 2, "train/skipped": skipped}] if skipped else [])
        (root / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_records(root)


def test_chains_are_compared_by_their_largest_relative_difference(tmp_path):
    reference, other = chain_run(tmp_path / "a", 2.0), chain_run(tmp_path / "b", 2.2, skipped=1)
    assert relative_differences(reference, reference) == dict.fromkeys(relative_differences(reference, reference), 0.0)
    found = relative_differences(reference, other)
    assert found["repr_loss"] == pytest.approx(0.1)
    assert found["repr_val"] == 0
    assert count_skipped(other) == {"skipped": 3, "overflowed": 0}
    del other["aekl", 2, "train/loss"]
    assert relative_differences(reference, other)["aekl_loss"] == float("inf")
    other["aekl", 2, "train/overflowed"] = 1.0
    assert relative_differences(reference, other)["aekl_loss"] == 0
