"""Latent space against voxel space: the same networks on voxels (`model/autoencoder=identity`), equal widths and steps.

At full size floating-point operations are counted, which needs no memory; at a reduced size seconds are measured.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from ldae.bench.measure import run_flop_counter
from ldae.bench.settings import SpaceComparison
from ldae.bench.straight import use_plain_kernels
from ldae.bench.tasks import inference
from ldae.bench.variant import VariantUnderTest
from ldae.runs import estimator_node

log = logging.getLogger(__name__)
Compose = Callable[[Sequence[str]], DictConfig]
VOXEL = "model/autoencoder=identity"
PRODUCTS = ("bmm", "baddbmm")  # the products of attention; those of Linears have other names


def _count(work: Callable[[], object]) -> tuple[float, float]:
    """Operations of one call of `work`, and those of attention's two products among them."""
    counter = run_flop_counter(work)
    by_kind = counter.get_flop_counts().get("Global", {})  # empty if the latent is the scan itself
    attention = sum(flop for kind, flop in by_kind.items() if str(kind).rsplit(".", 1)[-1] in PRODUCTS)
    return float(counter.get_total_flops()), float(attention)


def count_operations(config: DictConfig) -> dict[str, float]:
    """Operations for one scan: `evaluation` of both networks, `attention` in it, `autoencoder` in both directions."""
    nodes = config.model
    with torch.device("meta"):
        autoencoder, unet, encoder = (instantiate(nodes[name]) for name in ("autoencoder", "unet", "encoder"))
        estimator = instantiate(estimator_node(nodes.unet, encoder.dim, nodes.estimator))
    for module in (autoencoder, unet, estimator):
        use_plain_kernels(module)
    # Fake tensors of a device that has autocast, which the networks switch off in places.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (autoencoder, unet, estimator):
            module.to_empty(device="cpu")
        x, t, y = torch.empty(1, 1, *config.data.shape), torch.empty(1), torch.empty(1, encoder.dim)

        def evaluate() -> None:
            features = unet.features(z, t)
            unet.head(features)
            estimator(features, y)

        with torch.no_grad():
            z = autoencoder.encode(x)[0]
            both, _ = _count(lambda: autoencoder.decode(autoencoder.encode(x)[0]))
            evaluation, attention = _count(evaluate)
    return {"evaluation": evaluation, "attention": attention, "autoencoder": both}


def compare_spaces(compose: Compose, settings: SpaceComparison, folder: Path) -> dict[str, float]:
    """Compare inversion and decoding, `settings.steps` steps each, in both spaces: the numbers of bench.json."""
    numbers: dict[str, float] = {}
    totals, bare = [], []
    for space, more in (("latent", []), ("voxel", [VOXEL])):
        found = count_operations(compose([*settings.full, *more]))
        totals.append(2 * settings.steps * found["evaluation"] + found["autoencoder"])
        bare.append(totals[-1] - 2 * settings.steps * found["attention"])
        numbers |= {f"voxels/full/{space}_{name}_gflop": flop / 1e9 for name, flop in found.items()}
    numbers["voxels/full/over_voxel_space_flop"] = totals[1] / totals[0]
    numbers["voxels/full/over_voxel_space_flop_without_attention"] = bare[1] / bare[0]
    seconds = []
    for space, more in (("latent", []), ("voxel", [VOXEL])):
        (folder / space).mkdir(parents=True)
        variant = VariantUnderTest(
            compose, [*settings.reduced, *more, f"sampler.steps={settings.steps}"], folder / space
        )
        costs = dict(inference(variant))
        seconds.append(sum(costs[name].seconds for name in ("encode", "invert", "sample", "decode")))
        numbers[f"voxels/reduced/{space}_ms"] = 1e3 * seconds[-1]
        log.info("%s space: %.1f ms", space, 1e3 * seconds[-1])
    numbers["speedup/over_voxel_space"] = seconds[1] / seconds[0]
    return numbers
