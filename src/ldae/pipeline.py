"""class LDAE: a trained model and everything that one does with it (arXiv 2504.08635, section 4).

Tensors are in model space: volumes (B, 1, X, Y, Z) in [0, 1], latents z (B, C, X', Y', Z') of unit variance, semantic
vectors y (B, dim). Methods that take volumes also take scans: the path of a NIfTI, a nibabel image, a `Scan` from
`open`, or a list of these. They return tensors; `Scan.restored` and `Scan.edited` turn these into NIfTIs that overlay
on the scan. The semantic encoder sees a view of the scan (ldae.data.view), which is made of the scan itself where there
is one, and of the volume otherwise.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar, Unpack

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldae.bundle.bundle import Bundle
from ldae.data.transforms import Source, Transform
from ldae.data.view import View
from ldae.denoiser import Denoiser
from ldae.diffusion.code import Code
from ldae.diffusion.guidance import GuidedEps
from ldae.diffusion.samplers import Sampler
from ldae.editing.direction import Direction, EditDirection
from ldae.editing.editor import EditSettings
from ldae.editing.forecast_file import read_forecaster
from ldae.editing.forecaster import Forecaster
from ldae.editing.linear_model import LinearModel
from ldae.editing.readouts import Readouts
from ldae.editing.scan_forecast import ScanForecast, check_years, forecast_scan, parse_row
from ldae.models.cuda_graph import GraphCache
from ldae.models.placement import computes_channels_last, place_module
from ldae.models.sizes import latent_sizes
from ldae.prior.draws import SemanticDraws, draw_semantics
from ldae.prior.semantic_prior import SemanticPrior
from ldae.scans.ood_check import OodCheck
from ldae.scans.raw_scan import TrainingPreprocessing
from ldae.scans.scan import Scan, open_scan
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Scans = Tensor | Scan | Source | Sequence[Scan | Source]
PreprocessMode = Literal["auto", "always", "never"]
# None, True and False are the former names of the modes.
_MODES = {"auto": "auto", "always": "always", "never": "never", None: "auto", True: "always", False: "never"}

P = ParamSpec("P")
R = TypeVar("R")


def _inference(method: Callable[Concatenate["LDAE", P], R]) -> Callable[Concatenate["LDAE", P], R]:
    """Run a method without gradients, its networks in the model's dtype."""

    @functools.wraps(method)
    def run(self: "LDAE", *args: P.args, **options: P.kwargs) -> R:
        reduced = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype if reduced else None, enabled=reduced):
            return method(self, *args, **options)

    return run


