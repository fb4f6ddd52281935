"""What all measurements share: their size, the folder of the results, and the budget."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

Numbers = Mapping[str, float | str | list[str] | Mapping[str, float]]  # by name; a mapping for each of several cases


@dataclass(frozen=True)
class Size:
    """Size of the measurements.

    Args:
        bench: option of conf/bench with sizes, batches and repeats.
        chain: overrides of the chain, in addition to experiment=smoke.
        steps: number of training steps of the chain's stages.
        seconds: factor on the estimated times.
        watched: number of training steps whose waits are counted.
    """

    bench: str
    chain: Sequence[str]
    steps: int
    seconds: float
    watched: int


FULL = Size(bench="gpu", chain=(), steps=6, seconds=1.0, watched=10)
SMOKE = Size(
    bench="smoke",
    chain=(
        "data.phantom.subjects=8", "data.shape=[8,8,8]",
        "data.spacing=27.0", "model.autoencoder.channels=[8,8]", "model.unet.base=8", "model.unet.groups=4",
        "model.encoder.dim=16", "model.encoder.backbone.widths=[8,16]",
        "model.discriminator.num_layers_d=1", "stage.sampler.steps=2",
    ),
    steps=2,
    seconds=0.0,
    watched=2,
)  # fmt: skip


class BudgetSpent(BaseException):
    """The budget has ended during a measurement. Not an Exception, so that no library catches it on its way."""


@dataclass
class GpuCheck:
    """One call of the check.

    Args:
        out: folder for the results.
        scratch: folder for made-up files, removed at the end.
        budget: seconds.
    """

    size: Size
    out: Path
    scratch: Path
    budget: float
    started: float = field(default_factory=time.monotonic)
    rates: dict[str, float] = field(default_factory=dict)  # FLOP/s of a matrix product, by dtype
    flop: dict[str, float] = field(default_factory=dict)  # operations of a training step, by model and stage

    @property
    def left(self) -> float:
        """Seconds that are left of the budget."""
        return self.budget - (time.monotonic() - self.started)

    @property
    def device(self) -> "torch.device":
        """The GPU; without one the CPU, on which the same measurements can be tried."""
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def accelerator(self, precision: str) -> str:
        """The override for `precision` (auto is float32) on a GPU; on a CPU always float32."""
        return f"accelerator={precision if self.device.type == 'cuda' else 'cpu'}"

    def composer(self, name: str, *given: str) -> "Callable[[Sequence[str]], DictConfig]":
        """A function from further overrides to the config conf/`name`.yaml with those and `given`."""
        from ldae.config import compose_config

        return lambda more=(): compose_config(name, [*given, *more])

    def bench(self, *given: str) -> "Callable[[Sequence[str]], DictConfig]":
        """The same for the bench at this size."""
        return self.composer("bench", f"bench={self.size.bench}", *given)

    def matrix_rate(self, dtype: "torch.dtype") -> float:
        """FLOP/s of a large matrix product; measured at the first call."""
        from ldae.bench.measure import measure_matrix_rate

        if str(dtype) not in self.rates:
            edge = self.bench()([]).bench.matrix
            self.rates[str(dtype)] = measure_matrix_rate(edge, self.device, dtype)
        return self.rates[str(dtype)]
