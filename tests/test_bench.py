"""Proves the bench: the straight port computes the same functions as our code, bench.json has all its numbers, and a
comparison finds what has become slower; and voxel space: without stage 1, the later stages and sampling run on voxels.
"""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from torch.profiler import ProfilerActivity, profile

from ldae.bench import run as bench_run
from ldae.bench import tasks
from ldae.bench.__main__ import hydra_arguments
from ldae.bench.measure import Cost, count_flops
from ldae.bench.memory import PASSES, compute_footprint
from ldae.bench.results import compare_with_earlier, to_flat_numbers
from ldae.bench.run import run_bench
from ldae.bench.straight import PlainAdam, PlainAttention, PlainEma, use_plain_kernels
from ldae.bench.voxels import count_operations
from ldae.config import check_constructor_arguments, compose_config
from ldae.models.autoencoder import AutoencoderKL
from ldae.models.unet import UNet
from ldae.training.ema import Ema
from ldae.utils.errors import UserError
from small_run import random_weights

UNET = {"base": 8, "multipliers": (1, 2), "residual_blocks": 1, "attention_at": (2,), "groups": 4}
TINY = [
    "model/encoder=base", "data.shape=[8,8,8]", "model.autoencoder.channels=[8,8]", "model.autoencoder.groups=4",
    "model.autoencoder.residual_blocks=1", "model.autoencoder.latent_channels=3", "model.unet.base=8",
    "model.unet.multipliers=[1,2]", "model.unet.attention_at=[2]", "model.unet.groups=4", "model.encoder.dim=16",
    "model.encoder.backbone.widths=[8,8]", "model.encoder.backbone.depths=[1,1]", "model.discriminator.num_layers_d=1",
    "model.discriminator.channels=4",
]  # fmt: skip


def composer(name, *overrides):
    def composed(more=()):
        return compose_config(name, [*overrides, *more])

    return composed


@pytest.mark.parametrize("size", ["small", "full", "gpu", "memory", "smoke"])
def test_every_size_composes_and_so_do_its_variants(size):
    composed = composer("bench", f"bench={size}")
    config = composed()
    check_constructor_arguments(config)
    settings = instantiate(config.bench)
    assert set(settings.tasks) <= set(tasks.TASKS)
    for overrides in settings.variants.values() if size == "small" else ():
        check_constructor_arguments(composed(overrides))


@torch.no_grad()
def test_the_straight_port_computes_the_same_function_of_the_same_weights():
    torch.manual_seed(0)
    unet = random_weights(UNet(**UNET))
    z, t = torch.randn(2, 3, 4, 4, 4), torch.tensor([3.0, 700.0])
    ours = unet(z, t)
    use_plain_kernels(unet)
    assert any(isinstance(module, PlainAttention) for module in unet.modules())
    torch.testing.assert_close(unet(z, t), ours, rtol=1e-4, atol=1e-4)


def test_the_plain_average_equals_the_fused_one():
    unet = UNet(**UNET)
    averages = [kind(unet, 0.9) for kind in (Ema, PlainEma)]
    random_weights(unet)
    for average in averages:
        average.update(3)
    for name, value in averages[0].state_dict().items():
        torch.testing.assert_close(value, averages[1].state_dict()[name])


def test_the_plain_optimiser_skips_a_step_that_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = PlainAdam([weight], lr=0.5)
    for skipped, expected in ((1.0, 1.0), (0.0, 0.5)):
        weight.grad = torch.ones(2)
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((2,), expected))


def test_operations_of_a_product_and_of_attention_are_counted_as_by_hand():
    a = torch.ones(3, 5)
    assert count_flops(lambda: a @ a.T) == 2 * 3 * 5 * 3
    q = torch.ones(1, 1, 7, 4)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 7 * 7 * 4)


def test_gains_multiply_to_the_speed_up():
    costs = {name: {"encode": Cost(seconds, 1, 2e9)} for name, seconds in (("a", 6.0), ("b", 3.0), ("c", 2.0))}
    numbers = to_flat_numbers(costs, {"a": 1e9, "b": 1e9, "c": 2e9})
    assert numbers["speedup/encode"] == pytest.approx(3)
    assert numbers["gain/b/encode"] * numbers["gain/c/encode"] == pytest.approx(3)
    assert numbers["encode/ms"] == pytest.approx(2000)
    assert numbers["encode/matrix_share"] == pytest.approx(0.5)
    assert numbers["a/encode/ms"] == pytest.approx(6000)


