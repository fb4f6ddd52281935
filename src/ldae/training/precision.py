"""Precision, CUDA backends and process groups: bfloat16 and float16 are chosen where the hardware supports them."""

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
# Arguments of `build_accelerator` that a resumed run may change. Precisions are compared by what they mean here.
HARMLESS_ON_RESUME = ("_target_", "cpu", "timeout")
TIMEOUT = 30.0  # minutes that processes wait for each other before they give up


def has_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether a device supports bfloat16 in hardware: a GPU of 2020 or later, or a CPU with AMX or AVX512-BF16.

    Other devices emulate it: on a CPU with AVX-512 alone, a training step takes 1.4 to 2.7 times as long in bfloat16.

    Args:
        device: None: a GPU if there is one, else the CPU.
    """
    if _device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def supports_dtype(dtype: torch.dtype, device: torch.device | str | None = None) -> bool:
    """Whether a device supports `dtype` in hardware; float16 counts as supported on GPUs only."""
    if dtype == torch.bfloat16:
        return has_bfloat16(device)
    return dtype == torch.float32 or (dtype == torch.float16 and _device(device).type == "cuda")


def set_up_backends(autotune: bool = False) -> None:
    """Set how CUDA computes float32: convolutions in TF32, the default of PyTorch; matrix products in full precision.

    TF32 would round the sums of squares in SSIM and in the semantic encoder, which depend on their small differences.
    On a CPU this function does nothing.

    Args:
        autotune: choose convolution algorithms by timing them. For training, where every step has the same shapes; for
            a large network it takes half a minute, too long to embed a single scan.
    """
    if not torch.cuda.is_available():
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = autotune


def choose_precision(name: str, cpu: bool = False) -> str:
    """The precision that `accelerator.mixed_precision=name` means on this machine: "no", "bf16" or "fp16".

    Args:
        name: one of these, or "fastest": "bf16" if the hardware supports it, else "no".
        cpu: whether to ignore a GPU.

    Raises:
        UserError: another name, or "fp16" without a GPU.
    """
    device = torch.device("cpu") if cpu or _cpu_by_launcher() else _device(None)
    if name == FASTEST:
        return "bf16" if has_bfloat16(device) else "no"
    if name not in DTYPES:
        raise UserError(f"accelerator.mixed_precision={name}: one of {', '.join([*DTYPES, FASTEST])} is needed")
    if name == "fp16" and device.type == "cpu":
        raise UserError("accelerator.mixed_precision=fp16 needs a GPU: give accelerator=fastest")
    if not supports_dtype(DTYPES[name], device):
        log.warning(
            "%s does not support %s in hardware: it is emulated and slower than accelerator=fastest", device.type, name
        )
    return name


def build_accelerator(mixed_precision: str = FASTEST, cpu: bool = False, timeout: float = TIMEOUT) -> "Accelerator":
    """The Accelerator of a script; also sets up the backends.

    Args:
        mixed_precision: see `choose_precision`.
        cpu: whether to ignore a GPU. The GPU of a Mac (MPS) is always ignored, because it has no float64.
        timeout: minutes after which a process that waits for the others gives up.

    Raises:
        UserError: as `choose_precision`, or a timeout that is not positive.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not timeout > 0:
        raise UserError(f"accelerator.timeout={timeout}: give a positive number of minutes, such as {TIMEOUT:g}")
    set_up_backends()
    if not cpu and not torch.cuda.is_available() and torch.backends.mps.is_available():
        log.info("computing on the CPU: the GPU of this Mac has no float64, which the noise schedule needs")
        cpu = True
    # PyTorch 2.13 has renamed the option, but Accelerate does not know the new name yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # Buffers need not be sent with every forward pass: they are constant, or statistics that training does not read.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        mixed_precision=choose_precision(mixed_precision, cpu),
        cpu=cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout)), ddp],
    )


def inference_dtype(accelerator: "Accelerator") -> torch.dtype:
    """The dtype in which a trained model computes: that of `accelerator` if the hardware supports it, else float32."""
    dtype = DTYPES[accelerator.mixed_precision]
    return dtype if supports_dtype(dtype, accelerator.device) else torch.float32


def console_dtype(name: str, device: torch.device | str | None) -> torch.dtype:
    """The dtype that the console option `--precision NAME` means on a device.

    Args:
        name: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU that supports it, else float32.
        device: None: a GPU if there is one, else the CPU.

    Raises:
        UserError: the device does not support it in hardware.
    """
    device = _device(device)
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else torch.float32
    dtype = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}[name]
    if not supports_dtype(dtype, device):
        raise UserError(f"--precision {name}: {device} does not support it; leave the option out to use the fastest")
    return dtype


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cpu_by_launcher() -> bool:
    """Whether the processes were started by `accelerate launch --cpu`."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
