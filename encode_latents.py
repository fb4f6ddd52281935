"""Compress every scan of a table: `python encode_latents.py data=table data.table=scans.csv name=mycohort`.

Writes runs/<name>/latents. The same command again skips scans that are encoded already. Several GPUs: `accelerate
launch encode_latents.py ...`. Several jobs: `--shard I/N` in each; the last one writes the file of all latents.
"""

import hydra
from omegaconf import DictConfig

from ldae.config import conf_dir, register
from ldae.utils.entrypoint import one_line_errors, run_script

register()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="encode_latents")
def main(config: DictConfig) -> None:
    with one_line_errors():
        from ldae.experiment import encode

        encode(config)


if __name__ == "__main__":
    run_script(main)
