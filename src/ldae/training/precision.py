"""The one place that decides on precision, backends and process groups: what the hardware computes in, not imitates."""

import logging
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FASTEST = "fastest"
HARMLESS_ON_RESUME = (
    "_target_",
    "cpu",
    "timeout",
)  # arguments of `build_accelerator`; precision is compared by meaning
TIMEOUT = 30.0  # minutes that processes wait for each other before they give up


def has_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether a device multiplies bfloat16 in hardware: a GPU of 2020 or later, a CPU with AMX or AVX512-BF16.

    Elsewhere it is imitated: on a CPU with AVX-512 alone a training step in bfloat16 takes 1.4 to 2.7 times as long.

    Args:
        device: default: a GPU where there is one.
    """
    if _device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def supports_dtype(dtype: torch.dtype, device: torch.device | str | None = None) -> bool:
    """Whether a device has `dtype` in hardware. float16 is for GPUs: on CPUs its range is too small to be worth it."""
    if dtype == torch.bfloat16:
        return has_bfloat16(device)
    return dtype == torch.float32 or (dtype == torch.float16 and _device(device).type == "cuda")


def set_up_backends(autotune: bool = False) -> None:
    """How CUDA computes float32: convolutions in TF32, as PyTorch has it; matrix products in full. Nothing on a CPU.

    TF32 products would round the sums of squares whose small differences SSIM and the semantic encoder are after.

    Args:
        autotune: choose convolution algorithms by trying them: for training, which meets the same shapes at every step.
            It takes half a minute for a large network, which one scan to embed would wait for in vain.
    """
    if not torch.cuda.is_available():
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = autotune


def choose_precision(name: str, cpu: bool = False) -> str:
    """The precision that `accelerator.mixed_precision=name` means on this machine: "no", "bf16" or "fp16".

    Args:
        name: one of these, or "fastest": bf16 where the hardware computes in it, otherwise no.
        cpu: whether a GPU is left alone.

    Raises:
        UserError: another name, or fp16 without a GPU.
    """
    device = torch.device("cpu") if cpu or _cpu_by_launcher() else _device(None)
    if name == FASTEST:
        return "bf16" if has_bfloat16(device) else "no"
    if name not in DTYPES:
        raise UserError(f"accelerator.mixed_precision={name}: one of {', '.join([*DTYPES, FASTEST])} is needed")
    if name == "fp16" and device.type == "cpu":
        raise UserError("accelerator.mixed_precision=fp16 needs a GPU: give accelerator=fastest")
    if not supports_dtype(DTYPES[name], device):
        log.warning("%s has no %s in hardware: it is imitated and slower than accelerator=fastest", device.type, name)
    return name


def build_accelerator(mixed_precision: str = FASTEST, cpu: bool = False, timeout: float = TIMEOUT) -> "Accelerator":
    """The Accelerator of a script, with the backends set up.

    Args:
        mixed_precision: see `choose_precision`.
        cpu: leave a GPU alone.
        timeout: minutes after which a process that waits for others in a collective gives up.

    Raises:
        UserError: as `choose_precision`, or a timeout that is not positive.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not timeout > 0:
        raise UserError(f"accelerator.timeout={timeout}: minutes are needed, such as {TIMEOUT:g}")
    set_up_backends()
    # torch 2.13 has another name for it, which Accelerate does not know; both mean the same where buffers start equal.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # No buffer is sent at every forward: all are constant, or never read in training (running statistics).
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        mixed_precision=choose_precision(mixed_precision, cpu),
        cpu=cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout)), ddp],
    )


def inference_dtype(accelerator: "Accelerator") -> torch.dtype:
    """What a trained model computes in under `accelerator`: its precision where the hardware has it, else float32."""
    dtype = DTYPES[accelerator.mixed_precision]
    return dtype if supports_dtype(dtype, accelerator.device) else torch.float32


def console_dtype(name: str, device: torch.device | str | None) -> torch.dtype:
    """What --precision `name` means on `device` (None: a GPU where there is one).

    Args:
        name: float32, bfloat16, float16, or "auto": bfloat16 on a GPU that computes in it, otherwise float32.

    Raises:
        UserError: the device does not compute in it.
    """
    device = _device(device)
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else torch.float32
    dtype = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}[name]
    if not supports_dtype(dtype, device):
        raise UserError(f"--precision {name}: {device} does not compute in it; leave it out to use what is fast there")
    return dtype


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cpu_by_launcher() -> bool:
    """`accelerate launch --cpu` tells its processes so."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
