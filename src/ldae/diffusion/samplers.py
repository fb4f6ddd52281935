"""Samplers as config groups: settings around the functions `ddim`, `ddpm`, `multistep` and `exact`."""

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

STEPS_FOR_ORDER_3 = 15  # below that, the third-order solver can be unstable (see Multistep)


@dataclass(frozen=True)
class Sampler(ABC):
    """Sampling and inversion on a path of noise levels.

    Args:
        steps: S, the number of steps of one sampling or inversion, whatever its depth.
        grid: "uniform", "log_snr", "angle" or "balanced" (grids.py).
        end: "closed" or "published" (grids.py).
        clip: clamp the predicted z_0 to [-clip, clip]; None does not clip, as latents of unit variance require.
        guidance: how y shifts eps. Not used here: the caller builds the guided eps_fn with it.
    """

    steps: int = 20
    grid: str = "balanced"
    end: str = "closed"
    clip: float | None = None
    guidance: Guidance = field(default_factory=Guidance)

    @property
    def evaluations(self) -> int:
        """Largest number of network evaluations of one `sample` or one `invert`."""
        return self.steps

    def with_steps(self, steps: int) -> Self:
        """This sampler with another number of steps."""
        return replace(self, steps=steps)

    def path(self, schedule: Schedule, depth: float = 1.0) -> Path:
        """The nodes in order of increasing noise, up to t = depth (T - 1)."""
        return make_path(schedule, self.steps, self.grid, self.end, depth)

    @abstractmethod
    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        """z_0 from a code, along a path of decreasing noise."""

    @abstractmethod
    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        """The last and, for an exact scheme, the second last latent along a path of increasing noise."""

    def sample(self, eps_fn: EpsFn, code: Code | Tensor, schedule: Schedule) -> Tensor:
        """z_0 (B, ...) from a code, or from noise (B, ...) at full depth, in its dtype."""
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
        """The code of z0 (B, ...), from which `sample` returns z0 up to the error of the scheme.

        Args:
            depth: invert only up to t = depth (T - 1), with the same number of steps; stored in the code.
            noise: standard normal noise of the shape of z0; required with `renoise`.
            renoise: share of the steps, at the noise-free end, that is replaced by adding `noise` (arXiv 2410.23530).
                Those first steps write structure of the latent into the code, which then resists edits.

        Raises:
            UserError: `renoise` is not in [0, 1], or `noise` is missing.
        """
        path = self.path(schedule, depth)
        start = round(renoise * (len(path) - 1))
        if start:
            if noise is None or start >= len(path):
                raise UserError(f"renoise={renoise}: give a number in [0, 1], together with noise")
            z0 = float(path.alpha[start]) * z0 + float(path.sigma[start]) * noise
            path = path[start:]
        z, neighbour = self._ascend(eps_fn, z0, path) if len(path) > 1 else (z0, None)
        return Code(z, neighbour, depth)


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (ddim.py): order 1, one evaluation per step; the published sampler."""

    steps: int = 100
    grid: str = "uniform"

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return ddim(eps_fn, code.z, path, self.clip)

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return ddim(eps_fn, z, path, self.clip), None


@dataclass(frozen=True)
class Multistep(Sampler):
    """Adams predictor-corrector in the angle (multistep.py): one evaluation per step. The default sampler.

    Measured on eight analytic networks in 64 dimensions: Gaussians of variance 1/i and 1/i^2, mixtures of 5 wide and of
    40 narrow Gaussians, each with a smooth error of v (rms 0.15) or of eps (rms 0.03); linear schedule, closed end.
    Median over samples of the rms error against a solution of 800 steps, for latents of variance 1, largest of the
    eight:

                                     sampling   inversion   there and back
        DDIM, uniform, 100             0.020      0.076        0.039
        order 3, balanced, 20          0.004      0.003        0.003
        order 2, balanced, 20          0.008      0.011        0.011
        order 3, uniform, 20           0.028      0.127        0.041
        Exact, balanced, 20            0.052      0.030        0 (rounding)

    At 10 steps, order 3 is unstable on the narrow mixtures and with errors of eps at high noise (0.15 and more) while
    order 2 is stable (0.03, 0.045, 0.07), hence the lower order below `STEPS_FOR_ORDER_3`. A latent near the border
    between two narrow modes may return in the other mode with every scheme except `Exact`.

    Args:
        order: of predictor and corrector, 1 to 3; at most 2 is used below `STEPS_FOR_ORDER_3` steps.
        corrector: correct every step with the evaluation that the next step needs in any case.

    Raises:
        UserError: another order.
    """

    steps: int = 15
    order: int = 3
    corrector: bool = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UserError(f"sampler.order={self.order}: choose 1, 2 or 3")

    @property
    def used_order(self) -> int:
        """The order that is used with this number of steps."""
        return self.order if self.steps >= STEPS_FOR_ORDER_3 else min(self.order, 2)

    def _walk(self, eps_fn: EpsFn, z: Tensor, path: Path) -> Tensor:
        return multistep(eps_fn, z, path, self.used_order, self.corrector, self.clip)

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return self._walk(eps_fn, code.z, path)

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return self._walk(eps_fn, z, path), None


@dataclass(frozen=True)
class Exact(Sampler):
    """Two-step scheme whose inversion is exact up to rounding error (exact.py); its codes contain a second latent.

    It takes `steps` evaluations, one fewer when it samples from a code with the second latent.

    Raises:
        UserError: fewer than 2 steps.
    """

    def __post_init__(self) -> None:
        if self.steps < 2:  # with one step, the second latent would be z_0 itself
            raise UserError(f"sampler.steps={self.steps}: an exact scheme needs at least 2")

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return exact(eps_fn, code.z, path, code.neighbour, self.clip)[0]

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return exact(eps_fn, z, path, None, self.clip)


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (ddpm.py), as a reference: it needs many steps and cannot invert.

    Args:
        seed: of the noise that every step adds; sample i of a batch gets the same noise whatever the batch size.
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
