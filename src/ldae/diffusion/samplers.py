"""Samplers as config: how many steps on which path, around the free functions that do the walking."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from ldae.diffusion.code import Code, as_code
from ldae.diffusion.ddim import ddim
from ldae.diffusion.ddpm import ddpm
from ldae.diffusion.exact import exact
from ldae.diffusion.grids import Path, make_path
from ldae.diffusion.guidance import EpsFn, Guidance
from ldae.diffusion.multistep import multistep
from ldae.diffusion.schedule import Schedule
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal

STEPS_FOR_ORDER_3 = 15


@dataclass(frozen=True)
class Sampler(ABC):
    """What all samplers share.

    Args:
        steps: S, of the whole path, whatever its depth.
        grid: uniform, log_snr, angle or balanced (grids.py).
        end: closed or published (grids.py).
        clip: clamp the predicted z_0 to [-clip, clip]; None: off, as unit-variance latents need.
        guidance: form, strength and stop, for whoever builds the guided eps_fn.
    """

    steps: int = 20
    grid: str = "balanced"
    end: str = "closed"
    clip: float | None = None
    guidance: Guidance = field(default_factory=Guidance)

    @property
    def evaluations(self) -> int:
        """Network evaluations of one `sample` or one `invert`, at most."""
        return self.steps

    def with_steps(self, steps: int) -> Self:
        """The same sampler with another number of steps."""
        return replace(self, steps=steps)

    def path(self, schedule: Schedule, depth: float = 1.0) -> Path:
        """The nodes, ascending in noise up to t = depth (T - 1)."""
        return make_path(schedule, self.steps, self.grid, self.end, depth)

    @abstractmethod
    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        """z_0 from a code along a descending path."""

    @abstractmethod
    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        """z at the end of an ascending path, and what is carried with it."""

    def sample(self, eps_fn: EpsFn, code: Code | Tensor, schedule: Schedule) -> Tensor:
        """z_0 (B, ...) in the dtype of the code, which is a Code or noise (B, ...)."""
        code = as_code(code)
        return self._descend(eps_fn, code, self.path(schedule, code.depth).reversed())

    def invert(
        self,
        eps_fn: EpsFn,
        z0: Tensor,
        schedule: Schedule,
        depth: float = 1.0,
        noise: Tensor | None = None,
        renoise: float = 0.0,
    ) -> Code:
        """The code of z0 (B, ...): `sample` of it gives z0 back, up to the scheme's error.

        Args:
            depth: walk only up to t = depth (T - 1), with the same number of steps; the code remembers it.
            noise: like z0; needed with `renoise`.
            renoise: share of the steps, at the noise-free end, replaced by adding this noise (arXiv 2410.23530): those
                steps write the latent's structure into the code, which makes it resist edits.
        """
        path = self.path(schedule, depth)
        start = round(renoise * (len(path) - 1))
        if start:
            if noise is None or start >= len(path):
                raise UserError(f"renoise={renoise}: must lie in [0, 1] and needs noise")
            z0 = float(path.alpha[start]) * z0 + float(path.sigma[start]) * noise
            path = path[start:]
        z, carried = self._ascend(eps_fn, z0, path) if len(path) > 1 else (z0, None)
        return Code(z, carried, depth)


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM both ways (ddim.py): order 1, one evaluation a step."""

    steps: int = 100
    grid: str = "uniform"

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return ddim(eps_fn, code.z, path, self.clip)

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return ddim(eps_fn, z, path, self.clip), None


@dataclass(frozen=True)
class Multistep(Sampler):
    """Adams predictor-corrector in the angle, both ways (multistep.py): one evaluation a step. The default.

    Measured on analytic networks in 64 dimensions (Gaussians of variance 1/i and 1/i^2, mixtures of 5 wide and of 40
    narrow Gaussians; each with a smooth error of v, rms 0.15, or of eps, rms 0.03; linear schedule, closed end). The
    worst of the eight, medians over samples of the rms error against an 800-step solution, latents of variance 1:

                                     sampling   inversion   there and back
        DDIM, uniform, 100             0.020      0.076        0.039
        order 3, balanced, 20          0.004      0.003        0.003
        order 2, balanced, 20          0.008      0.011        0.011
        order 3, uniform, 20           0.028      0.127        0.041
        Exact, balanced, 20            0.052      0.030        0 (rounding)

    At 10 steps order 3 is unstable on the narrow mixtures and where eps errs at high noise (0.15 and worse), order 2 is
    not (0.03, 0.045, 0.07): hence the lower order below `STEPS_FOR_ORDER_3`. Codes near the border between two narrow
    modes may come back in the other one under any one-tensor scheme; `Exact` returns them.

    Args:
        order: 1 to 3, of predictor and corrector; at most 2 below `STEPS_FOR_ORDER_3` steps.
        corrector: correct each step with the evaluation that the next one needs anyway.
    """

    steps: int = 15
    order: int = 3
    corrector: bool = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UserError(f"sampler.order={self.order}: choose 1, 2 or 3")

    @property
    def used_order(self) -> int:
        """The order that this number of steps allows."""
        return self.order if self.steps >= STEPS_FOR_ORDER_3 else min(self.order, 2)

    def _walk(self, eps_fn: EpsFn, z: Tensor, path: Path) -> Tensor:
        return multistep(eps_fn, z, path, self.used_order, self.corrector, self.clip)

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return self._walk(eps_fn, code.z, path)

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return self._walk(eps_fn, z, path), None


@dataclass(frozen=True)
class Exact(Sampler):
    """Two-step scheme whose inversion is exact to rounding error (exact.py); its codes carry a second tensor.

    `steps` evaluations, one fewer when sampling a code with its second tensor.
    """

    def __post_init__(self) -> None:
        if self.steps < 2:  # one step would carry z_0 itself
            raise UserError(f"sampler.steps={self.steps}: an exact scheme needs at least 2")

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return exact(eps_fn, code.z, path, code.carried, self.clip)[0]

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return exact(eps_fn, z, path, None, self.clip)


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (ddpm.py), for reference: many steps, and no inversion.

    Args:
        seed: of the noise that each step adds; sample i of a batch gets the same draws whatever the batch size.
    """

    steps: int = 1000
    grid: str = "uniform"
    seed: int = 0

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        keys = range(len(code))

        def noise(node: int) -> Tensor:
            return draw_normal(code.z.shape[1:], self.seed, keys, f"ddpm/{node}").to(code.z)

        return ddpm(eps_fn, code.z, path, noise, self.clip)

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        raise UserError("sampler=ddpm is random and cannot invert; choose ddim, multistep or exact")
