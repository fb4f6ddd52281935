"""The machine: card, versions, the rates of its matrix products, and missing packages."""

import datetime
import importlib.util
import platform
import shutil
import subprocess

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.utils.process_pool import available_cores

# What the measurements import, with the name of its package.
PACKAGES = {
    "torch": "torch", "hydra": "hydra-core", "omegaconf": "omegaconf", "accelerate": "accelerate", "monai": "monai",
    "nibabel": "nibabel", "numpy": "numpy", "scipy": "scipy", "pandas": "pandas",
    "sklearn": "scikit-learn", "joblib": "joblib", "safetensors": "safetensors", "tensorboard": "tensorboard",
    "tqdm": "tqdm", "filelock": "filelock",
}  # fmt: skip


def find_missing_packages() -> list[str]:
    """Names of the packages that are not installed."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def describe_machine() -> dict[str, str]:
    """Card, driver, versions and date."""
    import torch

    found = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else f"none, CPU {platform.processor()}",
        "driver": _driver(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "cuDNN": str(torch.backends.cudnn.version()),
        "cores": str(available_cores()),
        "Python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        found["memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GB"
    return found


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def measure_matrix_rates(check: GpuCheck) -> Numbers:
    """TFLOP/s of a large matrix product in each precision."""
    import torch

    from ldae.bench.measure import measure_matrix_rate

    if check.device.type == "cpu":
        return {"float32_tflops": check.matrix_rate(torch.float32) / 1e12}
    edge = check.bench()([]).bench.matrix
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        rates = {"float32_tflops": measure_matrix_rate(edge, check.device, torch.float32) / 1e12}
        torch.set_float32_matmul_precision("high")
        rates["tf32_tflops"] = measure_matrix_rate(edge, check.device, torch.float32) / 1e12
    finally:
        torch.set_float32_matmul_precision(before)
    for dtype in (torch.bfloat16, torch.float16):
        rates[f"{str(dtype).removeprefix('torch.')}_tflops"] = check.matrix_rate(dtype) / 1e12
    return rates
