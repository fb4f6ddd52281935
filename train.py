"""Train one stage: `python train.py stage=aekl data=table data.table=scans.csv name=mycohort`.

The same command again resumes the run. Several GPUs: `accelerate launch train.py ...`. Sweep: `python train.py -m ...`.
"""

import sys

import hydra
from omegaconf import DictConfig

from ldae.config import conf_dir, register
from ldae.utils.entrypoint import one_line_errors, run_script

register()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def main(config: DictConfig) -> None:
    with one_line_errors():
        from ldae.experiment import train

        train(config)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv) and not any(argument.startswith("stage=") for argument in sys.argv):
        sys.argv.append("stage=aekl")  # for help Hydra composes a config, in which the stage has no default
    run_script(main)
