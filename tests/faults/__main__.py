"""`python -m tests.faults --kills 50 --checkpoints 20 --inputs 100`: counts as JSON; stops at the first fault."""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from . import small_chain
from .corruption import count_corrupted_loads
from .distributed import compare_outputs, compare_training
from .input_check import read_mutated
from .kills import kill_and_restart


def main() -> None:
    """Kills over the three stages, then damaged checkpoints, then mutated inputs."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=50, help="kill -9 at random instants, over the three stages")
    parser.add_argument("--checkpoints", type=int, default=20, help="damaged checkpoints")
    parser.add_argument("--inputs", type=int, default=100, help="mutated inputs of each kind and seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many times these")
    parser.add_argument("--steps", type=int, default=20, help="steps in which 2 processes must train as 1; 0: none")
    parser.add_argument("--stages", nargs="+", default=list(small_chain.STAGES), choices=small_chain.STAGES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        found: dict = kill_and_restart(folder, options.kills, tuple(options.stages), options.seed)
        run = folder / "whole/runs/smoke/aekl"
        found |= count_corrupted_loads(run, folder, options.checkpoints, options.seed)
        if options.steps:
            found |= compare_training(folder, options.steps, tuple(options.stages))
        if set(small_chain.STAGES) <= set(options.stages):
            found |= compare_outputs(folder / "whole", folder)
        for seed in range(options.seed, options.seed + options.seeds):
            found[f"inputs, seed {seed}"] = read_mutated(folder / f"inputs{seed}", run, options.inputs, seed)
    found["seconds"] = round(time.monotonic() - begin)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
