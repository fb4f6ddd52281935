"""Four jobs preprocess into one output at once; one of them is killed at a random instant and started again."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from small_datasets import bids, brain

pytestmark = pytest.mark.slow

JOBS, SCANS = 4, 12
OPTIONS = ("--bias", "none", "--brain", "stripped", "--registration", "none", "--spacing", "4", "-j", "1")
TABLES = ("scans.csv", "rejected.csv", "qc.html")


def start(source: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ldae.cli", "preprocess", str(source), str(out), *OPTIONS, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen) -> None:
    """Wait for a job, which must succeed."""
    _, errors = job.communicate()
    assert job.returncode == 0, errors


def test_tables_are_the_same_after_one_of_four_jobs_was_killed(tmp_path: Path, repeats: int | None, seed: int) -> None:
    draw = random.Random(f"shards {seed}")
    raw = bids(tmp_path / "raw", {f"sub-{n:02d}": brain(seed=n) for n in range(SCANS)})
    begin = time.monotonic()
    finish(start(raw, tmp_path / "whole"))
    seconds = time.monotonic() - begin
    for number in range(repeats or 4):
        out = tmp_path / f"out{number}"
        jobs = [start(raw, out, "--shard", f"{index}/{JOBS}") for index in range(1, JOBS + 1)]
        killed = draw.randrange(JOBS)
        time.sleep(draw.uniform(0.3, 2.0) * seconds)  # four jobs share the processors
        jobs[killed].kill()
        for job in jobs[:killed] + jobs[killed + 1 :]:
            finish(job)
        jobs[killed].communicate()
        finish(start(raw, out, "--shard", f"{killed + 1}/{JOBS}"))
        for name in TABLES:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"{out}/{name}"
