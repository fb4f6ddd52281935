"""class LDAE: the whole trained model behind a few methods (arXiv 2504.08635, section 4 of the method).

Tensors are in model space: volumes (B, 1, X, Y, Z) in [0, 1], latents (B, C, X', Y', Z') of unit variance, y (B, dim).
Where a method takes volumes it takes scans as well (inputs.py); uses.py has the methods made of those here.
"""

import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldae.bundle.bundle import Bundle
from ldae.denoiser import Denoiser
from ldae.diffusion.code import Code
from ldae.diffusion.guidance import GuidedEps
from ldae.diffusion.samplers import Sampler
from ldae.editing.readouts import Readouts
from ldae.inputs import Inputs, Scans
from ldae.models.sizes import latent_sizes
from ldae.scans.raw_scan import TrainingPreprocessing
from ldae.scans.scan import PreprocessScan
from ldae.uses import Edit, Uses
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _inference(method: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients, networks in the model's dtype."""

    @functools.wraps(method)
    def wrapped(self: "LDAE", *args: Any, **options: Any) -> Any:
        reduced = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype if reduced else None, enabled=reduced):
            return method(self, *args, **options)

    return wrapped


class LDAE(Inputs, Uses):
    """A trained model.

    Args:
        autoencoder, encoder: networks of stages 1 and 3.
        denoiser: U-Net and gradient estimator with their diffusion.
        scale: (C,), latents times this have unit variance.
        sampler: the default sampler; its guidance form, strength and stop hold for inversion and decoding alike.
        shape: (X, Y, Z) of a volume.
        transform: from a scan's file to a volume; None where only tensors are used.
        bundle: what the model was built from; needed for `export`, and for probes and directions by name.
        dtype: of the networks' arithmetic: float32, or bfloat16 or float16 where the device is good at them. Samplers
            count in float32 all the same.
        batch_size: volumes that encoder and autoencoder see at a time, at most.
        preprocess: what scans go through that are unlike the training scans (see native.open_scan); None refuses them.
            `load` gives the steps that the training scans went through.
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
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        preprocess: PreprocessScan | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype}: one of {', '.join(map(str, DTYPES))} is needed")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.autoencoder, self.encoder, self.denoiser = autoencoder, encoder, denoiser
        for module in (autoencoder, encoder, denoiser.unet, denoiser.estimator):
            module.to(self.device).eval().requires_grad_(False)
        denoiser.schedule.to(self.device)
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
        self.sampler = sampler
        self.shape = tuple(shape)
        self.transform = transform
        self.bundle = bundle
        self.dtype, self.batch_size, self.preprocess = dtype, batch_size, preprocess

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        sampler: Sampler | None = None,
        trust: Sequence[str] = (),
        runs: str | Path = "runs",
        **options: Any,
    ) -> "LDAE":
        """The model of a run, `runs/<name>` or its name alone, or of an exported bundle.

        Args:
            sampler: instead of the one that the run or bundle was made with.
            trust: further modules whose classes a bundle may name (see bundle.py).
            runs: folder of runs, where `path` is a name.
            options: dtype, batch_size, preprocess (None: raw scans are refused).

        Raises:
            UserError: there is no such model, a stage or file is missing or altered, or weights do not fit.
        """
        bundle = Bundle.find(path, runs, trust)
        networks = {name: part.build() for name, part in bundle.networks.items()}
        diffusion = [instantiate(node) for node in (bundle.schedule, bundle.parameterisation)]
        transform = instantiate(bundle.transform)
        options = {"preprocess": TrainingPreprocessing(transform, bundle.preprocess, bundle.affine), **options}
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
            **options,
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
    def knowledge(self) -> Readouts:
        """Probes, directions and the settings of an edit, as evaluate.py left them; empty without any."""
        bundle = self.bundle
        return Readouts() if bundle is None else Readouts.read(bundle.probes, bundle.directions, bundle.weights_hash)

    @property
    def probes(self) -> Any:
        """Frozen linear probes of y by name (evaluation.linear.LinearModel)."""
        return self.knowledge.probes

    def direction(self, name: str) -> Edit:
        """A direction by name: alpha > 0 moves towards the probe's positive class or larger number."""
        return self.knowledge.direction(name)

    def _in_batches(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([work(part).float() for part in x.to(self.device).split(self.batch_size)])

    def _sampler(self, steps: int | None) -> Sampler:
        return self.sampler if steps is None else self.sampler.with_steps(steps)

    def _guided(self, y: Tensor) -> GuidedEps:
        return self.denoiser.guided_eps(y.to(self.device), self.sampler.guidance)

    @_inference
    def embed(self, x: Scans) -> Tensor:
        """y = Enc(x), (B, dim)."""
        return self._in_batches(self.encoder, self.volumes(x))

    @_inference
    def attention(self, x: Scans) -> Tensor:
        """How much the encoder looked at each slice, (B, slices), rows sum to 1."""
        return self._in_batches(self.encoder.attention, self.volumes(x))

    @_inference
    def posterior(self, x: Scans) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, unscaled, (B, C, X', Y', Z') each."""
        both = self._in_batches(lambda part: torch.stack(self.autoencoder.encode(part), 1), self.volumes(x))
        return both[:, 0], both[:, 1]

    def compress(self, x: Scans) -> Tensor:
        """z, the posterior's mean in units of the latent's standard deviation."""
        return self.posterior(x)[0] * self.scale

    @_inference
    def decompress(self, z: Tensor) -> Tensor:
        """The volume of z, as the autoencoder decodes it: near [0, 1], not clipped to it."""
        return self._in_batches(self.autoencoder.decode, z.to(self.device) / self.scale)

    @_inference
    def invert(self, z: Tensor, y: Tensor, steps: int | None = None, **options: Any) -> Code:
        """z_T of z given y; `options` as in Sampler.invert (depth, noise, renoise)."""
        return self._sampler(steps).invert(self._guided(y), z.to(self.device), self.denoiser.schedule, **options)

    @_inference
    def generate(self, code: Code | Tensor, y: Tensor, steps: int | None = None) -> Tensor:
        """z_0 decoded from a code, or from noise, given y."""
        return self._sampler(steps).sample(self._guided(y), code.to(self.device), self.denoiser.schedule)

    def decode(self, code: Code | Tensor, y: Tensor, steps: int | None = None) -> Tensor:
        """The volume decoded from a code, or from noise, given y, clipped to [0, 1]."""
        return self.decompress(self.generate(code, y, steps)).clamp(0, 1)

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """z_T ~ N(0, I), (count, C, X', Y', Z'): sample i depends on (seed, i) alone."""
        shape = (self.autoencoder.latent_channels, *latent_sizes(self.shape, self.autoencoder.strides))
        return draw_normal(shape, seed, range(count), "sample").to(self.device)

    @_inference
    def sample_from(self, noise: Tensor, steps: int | None = None) -> Tensor:
        """Unconditional volumes of z_T, from the U-Net alone, clipped to [0, 1]."""
        z = self._sampler(steps).sample(self.denoiser.eps, noise.to(self.device), self.denoiser.schedule)
        return self.decompress(z).clamp(0, 1)

    def sample(self, count: int, seed: int = 0, steps: int | None = None) -> Tensor:
        """`count` unconditional volumes; volume i depends on (seed, i) alone."""
        return self.sample_from(self.noise(count, seed), steps)

    @_inference
    def predict_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Unconditional eps, (B, C, X', Y', Z')."""
        return self.denoiser.eps(z_t.to(self.device), t.to(self.device))

    @_inference
    def estimate_gradient(self, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """G(z_t, t, y), (B, C, X', Y', Z')."""
        return self.denoiser.gradient(z_t.to(self.device), t.to(self.device), y.to(self.device))
