"""Shared fixtures."""

import os

# Two workers on two cores: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str, *overrides: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run one of the three scripts as a user would."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *overrides]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    if check and result.returncode != 0:
        raise AssertionError(f"{name} {overrides} exited with {result.returncode}:\n{result.stderr[-4000:]}")
    return result


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A folder in which the whole smoke experiment has run through the real scripts."""
    folder = tmp_path_factory.mktemp("smoke")
    script("train", "experiment=smoke", "stage=aekl", cwd=folder)
    script("encode_latents", "experiment=smoke", cwd=folder)
    script("train", "experiment=smoke", "stage=pretrain", cwd=folder)
    script("train", "experiment=smoke", "stage=repr", cwd=folder)
    script("evaluate", "experiment=smoke", cwd=folder)
    return folder