class LDAE:
    """A trained model.

    Args:
        autoencoder: network of stage 1.
        encoder: semantic encoder of stage 3.
        denoiser: U-Net and gradient estimator with their diffusion process.
        scale: (C,), 1 / standard deviation of each latent channel.
        sampler: the default sampler. Its guidance form, strength and stop are used for both inversion and decoding.
        shape: (X, Y, Z) of a volume, in voxels.
        transform: brings a scan's file to model space; None if only tensors are used.
        device: None selects a GPU if there is one.
        bundle: what the model was built from; `export`, `probes` and `direction` need it.
        dtype: precision of the networks: float32, bfloat16 or float16. Samplers always compute in float32.
        batch_size: largest number of volumes that the encoder and the autoencoder process at a time.
        preprocess: preprocessing for scans that fail the out-of-distribution check; None rejects such scans.
        view: what the encoder sees of a scan; None: the volumes.
        prior: the distribution of y, for samples; None: samples are of the U-Net alone.

    Raises:
        UserError: `dtype` is none of the three, or `device` is mps.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        encoder: nn.Module,
        denoiser: Denoiser,
        scale: Tensor | Sequence[float],
        sampler: Sampler,
        shape: Sequence[int],
        transform: Transform | None = None,
        device: str | torch.device | None = None,
        bundle: Bundle | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        preprocess: TrainingPreprocessing | None = None,
        view: View | None = None,
        prior: SemanticPrior | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype}: choose one of {', '.join(map(str, DTYPES))}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "mps":
            raise UserError("device=mps: it has no float64, which the noise schedule needs; use device=cpu")
        self.autoencoder, self.encoder, self.denoiser = autoencoder, encoder, denoiser
        channels_last = computes_channels_last(self.device, dtype)
        for module in (autoencoder, encoder, denoiser.unet, denoiser.estimator):
            place_module(module, self.device, channels_last).eval().requires_grad_(False)
        denoiser.schedule.to(self.device)
        denoiser.graphs = GraphCache(self.device) if self.device.type == "cuda" else None
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
        self.sampler = sampler
        self.shape = tuple(shape)
        self.transform = transform
        self.bundle = bundle
        self.dtype, self.batch_size, self.preprocess = dtype, batch_size, preprocess
        self.view = view
        self.prior = prior
        if prior is not None:
            prior.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        sampler: Sampler | None = None,
        trust: Sequence[str] = (),
        runs: str | Path = "runs",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        preprocess: bool | None = True,
    ) -> "LDAE":
        """Load the model of a run, `runs/<name>` or its name alone, or of an exported bundle.

        Args:
            sampler: replaces the sampler stored with the model.
            trust: additional modules whose classes a bundle may name (ldae/bundle/).
            runs: folder of runs, if `path` is a name.
            preprocess: whether raw scans may be preprocessed as the training scans were; otherwise they are rejected.

        Raises:
            UserError: there is no such model, a stage or file is missing or altered, or weights do not fit.
        """
        bundle = Bundle.find(path, runs, trust)
        networks = {name: network.build() for name, network in bundle.networks.items()}
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
            dtype=dtype,
            batch_size=batch_size,
            preprocess=TrainingPreprocessing(transform, bundle.preprocess, bundle.affine) if preprocess else None,
            view=None if bundle.view is None else instantiate(bundle.view),
            prior=networks.get("prior"),
        )

    def export(self, folder: str | Path) -> Path:
        """Write the model as a bundle, a folder that can be moved and shared, and return the folder.

        Raises:
            UserError: the model was not loaded from a run or bundle, or its files have changed since.
        """
        if self.bundle is None:
            raise UserError("only a model that was loaded from a run or a bundle can be exported")
        return self.bundle.save(folder)

    # Scans

    def open(
        self,
        source: Source,
        check: bool = True,
        preprocess: PreprocessMode | bool | None = "auto",
        orientation: str | None = None,
    ) -> Scan:
        """Bring a scan to model space, and keep what is needed to bring results back to the scan's own grid.

        Args:
            check: reject a scan that fails the out-of-distribution check, unless preprocessing can help, or that is
                outside the limits of the training preprocessing.
            preprocess: "auto": run the training preprocessing if the scan fails the out-of-distribution check and the
                training scans are known to have been preprocessed; "always"; "never". None, True and False mean the
                same three.
            orientation: RAS or LAS, assumed if the scan's file states no orientation; None rejects such a scan.

        Raises:
            BadScan: the scan is rejected; the message gives the reason.
            UserError: the model has no transform, or no preprocessing although "always" was asked for.
        """
        if self.transform is None:
            raise UserError("this model has no transform and takes tensors only; load it from a run or a bundle")
        if preprocess not in _MODES:
            raise UserError(f"preprocess={preprocess!r}: choose auto, always or never")
        mode, steps = _MODES[preprocess], self.preprocess
        if mode == "always" and steps is None:
            raise UserError("this model was loaded without preprocessing; load it with preprocess=True")
        if mode == "never" or (mode == "auto" and steps is not None and not steps.training_scans_preprocessed):
            steps = None
        if steps is not None and (orientation is not None or not check):
            steps = replace(steps, assume_orientation=orientation, limited=check)
        transform = self.transform.assuming(orientation)
        ood_check = self.ood_check if check else None
        return open_scan(source, transform, ood_check, steps, mode == "always", self.view)

    def opened(self, x: Scans) -> "Tensor | Scan | list[Scan]":
        """`x` with every scan opened, so that it is read only once; tensors are left as they are."""
        if isinstance(x, Tensor | Scan):
            return x
        return [self.opened(item) for item in x] if isinstance(x, list | tuple) else self.open(x)

    def volumes(self, x: Scans) -> Tensor:
        """(B, 1, X, Y, Z) on the model's device; a tensor is taken to be in model space, scans pass through `open`."""
        if isinstance(x, Tensor):
            return x.to(self.device)
        if isinstance(x, list | tuple):
            return torch.cat([self.volumes(item) for item in x])
        return (x if isinstance(x, Scan) else self.open(x)).volume.to(self.device)

    def views(self, x: Scans) -> Tensor:
        """What the encoder sees of `x`, (B, channels, X, Y, Z) on the model's device.

        Args:
            x: scans, which pass through `open`; or a tensor of volumes in model space, such as decoded ones, whose view
                is made of what they have (`View.of_volumes`).
        """
        if isinstance(x, Tensor):
            x = x.to(self.device)
            return x if self.view is None else self.view.of_volumes(x)
        if isinstance(x, list | tuple):
            return torch.cat([self.views(item) for item in x])
        return (x if isinstance(x, Scan) else self.open(x)).view.to(self.device)

    @cached_property
    def ood_check(self) -> OodCheck | None:
        """The out-of-distribution check measured on the training scans; None if the model has none."""
        stored = None if self.bundle is None else self.bundle.ood_check
        return None if stored is None else OodCheck.from_dict(stored)

    # Semantic vector and latent

    @_inference
    def embed(self, x: Scans) -> Tensor:
        """Semantic vector y = Enc(x), (B, dim)."""
        return self._in_batches(self.encoder, self.views(x))

    @_inference
    def embed_views(self, views: Tensor) -> Tensor:
        """Semantic vector y of views, as `views` and `Cohort.views` give them, (B, dim)."""
        return self._in_batches(self.encoder, views)

    @_inference
    def attention(self, x: Scans) -> Tensor:
        """Attention weight of the encoder on each slice, (B, slices); rows sum to 1."""
        return self._in_batches(self.encoder.attention, self.views(x))

    @_inference
    def attention_of_views(self, views: Tensor) -> Tensor:
        """The same for views, as `views` and `Cohort.views` give them."""
        return self._in_batches(self.encoder.attention, views)

    @_inference
    def posterior(self, x: Scans) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's posterior, unscaled, (B, C, X', Y', Z') each."""
        both = self._in_batches(lambda part: torch.stack(self.autoencoder.encode(part), 1), self.volumes(x))
        return both[:, 0], both[:, 1]

    def compress(self, x: Scans) -> Tensor:
        """Latent z: the posterior mean, scaled to unit variance."""
        return self.posterior(x)[0] * self.scale

    @_inference
    def decompress(self, z: Tensor) -> Tensor:
        """Volume of a latent, as the autoencoder decodes it: close to [0, 1], but not clipped."""
        return self._in_batches(self.autoencoder.decode, z.to(self.device) / self.scale)

    # Diffusion: from a latent to its code and back

    @_inference
    def invert(
        self,
        z: Tensor,
        y: Tensor,
        steps: int | None = None,
        sampler: Sampler | None = None,
        strength: float | None = None,
        depth: float = 1.0,
        noise: Tensor | None = None,
        renoise: float = 0.0,
    ) -> Code:
        """The code (z_T) of a latent given y.

        Args:
            steps: number of steps; None: the sampler's.
            sampler: replaces the model's.
            strength: of guidance; None: the sampler's.
            depth, noise, renoise: see Sampler.invert.
        """
        sampler = self._sampler(steps, sampler)
        eps_fn = self._guided_eps(y, sampler, strength)
        return sampler.invert(eps_fn, z.to(self.device), self.denoiser.schedule, depth, noise, renoise)

    @_inference
    def generate(
        self,
        code: Code | Tensor,
        y: Tensor,
        steps: int | None = None,
        sampler: Sampler | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """Latent z_0 sampled from a code, or from noise, given y; arguments as in `invert`."""
        sampler = self._sampler(steps, sampler)
        return sampler.sample(self._guided_eps(y, sampler, strength), code.to(self.device), self.denoiser.schedule)

    def decode(
        self,
        code: Code | Tensor,
        y: Tensor,
        steps: int | None = None,
        sampler: Sampler | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """Volume decoded from a code, or from noise, given y, clipped to [0, 1]; arguments as in `invert`."""
        return self.decompress(self.generate(code, y, steps, sampler, strength)).clamp(0, 1)

    # What one does with a model

    def reconstruct(self, x: Scans, steps: int | None = None, depth: float = 1.0) -> Tensor:
        """The scan decoded from its y and its own code, inverted up to `depth`. From y alone: see `vary`."""
        x = self.opened(x)
        y = self.embed(x)
        return self.decode(self.invert(self.compress(x), y, steps, depth=depth), y, steps)

    def vary(self, x: Scans, count: int, seed: int = 0, steps: int | None = None) -> Tensor:
        """One scan's y decoded with `count` random codes, (count, 1, X, Y, Z); code i depends on (seed, i) only."""
        return self.decode(self.noise(count, seed), self.embed(x).expand(count, -1), steps)

    def interpolate(self, xa: Scans, xb: Scans, t: float | Tensor, steps: int | None = None) -> Tensor:
        """Between two scans: y on the line between theirs, the code on the arc (slerp); t in [0, 1], 0 is `xa`."""
        return next(self.interpolate_each(xa, xb, [t], steps))

    def interpolate_each(
        self, xa: Scans, xb: Scans, ts: Sequence[float | Tensor], steps: int | None = None
    ) -> Iterator[Tensor]:
        """`interpolate` at each of `ts`; the two scans are inverted only once."""
        xa, xb = self.opened(xa), self.opened(xb)
        ya, yb = self.embed(xa), self.embed(xb)
        code_a = self.invert(self.compress(xa), ya, steps)
        code_b = self.invert(self.compress(xb), yb, steps)
        for t in ts:
            weight = torch.as_tensor(t, dtype=ya.dtype, device=self.device).view(-1, 1)
            yield self.decode(code_a.slerp(code_b, t), torch.lerp(ya, yb, weight.expand_as(ya)), steps)

    def manipulate(
        self,
        x: Scans,
        direction: str | EditDirection,
        alpha: float | None = None,
        seed: int = 0,
        *,
        by: float | None = None,
        **settings: Unpack[EditSettings],
    ) -> Tensor:
        """The scan with y moved along a direction, decoded from the scan's own code.

        Args:
            direction: the name of a direction or probe, or an object with `edit(y, alpha)`.
            alpha: size of the edit: 1 is the mean distance between the two classes along the direction in the training
                scans, or one standard deviation of a number; `direction(name).alpha_scale.meaning` says which.
            seed: of the noise, if `renoise` is used.
            by: in place of alpha, the change of a number in its own unit: 10 is ten years older for "age". It is
                calibrated by the probe's read-out along the direction on the training scans.
            settings: replace the model's own settings of an edit, see editing.editor.Editor.

        Raises:
            UserError: neither or both of alpha and `by` are given, or the direction cannot be counted in a unit.
        """
        direction = self.direction(direction) if isinstance(direction, str) else direction
        if (alpha is None) == (by is None):
            raise UserError("an edit has one size: give alpha or by")
        if by is not None:
            if not isinstance(direction, Direction):
                raise UserError("by: only a direction of ldae.editing.direction can be counted in a unit; give alpha")
            alpha = direction.alpha_for(by)
        return next(self.manipulate_each(x, direction, [alpha], seed, **settings))

    def manipulate_each(
        self,
        x: Scans,
        direction: str | EditDirection,
        alphas: Sequence[float],
        seed: int = 0,
        y: Tensor | None = None,
        **settings: Unpack[EditSettings],
    ) -> Iterator[Tensor]:
        """`manipulate` with each of `alphas`; the scan is inverted only once.

        Args:
            y: semantic vectors of `x`, if they are known already.
        """
        direction = self.direction(direction) if isinstance(direction, str) else direction
        editor = self.readouts.editor.with_settings(**settings)
        x = self.opened(x)
        y = self.embed(x) if y is None else y
        code = editor.invert(self, self.compress(x), y, seed, range(len(y)))
        for alpha in alphas:
            yield editor.decode(self, code, direction.edit(y, alpha))

    ladder = manipulate_each  # its former name

    def forecast_each(
        self,
        x: Scans,
        years: Sequence[float],
        known: Mapping[str, str | float] | None = None,
        draws: int = 8,
        seed: int = 0,
        steps: int | None = None,
    ) -> Iterator[ScanForecast]:
        """The change of one scan that is expected after each of `years`, as it was learned from pairs of visits.

        Args:
            known: columns about the scan, {"age": 71, "diagnosis": "MCI"}; one that is missing counts as its mean.
            draws: random draws for the standard deviation of each voxel; 0: none.
            seed: of the draws.

        Raises:
            UserError: the model has no forecaster, a time is not positive, a column cannot be read, or the age is
                needed and missing.
        """
        check_years(years)
        forecaster, row = self.forecaster, parse_row(self.forecaster, known or {})
        forecaster = replace(forecaster, editor=forecaster.editor.with_settings(steps=steps))
        x = self.opened(x)
        return forecast_scan(self, forecaster, self.compress(x), self.embed(x), row, years, draws, seed)

    def sample(
        self,
        count: int,
        seed: int = 0,
        steps: int | None = None,
        where: Mapping[str, object] | None = None,
        use_prior: bool | None = None,
    ) -> Tensor:
        """`count` synthetic volumes, (count, 1, X, Y, Z); volume i depends on (seed, i) and `where` only.

        y is drawn from the prior (`draw_semantics` with the same arguments also gives the labels), then the scan by the
        latent diffusion with that y.

        Args:
            where: values of the prior's columns, such as {"diagnosis": "AD", "age": 75}; others are drawn.
            use_prior: False: from the U-Net alone, without any y. None: with the prior if the model has one.

        Raises:
            UserError: the model has no prior although it is needed, or `where` asks for what the prior does not know.
        """
        if use_prior is None:
            use_prior = self.prior is not None or bool(where)
        noise = self.noise(count, seed)
        if use_prior:
            return self.decode(noise, self.draw_semantics(range(count), seed, where).y, steps)
        if where:
            raise UserError("where: without the prior, samples cannot be asked for by their labels")
        return self.sample_from(noise, steps)

    def draw_semantics(
        self, keys: Sequence[int], seed: int = 0, where: Mapping[str, object] | None = None
    ) -> SemanticDraws:
        """y and labels of people who do not exist, one for each key; see `sample`."""
        return draw_semantics(self.semantic_prior, keys, seed, where)

    @property
    def semantic_prior(self) -> SemanticPrior:
        """The distribution of y.

        Raises:
            UserError: the model has none.
        """
        if self.prior is None:
            name = self.bundle.sources.get("run", "NAME") if self.bundle is not None else "NAME"
            raise UserError(
                f"this model has no prior of y: train it with `python train.py stage=prior name={name}` and the other "
                "settings of its run (and export the bundle again)"
            )
        return self.prior

    @_inference
    def sample_from(self, noise: Tensor, steps: int | None = None) -> Tensor:
        """Unconditional volumes of noise z_T (B, C, X', Y', Z'), from the U-Net alone, clipped to [0, 1]."""
        z = self._sampler(steps).sample(self.denoiser.eps, noise.to(self.device), self.denoiser.schedule)
        return self.decompress(z).clamp(0, 1)

    # Probes and directions

    @cached_property
    def readouts(self) -> Readouts:
        """Probes, directions and edit settings that evaluate.py stored with the model; empty without any."""
        bundle = self.bundle
        return Readouts() if bundle is None else Readouts.read(bundle.probes, bundle.directions, bundle.weights_hash)

    @property
    def probes(self) -> Mapping[str, LinearModel]:
        """Linear probes of y, by name."""
        return self.readouts.probes

    def direction(self, name: str) -> Direction:
        """A direction by name: alpha > 0 moves towards the probe's positive class or larger values.

        Raises:
            UserError: the model has neither a direction nor a probe of this name.
        """
        return self.readouts.direction(name)

    @cached_property
    def forecaster(self) -> Forecaster:
        """How y moves over the years, which evaluation=[forecast] stored with the model.

        Raises:
            UserError: it has stored nothing, or the file is damaged or of other networks.
        """
        bundle = self.bundle
        if bundle is None or bundle.forecast is None:
            raise UserError(
                "this model has no forecast: run `python evaluate.py evaluation=[forecast] name=NAME`, which needs "
                "training subjects with several visits, and export the bundle again if it is one"
            )
        return read_forecaster(bundle.forecast, bundle.weights_hash)

    # Primitives

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """z_T ~ N(0, I), (count, C, X', Y', Z'); sample i depends on (seed, i) only."""
        return self.noise_of(range(count), seed)

    def noise_of(self, keys: Sequence[int], seed: int = 0) -> Tensor:
        """z_T of the samples with these numbers, (B, C, X', Y', Z')."""
        shape = (self.autoencoder.latent_channels, *latent_sizes(self.shape, self.autoencoder.strides))
        return draw_normal(shape, seed, keys, "sample").to(self.device)

    @_inference
    def predict_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Unconditional eps of z_t at t (B,), (B, C, X', Y', Z')."""
        return self.denoiser.eps(z_t.to(self.device), t.to(self.device))

    @_inference
    def estimate_gradient(self, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Gradient estimate G(z_t, t, y), (B, C, X', Y', Z')."""
        return self.denoiser.gradient(z_t.to(self.device), t.to(self.device), y.to(self.device))

    def _in_batches(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part).float() for part in x.to(self.device).split(self.batch_size)])

    def _sampler(self, steps: int | None, sampler: Sampler | None = None) -> Sampler:
        sampler = sampler or self.sampler
        return sampler if steps is None else sampler.with_steps(steps)

    def _guided_eps(self, y: Tensor, sampler: Sampler, strength: float | None) -> GuidedEps:
        guidance = sampler.guidance if strength is None else replace(sampler.guidance, strength=strength)
        return self.denoiser.guided_eps(y.to(self.device), guidance)
