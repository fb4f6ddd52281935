"""Where synthetic scans come from in evaluation=[generation]: three ways to draw them, with the same noise z_T.

unet        the U-Net alone, without any y
gaussian    y from the Gaussian part of the prior, then the scan by the latent diffusion with that y
prior       y from the prior; left out if the prior is that Gaussian
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.diffusion.samplers import Sampler
from ldae.evaluation.context import Context, iterate_batches
from ldae.prior.draws import draw_semantics
from ldae.utils.seeding import draw_normal

UNET, GAUSSIAN, PRIOR = "unet", "gaussian", "prior"


@dataclass(frozen=True)
class Samples:
    """Synthetic scans of one source.

    Attributes:
        volumes: (S * N, 1, X, Y, Z) on the CPU in [0, 1], the N samples of each of S seeds after each other.
        labels: their labels, one row each; None from the U-Net alone.
        seeds: S.
    """

    volumes: Tensor
    labels: pd.DataFrame | None
    seeds: int

    def by_seed(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all samples, (S * N, ...), as S arrays."""
        return np.split(values, self.seeds)


def source_names(context: Context) -> list[str]:
    """The sources that this model has. A prior without a network is the Gaussian."""
    prior = context.model.prior
    if prior is None:
        return [UNET]
    return [UNET, GAUSSIAN, *([PRIOR] if prior.network is not None else [])]


@torch.no_grad()
def draw_samples(context: Context, source: str, count: int, seeds: int, sampler: Sampler, batch_size: int) -> Samples:
    """`count` samples for each seed; sample i depends on (seed of the evaluation, i) only."""
    from tqdm import tqdm

    model, parts, tables = context.model, [], []
    latent = model.compress(context.volumes([0]).to(model.device))  # for its shape
    for keys in tqdm(list(iterate_batches(range(count * seeds), batch_size)), f"samples, {source}"):
        noise = draw_normal(latent.shape[1:], context.seed, keys, "generation").to(latent)
        if source == UNET:
            z0 = sampler.sample(model.denoiser.eps, noise, model.denoiser.schedule)
        else:
            drawn = draw_semantics(model.prior, keys, context.seed, gaussian=source == GAUSSIAN)
            tables.append(drawn.table)
            z0 = model.generate(noise, drawn.y, sampler=sampler)
        parts.append(model.decompress(z0).float().clamp(0, 1).cpu())
    return Samples(torch.cat(parts), pd.concat(tables, ignore_index=True) if tables else None, seeds)
