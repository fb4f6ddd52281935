"""Shared fixtures."""

import os

# Small tensors: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")
