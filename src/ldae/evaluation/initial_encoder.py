"""The semantic encoder as it was before its training, for the baseline `untrained`."""

from pathlib import Path

import torch
from hydra.utils import instantiate

from ldae.models.placement import place_module
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.state import load_weights
from ldae.runs import Run
from ldae.utils.seeding import weights_seed

DRAWS = 5  # of the initial weights


def count_draws(run: Run) -> int:
    """How many different starts the training of stage 3 can have: one if it started from the weights of another run."""
    return DRAWS if run.config.stage.get("initial_weights") is None else 1


def build_initial_encoder(run: Run, draw: int, trained: SemanticEncoder) -> SemanticEncoder:
    """The encoder before training, on the device of the trained one, in eval mode.

    Args:
        run: of stage 3.
        draw: 0 for the weights that the run itself started from, 1, 2, ... for further draws of them.
        trained: has the mean volume of the training scans, which is set before training.

    Raises:
        UserError: a file of weights that training started from is missing or does not fit.
    """
    config = run.config
    with torch.random.fork_rng():
        torch.manual_seed(weights_seed(int(config.seed), config.stage._target_, draw))
        encoder = instantiate(config.stage.encoder)
    if config.stage.get("initial_weights") is not None:
        load_weights(encoder, Path(config.stage.initial_weights) / "encoder.safetensors")
    if getattr(trained, "mean_volume", None) is not None:
        encoder.set_mean_volume(trained.mean_volume.cpu(), trained.difference_std.cpu())
    return place_module(encoder.eval(), next(trained.parameters()).device)
