"""The semantic encoder as it was before its training, for the baseline `untrained`.

Principal components in it belong to the start: of an encoder of components alone, `untrained` and y are the same, and
with a residual that starts at 0, `untrained` are the components.
"""

from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import nn

from ldae.models.fitted import copy_fitted
from ldae.models.placement import place_module
from ldae.models.state import load_weights
from ldae.runs import Run, to_container
from ldae.utils.seeding import weights_seed

DRAWS = 5  # of the initial weights


def count_draws(run: Run) -> int:
    """How many different starts the training of stage 3 can have: one if it started from the weights of another run, or
    if nothing in the start is random."""
    with torch.device("meta"):
        encoder = instantiate(to_container(run.config.stage.encoder))  # without files of weights
    is_random = getattr(encoder, "random_start", True)
    return DRAWS if is_random and run.config.stage.get("initial_weights") is None else 1


def build_initial_encoder(run: Run, draw: int, trained: nn.Module) -> nn.Module:
    """The encoder before training, on the device of the trained one, in eval mode.

    Args:
        run: of stage 3.
        draw: 0 for the weights that the run itself started from, 1, 2, ... for further draws of them.
        trained: has what was measured on the training scans before training: their mean volume or components.

    Raises:
        UserError: a file of weights that training started from is missing or does not fit.
    """
    config = run.config
    with torch.random.fork_rng():
        torch.manual_seed(weights_seed(int(config.seed), config.stage._target_, draw))
        encoder = instantiate(config.stage.encoder)
    if config.stage.get("initial_weights") is not None:
        load_weights(encoder, Path(config.stage.initial_weights) / "encoder.safetensors")
    copy_fitted(trained, encoder)
    return place_module(encoder.eval(), next(iter(trained.state_dict().values())).device)
