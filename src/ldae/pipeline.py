"""class LDAE: the whole trained model behind a few methods (arXiv 2504.08635, section 4 of the method).

Tensors are in model space: volumes (B, 1, X, Y, Z) in [0, 1], latents (B, C, X', Y', Z') of unit variance, y (B, dim).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldae.bundle import DESCRIPTION, Bundle
from ldae.denoiser import Denoiser
from ldae.diffusion.code import Code
from ldae.diffusion.samplers import Sampler
from ldae.errors import UserError
from ldae.noise import normal


class Edit(Protocol):
    """Anything that moves y, as evaluation.directions.Direction does."""

    def edit(self, y: Tensor, alpha: float) -> Tensor:
        """y' of y (B, dim)."""
        ...


class LDAE:
    """A trained model.

    Args:
        autoencoder, encoder: networks of stages 1 and 3.
        denoiser: U-Net and gradient estimator with their diffusion.
        scale: (C,), latents times this have unit variance.
        sampler: the default sampler; its guidance form, strength and stop hold for inversion and decoding alike.
        shape: (X, Y, Z) of a volume.
        transform: from a scan's file to a volume; None where only tensors are used.
        bundle: what the model was built from; needed for `export` and for probes by name.
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
        bundle: Bundle | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.autoencoder, self.encoder, self.denoiser = autoencoder, encoder, denoiser
        for module in (autoencoder, encoder, denoiser.unet, denoiser.estimator):
            module.to(self.device).eval().requires_grad_(False)
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
        self.sampler = sampler
        self.shape = tuple(shape)
        self.transform = transform
        self.bundle = bundle

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        sampler: Sampler | None = None,
        trust: Sequence[str] = (),
    ) -> "LDAE":
        """The model of a run, `runs/<name>`, or of an exported bundle.

        Args:
            sampler: instead of the one that the run or bundle was made with.
            trust: further modules whose classes a bundle may name (see bundle.py).

        Raises:
            UserError: a stage or file is missing or altered, or weights do not fit.
        """
        path = Path(path)
        bundle = Bundle.open(path, trust) if (path / DESCRIPTION).exists() else Bundle.of_run(path)
        networks = {name: part.build() for name, part in bundle.parts.items()}
        diffusion = [instantiate(node) for node in (bundle.schedule, bundle.parameterisation)]
        transform = instantiate(bundle.transform)
        return cls(
            autoencoder=networks["autoencoder"],
            encoder=networks["encoder"],
            denoiser=Denoiser(networks["unet"], networks["estimator"], *diffusion),
            scale=bundle.scale,
            sampler=sampler or instantiate(bundle.sampler),
            shape=transform.shape,
            transform=transform,
            device=device,
            bundle=bundle,
        )

    def export(self, folder: str | Path) -> Path:
        """Write the model as a bundle: a folder that can be moved and shared. Returns it.

        Raises:
            UserError: the model was put together by hand, or its files have changed since.
        """
        if self.bundle is None:
            raise UserError("only a model that was loaded from a run or a bundle can be exported")
        return self.bundle.save(folder)

    @cached_property
    def probes(self) -> dict[str, Any]:
        """Frozen linear probes of y by name (evaluation.linear.LinearModel), fitted by evaluate.py; {} without any."""
        from ldae.evaluation.frozen import OURS, read_frozen

        if self.bundle is None or self.bundle.probes is None:
            return {}
        return {name: found[OURS].model for name, found in read_frozen(self.bundle.probes, self.bundle.weights).items()}

    def direction(self, probe: str) -> Edit:
        """The direction of a probe's weights: alpha > 0 moves towards its positive class or larger number."""
        import numpy as np

        from ldae.evaluation.directions import Direction

        if probe not in self.probes:
            known = ", ".join(sorted(self.probes)) or "none; run `python evaluate.py evaluation=[probes]`"
            raise UserError(f"this model has no probe '{probe}'; it has {known}")
        model = self.probes[probe]
        return Direction(model.mean, model.std, model.coef / np.linalg.norm(model.coef))

    def _sampler(self, steps: int | None) -> Sampler:
        return self.sampler if steps is None else self.sampler.with_steps(steps)

    def _guided(self, y: Tensor) -> Any:
        guidance = self.sampler.guidance
        denoiser = self.denoiser
        if guidance.form is not None:
            parts = (denoiser.unet, denoiser.estimator, denoiser.schedule, denoiser.parameterisation)
            denoiser = Denoiser(*parts, form=guidance.form)
        return denoiser.guided(y.to(self.device), guidance.strength, guidance.stop)

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """y = Enc(x), (B, dim)."""
        return self.encoder(x.to(self.device)).float()

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, unscaled, (B, C, X', Y', Z') each."""
        mean, std = self.autoencoder.encode(x.to(self.device))
        return mean.float(), std.float()

    def compress(self, x: Tensor) -> Tensor:
        """z, the posterior's mean in units of the latent's standard deviation."""
        return self.posterior(x)[0] * self.scale

    @torch.no_grad()
    def decompress(self, z: Tensor) -> Tensor:
        """The volume of z, as the autoencoder decodes it: near [0, 1], not clipped to it."""
        return self.autoencoder.decode(z.to(self.device) / self.scale).float()

    @torch.no_grad()
    def invert(self, z: Tensor, y: Tensor, steps: int | None = None, **options: Any) -> Code:
        """z_T of z given y; `options` as in Sampler.invert (depth, noise, renoise)."""
        return self._sampler(steps).invert(self._guided(y), z.to(self.device), self.denoiser.schedule, **options)

    @torch.no_grad()
    def generate(self, code: Code | Tensor, y: Tensor, steps: int | None = None) -> Tensor:
        """z_0 decoded from a code, or from noise, given y."""
        return self._sampler(steps).sample(self._guided(y), code.to(self.device), self.denoiser.schedule)

    def decode(self, code: Code | Tensor, y: Tensor, steps: int | None = None) -> Tensor:
        """The volume decoded from a code, or from noise, given y, clipped to [0, 1]."""
        return self.decompress(self.generate(code, y, steps)).clamp(0, 1)

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """z_T ~ N(0, I), (count, C, X', Y', Z'): sample i depends on (seed, i) alone."""
        sizes = [size // stride for size, stride in zip(self.shape, self.autoencoder.strides, strict=True)]
        shape = (self.autoencoder.latent_channels, *sizes)
        return normal(shape, seed, range(count), "sample").to(self.device)

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0, steps: int | None = None) -> Tensor:
        """Unconditional volumes, from the U-Net alone, clipped to [0, 1]."""
        z = self._sampler(steps).sample(self.denoiser.eps, self.noise(count, seed), self.denoiser.schedule)
        return self.decompress(z).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Unconditional eps, (B, C, X', Y', Z')."""
        return self.denoiser.eps(z_t.to(self.device), t.to(self.device))

    @torch.no_grad()
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

    def vary(self, x: Tensor, count: int, seed: int = 0, steps: int | None = None) -> Tensor:
        """One scan's y with `count` codes ~ N(0, I): (count, 1, X, Y, Z) from x (1, 1, X, Y, Z)."""
        return self.decode(self.noise(count, seed), self.embed(x).expand(count, -1), steps)

    def manipulate(
        self, x: Tensor, direction: str | Edit, alpha: float, steps: int | None = None, **options: Any
    ) -> Tensor:
        """The scan with y moved along a direction, decoded from its own code.

        Args:
            direction: the name of a probe, or anything with `edit(y, alpha)`.
            alpha: 1 is a step as long as a typical standardised y.
            options: of the inversion (depth, noise, renoise), see Sampler.invert.
        """
        chosen = self.direction(direction) if isinstance(direction, str) else direction
        y = self.embed(x)
        code = self.invert(self.compress(x), y, steps, **options)
        return self.decode(code, chosen.edit(y, alpha), steps)
