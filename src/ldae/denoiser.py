"""Predicted noise with and without y: the one place where U-Net, gradient estimator and guidance are combined.

The U-Net's encoder features are computed once per evaluation and shared by the U-Net's own output and the estimator.
"""

from torch import Tensor

from ldae.diffusion.guidance import Guidance, GuidedEps
from ldae.diffusion.process import Parameterisation
from ldae.diffusion.schedule import Schedule
from ldae.models.cuda_graph import Function, GraphCache
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.unet import UNet


class Denoiser:
    """Noise predictions of a trained model.

    Args:
        unet: U-Net of stage 2, frozen.
        estimator: gradient estimator of stage 3; None if only unconditional predictions are needed.
        schedule, parameterisation: those that the U-Net was trained with.

    Attributes:
        graphs: runs evaluations as CUDA graphs; None runs them as they are.
    """

    def __init__(
        self,
        unet: UNet,
        estimator: GradientEstimator | None,
        schedule: Schedule,
        parameterisation: Parameterisation,
    ) -> None:
        self.unet = unet
        self.estimator = estimator
        self.schedule = schedule
        self.parameterisation = parameterisation
        self.graphs: GraphCache | None = None

    def eps(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Unconditional eps of z_t (B, C, X, Y, Z) at t (B,), of the shape of z_t."""
        return self._evaluate(self._eps, z_t, t)[0]

    def gradient(self, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """G(z_t, t, y), (B, C, X, Y, Z), of y (B, D)."""
        return self.estimator(self.unet.features(z_t, t), y).to(z_t.dtype)

    def guided_eps(self, y: Tensor, guidance: Guidance | None = None) -> GuidedEps:
        """The eps_fn conditioned on y (B, D): eps + strength k(t) G(z_t, t, y).

        Args:
            guidance: form, strength and stop; None uses the form of training at strength 1 over the whole schedule.
        """
        guidance = guidance or Guidance()
        form = guidance.form or self.parameterisation.trained_form

        def eps_and_gradient(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            eps, gradient = self._evaluate(self._eps_and_gradient, z_t, t, y)
            return eps, gradient

        return GuidedEps(self.eps, eps_and_gradient, form, self.schedule, guidance.strength, guidance.stop)

    def _evaluate(self, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        return function(*inputs) if self.graphs is None else self.graphs(function, *inputs)

    def _eps(self, z_t: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self._to_eps(self.unet(z_t, t), z_t, t),)

    def _eps_and_gradient(self, z_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        features = self.unet.features(z_t, t)
        eps = self._to_eps(self.unet.head(features), z_t, t)
        return eps, self.estimator(features, y).to(z_t.dtype)

    def _to_eps(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The U-Net's output, eps or v, as eps in the dtype of z_t."""
        return self.parameterisation.to_eps(self.schedule, output.to(z_t.dtype), z_t, t)
