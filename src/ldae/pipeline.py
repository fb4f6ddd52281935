"""class LDAE: the whole trained model behind a few methods (arXiv 2504.08635, section 4 of the method).

Tensors are in model space: volumes (B, 1, X, Y, Z) in [0, 1], latents (B, C, X', Y', Z') of unit variance, y (B, dim).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldae.denoiser import Denoiser
from ldae.diffusion.code import Code
from ldae.diffusion.samplers import Multistep, Sampler
from ldae.noise import normal
from ldae.runs import Workspace, estimator_node, pick_device


class LDAE:
    """A trained model.

    Args:
        autoencoder, encoder: networks of stages 1 and 3.
        denoiser: U-Net and gradient estimator with their diffusion.
        scale: (C,), latents times this have unit variance.
        sampler: the default sampler; its guidance form, strength and stop hold for inversion and decoding alike.
        shape: (X, Y, Z) of a volume.
        transform: from a scan's file to a volume; None where only tensors are used.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        encoder: nn.Module,
        denoiser: Denoiser,
        scale: Tensor | Sequence[float],
        sampler: Sampler,
        shape: Sequence[int],
        transform: Any = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.autoencoder, self.encoder, self.denoiser = autoencoder, encoder, denoiser
        for module in (autoencoder, encoder, denoiser.unet, denoiser.estimator):
            module.to(self.device).eval().requires_grad_(False)
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
        self.sampler = sampler
        self.shape = tuple(shape)
        self.transform = transform

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device | None = None, sampler: Sampler | None = None
    ) -> "LDAE":
        """The model of a run, `runs/<name>`, each network from the config it was trained with.

        Raises:
            UserError: a stage is missing, or weights do not fit.
        """
        space = Workspace(Path(path))
        first, second, third = (space.predecessor(name) for name in ("aekl", "pretrain", "repr"))
        diffusion = instantiate(second.config.diffusion)
        encoder = third.module("encoder", third.config.model.encoder)
        estimator = third.module("estimator", estimator_node(second.config.model.unet, encoder.dim))
        unet = second.module("unet", second.config.model.unet)
        return cls(
            autoencoder=first.module("autoencoder", first.config.model.autoencoder),
            encoder=encoder,
            denoiser=Denoiser(unet, estimator, diffusion.schedule, diffusion.parameterisation),
            scale=second.metadata["scale"],
            sampler=sampler or Multistep(),
            shape=first.config.data.shape,
            transform=instantiate(first.config.data.transform),
            device=device,
        )

    def _sampler(self, steps: int | None) -> Sampler:
        return self.sampler if steps is None else self.sampler.with_steps(steps)

    def _guided(self, y: Tensor) -> Any:
        guidance = self.sampler.guidance
        denoiser = self.denoiser
        if guidance.form is not None:
            parts = (denoiser.unet, denoiser.estimator, denoiser.schedule, denoiser.parameterisation)
            denoiser = Denoiser(*parts, form=guidance.form)
        return denoiser.guided(y.to(self.device), guidance.strength, guidance.stop)

    @torch.inference_mode()
    def embed(self, x: Tensor) -> Tensor:
        """y = Enc(x), (B, dim)."""
        return self.encoder(x.to(self.device)).float()

    @torch.inference_mode()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, unscaled, (B, C, X', Y', Z') each."""
        mean, std = self.autoencoder.encode(x.to(self.device))
        return mean.float(), std.float()

    def compress(self, x: Tensor) -> Tensor:
        """z, the posterior's mean in units of the latent's standard deviation."""
        return self.posterior(x)[0] * self.scale

    @torch.inference_mode()
    def decompress(self, z: Tensor) -> Tensor:
        """The volume of z, clipped to [0, 1]."""
        return self.autoencoder.decode(z.to(self.device) / self.scale).float().clamp(0, 1)

    @torch.inference_mode()
    def invert(self, z: Tensor, y: Tensor, steps: int | None = None, **options: Any) -> Code:
        """z_T of z given y; `options` as in Sampler.invert (depth, noise, renoise)."""
        return self._sampler(steps).invert(self._guided(y), z.to(self.device), self.denoiser.schedule, **options)

    @torch.inference_mode()
    def generate(self, code: Code | Tensor, y: Tensor, steps: int | None = None) -> Tensor:
        """z_0 decoded from a code, or from noise, given y."""
        return self._sampler(steps).sample(self._guided(y), code.to(self.device), self.denoiser.schedule)

    def decode(self, code: Code | Tensor, y: Tensor, steps: int | None = None) -> Tensor:
        """The volume decoded from a code, or from noise, given y."""
        return self.decompress(self.generate(code, y, steps))

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """z_T ~ N(0, I), (count, C, X', Y', Z'): sample i depends on (seed, i) alone."""
        sizes = [size // stride for size, stride in zip(self.shape, self.autoencoder.strides, strict=True)]
        shape = (self.autoencoder.latent_channels, *sizes)
        return normal(shape, seed, range(count), "sample").to(self.device)

    @torch.inference_mode()
    def sample(self, count: int, seed: int = 0, steps: int | None = None) -> Tensor:
        """Unconditional volumes, from the U-Net alone."""
        noise = self.noise(count, seed)
        return self.decompress(self._sampler(steps).sample(self.denoiser.eps, noise, self.denoiser.schedule))

    @torch.inference_mode()
    def predict_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Unconditional eps, (B, C, X', Y', Z')."""
        return self.denoiser.eps(z_t.to(self.device), t.to(self.device))

    @torch.inference_mode()
    def estimate_gradient(self, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """G(z_t, t, y), (B, C, X', Y', Z')."""
        return self.denoiser.gradient(z_t.to(self.device), t.to(self.device), y.to(self.device))

    def interpolate(self, xa: Tensor, xb: Tensor, t: float | Tensor, steps: int | None = None) -> Tensor:
        """Between two scans: y on the line, z_T on the arc; t in [0, 1]."""
        ya, yb = self.embed(xa), self.embed(xb)
        first = self.invert(self.compress(xa), ya, steps)
        second = self.invert(self.compress(xb), yb, steps)
        share = torch.as_tensor(t, dtype=ya.dtype, device=self.device).view(-1, 1)
        return self.decode(first.slerp(second, t), torch.lerp(ya, yb, share.expand_as(ya)), steps)
