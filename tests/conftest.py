"""Shared fixtures."""

import os

# Two workers on two cores: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")
os.environ.setdefault("MPLBACKEND", "Agg")  # before any process imports matplotlib

from pathlib import Path

import pytest

from faults.scripts import run_script

# The slowest files begin first, so that no worker is left with one of them at the end.
SLOWEST = (
    "test_chain",
    "test_distributed",
    "test_rehearsal",
    "test_gpu_check",
    "test_official",
    "test_faults",
    "test_cross_validation",
    "test_preprocessing_scans",
    "test_bench",
)


def pytest_collection_modifyitems(items):
    """The order in which workers take files (`--dist loadfile --no-loadscope-reorder`)."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A folder in which the whole smoke experiment has run through the real scripts."""
    folder = tmp_path_factory.mktemp("smoke")
    run_script("train", "experiment=smoke", "stage=aekl", cwd=folder)
    run_script("encode_latents", "experiment=smoke", cwd=folder)
    run_script("train", "experiment=smoke", "stage=pretrain", cwd=folder)
    run_script("train", "experiment=smoke", "stage=repr", cwd=folder)
    run_script("evaluate", "experiment=smoke", cwd=folder)
    return folder
