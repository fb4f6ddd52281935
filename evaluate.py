"""Evaluate a trained model: `python evaluate.py data=table data.table=scans.csv name=mycohort`.

Embeds every scan, fits the probes and runs the chosen evaluations. Writes runs/<name>/evaluation.
"""

import hydra
from omegaconf import DictConfig

from ldae.config import conf_dir, register
from ldae.utils.entrypoint import one_line_errors, run_script

register()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
def main(config: DictConfig) -> None:
    with one_line_errors():
        from ldae.experiment import evaluate

        evaluate(config)


if __name__ == "__main__":
    run_script(main)
