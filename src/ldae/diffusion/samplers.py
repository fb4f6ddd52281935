"""Samplers as config: how many steps on which path, around the free functions that do the walking."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from ldae.diffusion.code import Code, as_code
from ldae.diffusion.ddim import ddim
from ldae.diffusion.grids import Path, make_path
from ldae.diffusion.guidance import EpsFn, Guidance
from ldae.diffusion.schedule import Schedule
from ldae.errors import UserError


@dataclass(frozen=True)
class Sampler(ABC):
    """What all samplers share.

    Args:
        steps: S, of the whole path, whatever its depth.
        grid: uniform, log_snr or angle (grids.py).
        end: closed or published (grids.py).
        clip: clamp the predicted z_0 to [-clip, clip]; None: off, as unit-variance latents need.
        guidance: form, strength and stop, for whoever builds the guided eps_fn.
    """

    steps: int = 20
    grid: str = "log_snr"
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

    grid: str = "uniform"
    steps: int = 100

    def _descend(self, eps_fn: EpsFn, code: Code, path: Path) -> Tensor:
        return ddim(eps_fn, code.z, path, self.clip)

    def _ascend(self, eps_fn: EpsFn, z: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
        return ddim(eps_fn, z, path, self.clip), None