def test_a_comparison_names_the_tasks_that_have_become_slower(tmp_path):
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"encode/ms": 100.0, "embed/ms": 100.0}))
    table, slower = compare_with_earlier({"encode/ms": 150.0, "embed/ms": 104.0, "new/ms": 1.0}, path, 0.1)
    assert slower == ["encode"]
    assert "embed" in table
    path.write_text("[1")
    with pytest.raises(UserError, match=r"before\.json"):
        compare_with_earlier({}, path, 0.1)
    assert hydra_arguments(["--against", "x.json", "bench=full"]) == ["bench.against=x.json", "bench=full"]


def test_a_run_writes_every_number_of_every_task(tmp_path, monkeypatch):
    """The real stages and methods of two variants on 8x8x8 voxels."""
    monkeypatch.setattr(tasks, "RAW", (12, 12, 12))
    composed = composer(
        "bench", *TINY, "~bench.variants.kernels", "~bench.variants.architecture", "sampler.steps=2", "bench.scans=3",
        "bench.voxels=null",
        "bench.repeats=1", "bench.matrix=64", "accelerator=cpu", f"paths.runs={tmp_path}",
        "bench.batch={aekl: 1, pretrain: 2, repr: 1}",
    )  # fmt: skip
    run_bench(composed(), composed)
    numbers = json.loads((tmp_path / "bench" / "bench.json").read_text())
    names = ["loading", "reading", "encode", "embed", "invert", "sample", "decode", "reconstruct", "counterfactual"]
    for task in [*names, "train_aekl", "train_pretrain", "train_repr"]:
        assert numbers[f"speedup/{task}"] > 0
        for prefix in ("", "straight/"):
            for column in ("ms", "core_ms", "scans_per_second", "peak_mb", "gflop", "matrix_share", "wait_share"):
                assert np.isfinite(numbers[f"{prefix}{task}/{column}"])
    assert 0 < numbers["straight/train_repr/wait_share"] < 1
    assert all(isinstance(value, float) for value in numbers.values())
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["bench.json"]


