"""`python -m ldae.bench [--against EARLIER.json] [bench=full] [overrides]`: speed and memory of each stage and use.

Writes runs/bench/bench.json, names and numbers, and logs a table.
"""

import logging
import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from ldae.config import conf_dir, register
from ldae.utils.entrypoint import one_line_errors, run_script

log = logging.getLogger(__name__)
register()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="bench")
def main(config: DictConfig) -> None:
    with one_line_errors():
        from hydra import compose
        from hydra.core.hydra_config import HydraConfig

        from ldae.bench.run import run_bench

        given = list(HydraConfig.get().overrides.task)

        def compose_with(more: Sequence[str]) -> DictConfig:
            return compose("bench", [*given, *more])

        run_bench(config, compose_with)


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """`arguments` with `--against FILE` written as an override, `bench.against=FILE`."""
    translated = list(arguments)
    if "--against" in translated:
        at = translated.index("--against")
        translated[at : at + 2] = [f"bench.against={value}" for value in translated[at + 1 : at + 2]]
    return translated


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    run_script(main)
