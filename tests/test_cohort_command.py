"""Proves that `ldae cohort` refuses what cannot be evaluated before it makes anything, chooses what can be evaluated,
and is called by the Makefile's targets. (test_chain.py runs it.)"""

import math
import subprocess
from pathlib import Path

import pytest

from ldae.commands.cohort_targets import Target, choose_classes, choose_targets
from ldae.preprocessing.participants import Participant
from ldae.utils.errors import UserError
from small_cohort import WITHOUT_ANTS, dataset, run

ROOT = Path(__file__).parents[1]


def person(age=math.nan, sex="", diagnosis=""):
    return Participant(0, diagnosis, age, sex)


def test_targets_are_those_with_enough_labels():
    subjects = [f"s{i}" for i in range(40)]
    people = [person(50.0 + i, "FM"[i % 2], ("CN", "AD", "MCI")[i % 3]) for i in range(40)]
    assert choose_targets(subjects, people, "x") == [Target("age"), Target("sex"), Target("diagnosis", ("CN", "AD"))]
    assert choose_targets(subjects, [person(sex="FM"[i % 2]) for i in range(40)], "x") == [Target("sex")]
    with pytest.raises(UserError, match="nothing to evaluate"):
        choose_targets(subjects, [person()] * 40, "x")
    with pytest.raises(UserError, match="2 subjects"):
        choose_targets(["a", "b"] * 20, people, "x")


def test_the_healthy_are_the_negative_class():
    assert choose_classes(["patient"] * 9 + ["control"] * 6) == ("control", "patient")
    assert choose_classes(["B"] * 9 + ["A"] * 6 + [""] * 20) == ("B", "A")
    assert choose_classes(["CN"] * 9 + ["AD"] * 4) is None
    overrides = Target("diagnosis", ("CN", "it's AD")).overrides()
    assert overrides == ["probe.diagnosis.negative='CN'", "probe.diagnosis.positive='it\\'s AD'"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "--name", "mine"], "nowhere"),
        (["few", "--name", "mine", *WITHOUT_ANTS], "3 subjects"),
        (["few", "--name", "demo", *WITHOUT_ANTS], "--name demo"),
        (["few", "--name", "a/b", *WITHOUT_ANTS], "--name a/b"),
        (["few", "--name", "mine", "--labels", "nothing", *WITHOUT_ANTS], "nothing"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(tmp_path, caplog, arguments, says):
    dataset(tmp_path / "few", 3)
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert says in caplog.text + result.output
    assert {path.name for path in tmp_path.iterdir()} == {"few"}


@pytest.mark.parametrize("wrong", ["trainer.max_stepz=3", "--experiment=unknown"])
def test_a_mistyped_override_is_refused_before_anything_is_made(tmp_path, caplog, wrong):
    dataset(tmp_path / "raw")
    result = run(tmp_path, "raw", "--name", "mine", *WITHOUT_ANTS, wrong)
    assert result.exit_code == 2
    assert wrong.split("=")[0].split(".")[-1].strip("-") in caplog.text + result.output
    assert {path.name for path in tmp_path.iterdir()} == {"raw"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ixi"], "DATA="),
        (["ixi", "DATA=nowhere"], "nowhere"),
        (["cohort", "DATA=."], "NAME="),
    ],
)
def test_make_refuses_what_is_missing_before_anything_is_made(arguments, says):
    result = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_make_calls_the_command(tmp_path):
    result = subprocess.run(
        ["make", "-n", "cohort", f"DATA={tmp_path}", "NAME=mine", "ARGS=--start none"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f'ldae cohort "{tmp_path}" --name "mine" --start none' in result.stdout
