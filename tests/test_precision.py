"""Precision is chosen by what the hardware supports, and a resumed run is compared by the precision chosen."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldae.commands.options import load_model
from ldae.diffusion.process import add_noise, eps_to_z0
from ldae.diffusion.schedule import linear
from ldae.models.unet import UNet
from ldae.training import precision
from ldae.training.changes import changed_keys
from ldae.utils.errors import UserError

WITHOUT, WITH = {"avx512_f": True}, {"avx512_bf16": True}


@pytest.fixture
def cpu(monkeypatch):
    """A machine without a GPU; the returned function sets the capabilities of its CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that reports a GPU; the returned function sets whether that supports bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda has: monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"amx_bf16": True}, "bf16"), (WITH, "bf16"), (WITHOUT, "no"), ({}, "no")]
)
def test_fastest_is_bfloat16_only_if_the_cpu_supports_it(cpu, capabilities, expected):
    cpu(capabilities)
    assert precision.choose_precision("fastest") == expected


def test_fastest_goes_by_the_gpu_unless_the_cpu_is_chosen(gpu, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: WITHOUT)
    gpu(True)
    assert precision.choose_precision("fastest") == "bf16"
    assert precision.choose_precision("fastest", cpu=True) == "no"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision.choose_precision("fastest") == "no"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    gpu(False)
    assert precision.choose_precision("fastest") == "no"
    assert precision.choose_precision("fp16") == "fp16"


@pytest.mark.parametrize("name", ["fp16", "fp8", "bfloat16"])
def test_a_precision_that_is_not_available_is_refused_in_one_line(cpu, name):
    cpu(WITHOUT)
    with pytest.raises(UserError, match=f"accelerator.mixed_precision={name}"):
        precision.choose_precision(name)


def test_the_accelerator_is_built_as_configured(cpu, monkeypatch):
    cpu(WITH)
    made = {}
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: made.update(options))
    precision.build_accelerator("fastest", cpu=True, timeout=0.5)
    group, ddp = made["kwargs_handlers"]
    assert (made["mixed_precision"], made["cpu"], group.timeout.total_seconds()) == ("bf16", True, 30)
    assert ddp.to_kwargs() == {"broadcast_buffers": False}
    with pytest.raises(UserError, match=r"accelerator\.timeout=0"):
        precision.build_accelerator(timeout=0)


def test_backends_are_set_on_a_gpu_and_unchanged_on_a_cpu(cpu, monkeypatch):
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark)
    cpu(WITHOUT)
    precision.set_up_backends()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        for autotune in (True, False):  # for training and for a single scan
            precision.set_up_backends(autotune)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", autotune)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


def test_inference_uses_the_precision_of_the_accelerator_if_the_hardware_supports_it(cpu):
    accelerator = type("Shared", (), {"mixed_precision": "bf16", "device": torch.device("cpu")})()
    cpu(WITH)
    assert precision.inference_dtype(accelerator) == torch.bfloat16
    cpu(WITHOUT)
    assert precision.inference_dtype(accelerator) == torch.float32


def test_console_commands_use_float32_on_a_cpu_and_bfloat16_on_a_gpu_that_supports_it(cpu, gpu, monkeypatch):
    cpu(WITH)
    gpu(True)
    assert precision.console_dtype("auto", "cpu") == torch.float32
    assert precision.console_dtype("auto", None) == torch.bfloat16
    assert precision.console_dtype("float32", None) == torch.float32
    assert precision.console_dtype("bfloat16", "cpu") == torch.bfloat16
    gpu(False)
    assert precision.console_dtype("auto", "cuda:0") == torch.float32
    for name, device in (("bfloat16", "cuda"), ("float16", "cpu")):
        with pytest.raises(UserError, match=f"--precision {name}: {device}"):
            precision.console_dtype(name, device)


def test_console_commands_pass_their_precision_to_the_model(cpu, monkeypatch):
    cpu(WITHOUT)
    options = {"run": "demo", "runs": Path("runs"), "bundle": None, "device": "cpu"}
    made = []
    monkeypatch.setattr("ldae.pipeline.LDAE.load", lambda path, **options: made.append(options["dtype"]))
    load_model(**options, precision="auto")
    assert made == [torch.float32]
    with pytest.raises(UserError, match="--precision bfloat16: cpu does not support it"):
        load_model(**options, precision="bfloat16")
    cpu(WITH)
    load_model(**options, precision="bfloat16")
    assert made == [torch.float32, torch.bfloat16]


def test_resuming_compares_the_precision_that_was_chosen(cpu):
    old = OmegaConf.create({"accelerator": {"_target_": "accelerate.Accelerator", "mixed_precision": "no"}})
    now = OmegaConf.create(
        {"accelerator": {"_target_": "ours", "mixed_precision": "fastest", "cpu": False, "timeout": 30}}
    )
    cpu(WITHOUT)
    assert changed_keys(old, now)[0] == []
    cpu(WITH)
    assert changed_keys(old, now)[0] == ["accelerator.mixed_precision: no -> fastest"]


def test_outputs_near_the_end_of_the_schedule_are_not_rounded_to_16_bits():
    """At t >= 950, z_0 = (z_t - sigma eps) / alpha with alpha near 0.01: rounding eps to bfloat16 would change z_0 by a
    tenth of its standard deviation. The last convolution of the network is therefore computed in float32."""
    torch.manual_seed(0)
    schedule, t = linear(), torch.arange(950, 1000, 7)
    z0, noise = torch.randn(len(t), 3, 8, 8, 8), torch.randn(len(t), 3, 8, 8, 8)
    z_t = add_noise(schedule, z0, noise, t)
    rounded = eps_to_z0(schedule, noise.bfloat16().float(), z_t, t)
    assert float((rounded - z0).square().mean().sqrt()) > 0.1

    unet = UNet(base=8, multipliers=(1, 2), residual_blocks=1, attention_at=(2,), groups=4, dropout=0.0).eval()
    for name, parameter in unet.named_parameters():
        if name.endswith("weight") and not parameter.any():  # an untrained network would predict 0
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        exact = unet(z_t, t)
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(z_t, t)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float()), "the output is not rounded to bfloat16"

    def error(output):
        return float((eps_to_z0(schedule, output, z_t, t) - eps_to_z0(schedule, exact, z_t, t)).square().mean().sqrt())

    assert error(found) < error(found.bfloat16().float())


def test_the_gpu_of_a_mac_is_not_used_because_it_has_no_float64(cpu, monkeypatch, caplog):
    made = {}
    cpu(WITHOUT)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: made.update(options))
    with caplog.at_level("INFO", "ldae.training.precision"):
        precision.build_accelerator()
    assert made["cpu"] is True
    assert len(caplog.messages) == 1
    assert "no float64" in caplog.text
