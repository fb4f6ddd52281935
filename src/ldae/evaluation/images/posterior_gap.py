"""How large is the posterior-mean gap of the frozen U-Net, and how much of it does y fill (PDAE, arXiv 2212.12990)?

On test scans, at timesteps spread evenly over the schedule. Metrics:

- `gap/unfilled`, `gap/filled`: root mean square of the gap over timesteps, without and with y.
- `gap/filled_share`: share of the squared gap that y fills.

gap.png shows both by timestep.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ldae.diffusion.diagnostics import posterior_mean_gap
from ldae.evaluation import figures
from ldae.evaluation.context import Context
from ldae.utils.seeding import draw_normal


class PosteriorMeanGap:
    """The evaluation that the module describes.

    Args:
        scans: at most this many test scans.
        points: number of timesteps.
    """

    def __init__(self, scans: int = 16, points: int = 20) -> None:
        self.scans, self.points = scans, points

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        model, rows = context.model, context.sample_rows("test", self.scans).tolist()
        if not rows:
            return
        z0 = model.compress(context.volumes(rows).to(model.device))
        schedule = model.denoiser.schedule
        steps = [int(t) for t in np.linspace(1, schedule.timesteps - 1, self.points)]

        def noise(step: int) -> Tensor:
            return draw_normal(z0.shape[1:], context.seed, rows, f"gap/{step}").to(z0)

        predictions = {"unfilled": model.denoiser.eps, "filled": model.denoiser.guided_eps(context.y(rows))}
        curves = {name: posterior_mean_gap(eps_fn, z0, schedule, steps, noise) for name, eps_fn in predictions.items()}
        labels = {"unfilled": "U-Net alone", "filled": "guided by y"}
        figures.draw_curves(
            context.out / "gap.png",
            {labels[name]: (steps, curve.gap.tolist()) for name, curve in curves.items()},
            "timestep t",
            "posterior-mean gap (root mean square, latent units)",
        )
        for name, curve in curves.items():
            yield f"gap/{name}", curve.rms
        yield "gap/filled_share", curves["unfilled"].filled_share(curves["filled"])
