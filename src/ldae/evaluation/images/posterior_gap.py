"""The posterior-mean gap by timestep, as the frozen U-Net leaves it and as y fills it (PDAE, arXiv 2212.12990)."""

from collections.abc import Iterator

import numpy as np
import torch

from ldae.data.subsampling import subsample_by_subject
from ldae.diffusion.diagnostics import posterior_mean_gap
from ldae.evaluation import figures
from ldae.evaluation.context import Context
from ldae.utils.seeding import draw_normal


class PosteriorMeanGap:
    """`gap/{unfilled,filled}`: root mean square over timesteps; `gap/filled_share` of the square; gap.png the curves.

    Args:
        scans: of test, at most.
        points: timesteps, evenly spaced over the schedule.
    """

    def __init__(self, scans: int = 16, points: int = 20) -> None:
        self.scans, self.points = scans, points

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        model = context.model
        rows = subsample_by_subject(
            context.rows("test"), context.table["subject"].to_numpy(str), self.scans, context.seed
        )
        if not len(rows):
            return
        z0 = model.compress(context.volumes(rows.tolist()).to(model.device))
        y = torch.from_numpy(context.embeddings[rows]).to(model.device)
        schedule = model.denoiser.schedule
        steps = [int(t) for t in np.linspace(1, schedule.timesteps - 1, self.points)]

        def noise(step: int) -> torch.Tensor:
            return draw_normal(z0.shape[1:], context.seed, rows.tolist(), f"gap/{step}").to(z0)

        curves = {
            "unfilled": posterior_mean_gap(model.denoiser.eps, z0, schedule, steps, noise),
            "filled": posterior_mean_gap(model.denoiser.guided_eps(y), z0, schedule, steps, noise),
        }
        figures.draw_curves(
            context.out / "gap.png",
            {name: (steps, curve.gap.numpy()) for name, curve in curves.items()},
            "timestep t",
            "posterior-mean gap (RMS)",
        )
        for name, curve in curves.items():
            yield f"gap/{name}", curve.rms
        yield "gap/filled_share", curves["unfilled"].filled_share(curves["filled"])