def test_a_later_failure_does_not_lose_earlier_measurements(tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("no voxels")

    monkeypatch.setattr(bench_run, "compare_spaces", fail)
    composed = composer(
        "bench", *TINY, "~bench.variants.kernels", "~bench.variants.architecture", "~bench.variants.straight",
        "bench.tasks=[inference]", "bench.scans=3", "bench.repeats=1", "bench.matrix=64", "accelerator=cpu",
        f"paths.runs={tmp_path}", "bench.batch={aekl: 1, pretrain: 2, repr: 1}",
    )  # fmt: skip
    with pytest.raises(UserError, match="no voxels"):
        run_bench(composed(), composed)
    assert json.loads((tmp_path / "bench" / "partial.json").read_text())["embed/ms"] > 0


def test_a_latent_that_is_the_scan_costs_no_autoencoder():
    space = ["model/autoencoder=identity", *[o for o in TINY if "autoencoder" not in o]]
    found = count_operations(composer("bench", *space)())
    assert found["autoencoder"] == 0
    assert found["evaluation"] > found["attention"] > 0


@pytest.mark.parametrize("rows", [1, 3, 64])
@torch.no_grad()
def test_encoding_and_decoding_in_slabs_equal_those_of_the_whole_volume(rows):
    """Also if slabs do not divide the volume, and if its ends differ in brightness, which changes a slab's own mean."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(channels=(8, 8, 16), residual_blocks=1, groups=4).eval()
    x = torch.rand(2, 1, 16, 8, 12) * torch.linspace(0, 1, 16).view(1, 1, -1, 1, 1)
    whole = autoencoder.encode(x)
    decoded = autoencoder.decode(whole[0])
    autoencoder.inference_planes = rows
    for found, expected in zip((*autoencoder.encode(x), autoencoder.decode(whole[0])), (*whole, decoded), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_autoencoder_has_the_same_gradients():
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(channels=(8, 8), residual_blocks=1, groups=4)
    x, noise, gradients = torch.rand(1, 1, 8, 8, 8), torch.randn(1, 3, 4, 4, 4), []
    for autoencoder.checkpointing in (False, True):
        autoencoder.zero_grad()
        autoencoder(x, noise)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in autoencoder.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_the_memory_of_a_step_has_its_parameters_grows_with_the_batch_and_shrinks_with_checkpointing():
    config = composer("bench", *TINY)()
    with torch.device("meta"):
        unet = instantiate(config.model.unet)
        parameters = sum(p.numel() for p in unet.parameters())
        buffers = sum(b.numel() for b in unet.buffers())
    one, two, lean = (
        compute_footprint(config, "pretrain", batch, lean, reduced=False, ema=True)
        for batch, lean in ((32, False), (64, False), (64, True))
    )
    assert one.trained == one.average == 4 * (parameters + buffers)
    assert one.optimiser == 8 * parameters
    assert one.passes >= 4 * parameters, "gradients are among them"
    assert two.passes > one.passes
    assert lean.passes < two.passes
    for stage in ("aekl", "repr"):
        assert compute_footprint(config, stage, 1, checkpointing=True, reduced=True, ema=False).peak > 0


def test_the_memory_of_stage_3_is_that_of_the_encoders_view():
    """Maps of tissues, three channels on a finer grid, take more than the intensities do."""
    encoder = ["model=tiny", "model/encoder=components_cnn", "data.shape=[32,32,32]", "data.spacing=4"]
    encoder += ["data.view.shape=[64,64,64]", "data.view.spacing=2"]
    found = [
        compute_footprint(composer("bench", *encoder, f"data/view={view}")(), "repr", 8, False, False, False)
        for view in ("t1", "tissues")
    ]
    assert found[1].passes > found[0].passes


@pytest.mark.parametrize(("stage", "batch"), [("pretrain", 32), ("repr", 4)])
def test_the_computed_memory_of_a_step_is_within_5_percent_of_what_a_real_one_allocates(stage, batch):
    config = composer("bench", "bench=smoke", "data.shape=[32,32,32]")()
    trained, frozen, passes = PASSES[stage](config, batch, False)
    for module in (*trained, *frozen):
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        passes(lambda: torch.autocast("cpu", enabled=False))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    computed = compute_footprint(config, stage, batch, checkpointing=False, reduced=False, ema=False)
    assert computed.passes == pytest.approx(allocated.max(), rel=0.05)


def cohort(folder):
    """A table of four scans of four subjects."""
    rng, rows = np.random.default_rng(0), []
    for number, split in enumerate(["train", "train", "val", "test"]):
        image = nib.Nifti1Image(rng.integers(0, 100, (8, 8, 8)).astype(np.int16), np.eye(4))
        nib.save(image, folder / f"{number}.nii.gz")
        row = {"subject": f"s{number}", "session": "M000", "path": f"{number}.nii.gz", "diagnosis": "CN", "age": 70}
        rows.append(row | {"split": split})
    pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
    return folder / "scans.csv"


def test_without_a_stage_1_the_later_stages_and_sampling_run_on_voxels(tmp_path):
    """Only model/autoencoder=identity changes: the latents are the voxels."""
    from ldae.data.latents import LatentSet
    from ldae.experiment import encode, train
    from ldae.pipeline import LDAE

    overrides = [
        "data=table", f"data.table={cohort(tmp_path)}", "data.spacing=1.0", "model=small", "trainer=smoke",
        "trainer.max_steps=1", "accelerator=cpu", f"paths.runs={tmp_path / 'runs'}",
        f"paths.cache={tmp_path / 'cache'}",
        "model/autoencoder=identity", *[o for o in TINY if "autoencoder" not in o], "sampler.steps=2",
        "stage.sampler.steps=2",
    ]  # fmt: skip
    train(composer("train", "stage=aekl", *overrides[:-1])())  # has nothing to train and ends
    assert not (tmp_path / "runs/default/aekl/state").exists()
    encode(composer("encode_latents", *overrides[:-1])())
    train(composer("train", "stage=pretrain", *overrides[:-1])())
    train(composer("train", "stage=repr", *overrides)())
    run = tmp_path / "runs" / "default"
    latents = LatentSet.open(run / "latents")
    assert latents.mean.shape == (4, 1, 8, 8, 8)
    assert float(latents.mean.max()) == 1.0
    assert float(latents.std.abs().max()) == 0.0
    model = LDAE.load(run)
    x = latents.mean[:1]
    z, y = model.compress(x), model.embed(x)
    assert torch.allclose(model.decompress(z), x)
    assert model.decode(model.invert(z, y, steps=2), y, steps=2).shape == x.shape
