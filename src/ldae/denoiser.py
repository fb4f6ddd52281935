"""U-Net, gradient estimator and diffusion put together: eps without and with y, the trunk computed once for both."""

from typing import Any

from torch import Tensor, nn

from ldae.diffusion.guidance import GuidedEps
from ldae.diffusion.process import Parameterisation
from ldae.diffusion.schedule import Schedule


class Denoiser:
    """Noise predictions of a trained model.

    Args:
        unet: the frozen U-Net of stage 2.
        estimator: the gradient estimator of stage 3, or None.
        schedule, parameterisation: those that the U-Net was trained with.
        form: how the estimate G shifts eps (guidance.py); None: as it was trained.
    """

    def __init__(
        self,
        unet: nn.Module,
        estimator: nn.Module | None,
        schedule: Schedule,
        parameterisation: Parameterisation,
        form: Any = None,
    ) -> None:
        self.unet = unet
        self.estimator = estimator
        self.schedule = schedule
        self.parameterisation = parameterisation
        self.form = form or parameterisation.natural_form

    def _eps(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self.parameterisation.to_eps(self.schedule, output.to(z_t.dtype), z_t, t)

    def eps(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Unconditional eps, (B, C, X, Y, Z)."""
        return self._eps(self.unet(z_t, t), z_t, t)

    def gradient(self, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """G(z_t, t, y), (B, C, X, Y, Z)."""
        return self.estimator(self.unet.features(z_t, t), y).to(z_t.dtype)

    def guided_eps(self, y: Tensor, strength: float = 1.0, stop: float = 0.0) -> GuidedEps:
        """eps_fn conditioned on y (B, D): eps + strength k(t) G; below t = stop * T guidance is dropped."""

        def both(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            features = self.unet.features(z_t, t)
            eps = self._eps(self.unet.head(features), z_t, t)
            return eps, self.estimator(features, y).to(z_t.dtype)

        return GuidedEps(self.eps, both, self.form, self.schedule, strength, stop)
