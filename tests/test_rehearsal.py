"""Every stage and every method of a model runs, at all sizes, on a simulated GPU without waiting for it (rehearsal.py),
in the memory formats and with the autocast that CUDA gets; and known mistakes of this kind are detected."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

import rehearsal
from ldae.config import compose_config
from ldae.data.augmentation import Augmentation
from ldae.data.cohort import Cohort
from ldae.data.latents import LatentSet
from ldae.denoiser import Denoiser
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.sizes import latent_sizes
from ldae.pipeline import LDAE
from ldae.runs import estimator_node
from ldae.training.ema import Ema
from rehearsal import META, Rehearsal, on_meta

FULL = ["data=table", "data.table=none.csv", "data.shape=[128,160,128]", "data.spacing=1.5"]
SIZES = {
    "smoke": ["experiment=smoke"],
    "base": [*FULL, "model=base", "diffusion=linear_v"],
    "published": [*FULL, "model=published", "diffusion=linear"],
    "components": ["experiment=smoke", "model/encoder=components"],
    "components_cnn": ["experiment=smoke", "model/encoder=components_cnn"],
}
COUNT = 6  # scans


def composed(size, stage, *more):
    return compose_config("train", [*SIZES[size], f"stage={stage}", *more])


def cohort(config):
    """Empty scans, (B, 1, X, Y, Z) float16 as in the cache."""
    shape = tuple(config.data.shape)
    volumes = SimpleNamespace(
        shape=shape,
        read_stored=lambda rows: torch.zeros(len(rows), 1, *shape, dtype=torch.float16),
        batch=lambda rows: torch.zeros(len(rows), 1, *shape),
        decode=lambda stored: stored.float(),
    )
    table = pd.DataFrame(
        {"subject": [f"s{i}" for i in range(COUNT)], "session": "ses-M000", "split": ["train"] * 4 + ["val"] * 2}
    )
    transform = SimpleNamespace(shape=shape, key=lambda: "key")
    return Cohort(table, table[:0], volumes, transform, "h", Augmentation(rotation=5.0, flip=0.5, contrast=0.1))


def latents(config, scans):
    autoencoder = on_meta(lambda: instantiate(config.model.autoencoder))
    shape = (COUNT, autoencoder.latent_channels, *latent_sizes(config.data.shape, autoencoder.strides))
    scale = torch.ones(shape[1])
    return LatentSet(scans.table, torch.zeros(shape), torch.ones(shape), scale, "h", "sha")


class Predecessor:
    """A finished stage with its weights on the device."""

    def __init__(self, config):
        self.config, self.path = config, SimpleNamespace(name="run")
        scale = [1.0] * on_meta(lambda: instantiate(config.model.autoencoder)).latent_channels
        self.metadata = {"split_hash": "h", "autoencoder_sha256": "sha", "scale": scale, "weights": {}}

    def module(self, name, node):
        return on_meta(lambda: instantiate(node)).eval().requires_grad_(False)

    def sha256(self, name):
        return "sha"


@pytest.fixture
def stage_of(monkeypatch):
    """Builds a stage and prepares it on the device; brain masks and `read_metrics`, which need values, are replaced."""
    monkeypatch.setattr(torch, "autocast", rehearsal.Autocast)
    for name in ("aekl", "pretrain", "repr"):
        monkeypatch.setattr(f"ldae.stages.{name}.build_adam", rehearsal.FusedAdam)
    monkeypatch.setattr(
        "ldae.evaluation.images.image_metrics.brain_mask", lambda x: torch.ones(x.shape, dtype=torch.bool)
    )
    monkeypatch.setattr(
        "ldae.training.validation.read_metrics",
        lambda rows: {row: {name: check_scalar(value) for name, value in m.items()} for row, m in rows.items()},
    )

    # Two points of the noise schedule instead of ten: every point is computed by the same lines.
    monkeypatch.setattr("ldae.evaluation.images.semantics.BANDS", 1)

    def build(size, name, precision="bf16", *more):
        quick = ["trainer.validation_scans=2", *(["stage.sampler.steps=1"] if name == "repr" else [])]
        config = composed(size, name, *quick, *more)
        scans = cohort(config)
        scan_latents = latents(config, scans)
        monkeypatch.setattr("ldae.stages.pretrain.open_latents", lambda *_: scan_latents)
        monkeypatch.setattr("ldae.stages.repr.open_latents", lambda *_: scan_latents)
        space = SimpleNamespace(
            predecessor=lambda *_: Predecessor(config), split_file="split.csv", split_hash=lambda: None,
            stage=lambda name: SimpleNamespace(path=Path("nowhere") / name),
        )  # fmt: skip
        parts = {"workspace": space} | ({"cohort": scans} if get_class(config.stage["_target_"]).reads_scans else {})
        stage = on_meta(lambda: instantiate(config.stage, _partial_=True)(**parts))
        settings, optim = OmegaConf.to_object(config.trainer), OmegaConf.to_object(config.optim)
        stage.prepare(rehearsal.Accelerator(precision), settings, optim, seed=0)
        return stage

    return build


def check_scalar(value):
    assert value.is_meta
    assert value.numel() == 1
    return 0.0


def batches(stage, count=2, accumulate=2):
    """Micro-batches on the host, as the threads of data/stream.py make them."""
    made = []
    for number in range(accumulate):
        index = np.arange(number * count, (number + 1) * count) % stage.num_samples
        made.append({"index": index, "position": index, "number": number, **stage.fetch(index, index, number)})
    return made


SIZES_AND_STAGES = [(size, stage) for size in ("smoke", "base", "published") for stage in ("aekl", "pretrain", "repr")]
SIZES_AND_STAGES += [("components", "repr"), ("components_cnn", "repr")]


@pytest.mark.parametrize(("size", "name"), SIZES_AND_STAGES)
def test_a_step_and_a_validation_of_every_stage_read_nothing_back(stage_of, size, name):
    with Rehearsal() as mode:
        stage = stage_of(size, name)
        made = batches(stage)
        with mode.step():
            result = stage.run_step(made, step=1)
        assert all(value.is_meta and value.ndim == 0 for value in result.scalars.values())
        assert result.skipped.is_meta
        assert result.finite.shape == (2,)
        assert all(optimizer.steps == 1 for optimizer in stage.optimizers.values())
        with torch.no_grad(), stage.averaged():
            metrics = stage.validate()
    assert metrics


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["aekl", "pretrain", "repr"])
def test_every_stage_trains_in_both_memory_formats_and_precisions(stage_of, name, precision, channels_last):
    with Rehearsal() as mode:
        stage = stage_of(
            "smoke",
            name,
            precision,
            f"trainer.channels_last={channels_last}",
            f"trainer.checkpointing={precision == 'no'}",
        )
        with mode.step():
            stage.run_step(batches(stage), step=1)
    weights = [p for module in stage.modules.values() for p in module.parameters() if p.ndim in (4, 5)]
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    assert weights
    assert all(not channels_last or weight.is_contiguous(memory_format=layouts[weight.ndim]) for weight in weights)


def model_of(size, dtype):
    config = composed(size, "repr")
    nodes = config.model
    autoencoder, unet, encoder = (
        on_meta(lambda n=n: instantiate(nodes[n])) for n in ("autoencoder", "unet", "encoder")
    )
    estimator = on_meta(lambda: instantiate(estimator_node(nodes.unet, encoder.dim, nodes.estimator)))
    diffusion = [instantiate(node) for node in (config.diffusion.schedule, config.diffusion.parameterisation)]
    return LDAE(
        autoencoder=autoencoder,
        encoder=encoder,
        denoiser=Denoiser(unet, estimator, *diffusion),
        scale=torch.ones(autoencoder.latent_channels, device=META),
        sampler=instantiate(config.sampler).with_steps(1),
        shape=config.data.shape,
        device=META,
        dtype=dtype,
    )


# float32 is computed in another memory format, whatever the size.
@pytest.mark.parametrize(
    ("size", "dtype"),
    [("smoke", torch.float32), *((size, torch.bfloat16) for size in ("smoke", "base", "published", "components_cnn"))],
)
def test_every_method_of_a_model_runs_without_reading_a_value(monkeypatch, size, dtype):
    monkeypatch.setattr(torch, "autocast", rehearsal.Autocast)
    with Rehearsal() as mode:
        model = model_of(size, dtype)
        x = torch.zeros(1, 1, *model.shape).to(META)
        with mode.step():
            y = model.embed(x)
            if isinstance(model.encoder, SemanticEncoder):
                assert model.attention(x).shape == (1, model.encoder.slices)
            z = model.compress(x)
            code = model.invert(z, y)
            assert code.z.shape == z.shape
            assert code.z.dtype == torch.float32
            assert model.decode(code, y).shape == x.shape
            assert model.reconstruct(x).shape == x.shape
            edit = SimpleNamespace(edit=lambda y, alpha: y + alpha)
            assert model.manipulate(x, edit, 0.5).shape == x.shape
        assert model.interpolate(x, x, 0.5).shape == x.shape
        assert model.sample(2).shape == (2, 1, *model.shape)


def single_memory_format(module, device, channels_last):
    """One memory format for all weights, whatever their number of axes."""
    return module.to(memory_format=torch.channels_last_3d)


def test_one_memory_format_for_all_weights_is_detected(stage_of, monkeypatch):
    monkeypatch.setattr("ldae.stages.repr.place_module", single_memory_format)
    with Rehearsal(), pytest.raises(RuntimeError, match="rank"):
        stage_of("smoke", "repr")


def test_reading_a_value_inside_a_step_is_detected(stage_of, monkeypatch):
    def reading(self, step, skipped=None):
        if float(skipped) == 0:
            raise AssertionError("the value was read")

    monkeypatch.setattr(Ema, "update", reading)
    with Rehearsal():
        stage = stage_of("smoke", "pretrain")
        with pytest.raises(RuntimeError, match=r"item|meta"):
            stage.run_step(batches(stage), 0)


def test_a_batch_that_is_left_on_the_cpu_is_detected(stage_of, monkeypatch):
    monkeypatch.setattr("ldae.stages.pretrain.batch_to_device", lambda batch, device: batch)
    with Rehearsal():
        stage = stage_of("smoke", "pretrain")
        with pytest.raises(RuntimeError, match="on the device and on the CPU"):
            stage.run_step(batches(stage), 0)


def test_a_copy_that_waits_is_detected(stage_of, monkeypatch):
    waiting = lambda batch, device: {n: v.to(device) if torch.is_tensor(v) else v for n, v in batch.items()}  # noqa: E731
    monkeypatch.setattr("ldae.stages.pretrain.batch_to_device", waiting)
    with Rehearsal() as mode:
        stage = stage_of("smoke", "pretrain")
        with mode.step(), pytest.raises(RuntimeError, match="non_blocking"):
            stage.run_step(batches(stage), 0)


def test_a_boolean_index_is_detected():
    x = torch.zeros(3, device=META)
    with Rehearsal(), pytest.raises((RuntimeError, NotImplementedError)):
        x[x > 0]


def test_the_last_convolution_of_the_u_net_is_in_float32_and_inner_layers_in_bfloat16(stage_of):
    with Rehearsal():
        stage = stage_of("smoke", "pretrain")
        unet, seen = stage.modules["unet"], {}
        block = unet.path.up[0][0]
        for name, module in {"last": unet.path.conv, "inner": block.conv1, "norm": block.norm1}.items():
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (inputs[0].dtype, output.dtype)})
            )
        stage.run_step(batches(stage), 0)
    assert seen["last"] == (torch.float32, torch.float32)
    assert seen["inner"] == (torch.bfloat16, torch.bfloat16)
    assert seen["norm"] == (torch.bfloat16, torch.bfloat16), "the output of a norm has the dtype of its input"
