"""A GPU simulated by PyTorch's `meta` device: training and inference fail here if they would make the host wait.

On `meta`, tensors have shapes and dtypes but no values. Reading a value (`float`, `bool`, `.item()`, `.cpu()`, or an
index by a boolean tensor) raises, and so does an operation with a tensor that was left on the CPU. `Rehearsal` adds
what `meta` lacks: autocast with CUDA's lists of operations, errors for mixed devices in operations that do not check
them, and, inside a training step, errors for copies that wait for the device.

What this cannot detect: wrong values, memory, speed, what cuDNN supports, streams, whether memory is pinned, the report
that the trainer's guard copies to the host (tests/test_training.py tests it on a CPU), checkpointing under autocast,
and code for `device.type == "cuda"` only (the group norm for GPUs, pinning). `make gpu-check` checks these on a GPU.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

META = torch.device("meta")
# https://docs.pytorch.org/docs/stable/amp.html, section "CUDA Op-Specific Behavior": those that this project uses.
IN_16_BITS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose3d, F.linear, F.scaled_dot_product_attention,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.Tensor.matmul,
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.bmm,
}  # fmt: skip
IN_32_BITS = {
    F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm, torch.exp, torch.Tensor.exp, torch.expm1,
    torch.Tensor.expm1, torch.log, torch.Tensor.log, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt,
    torch.Tensor.rsqrt, torch.softmax, torch.Tensor.softmax, F.softmax, torch.cumsum, torch.Tensor.cumsum, torch.sum,
    torch.Tensor.sum, torch.norm, torch.Tensor.norm, F.mse_loss, F.l1_loss,
}  # fmt: skip


class Autocast(contextlib.ContextDecorator):
    """Replaces torch.autocast by one stack of dtypes for all devices, which `Rehearsal` reads."""

    stack: list[torch.dtype | None]

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        self.dtype = (dtype or torch.float16) if enabled else None

    def __enter__(self):
        Autocast.stack.append(self.dtype)
        return self

    def __exit__(self, *exception):
        Autocast.stack.pop()


Autocast.stack = []


class Rehearsal(TorchFunctionMode):
    """Mode in which tensors on `meta` behave as on a GPU; inside `step`, waiting for the device is an error."""

    def __init__(self):
        super().__init__()
        self.in_step = False

    @contextlib.contextmanager
    def step(self):
        """Context in which the host must not wait for the device."""
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(tensor.is_meta for tensor in found):
            self._refuse_mixture(func, found)
            dtype = Autocast.stack[-1] if Autocast.stack else None
            if dtype is not None and func in IN_16_BITS:
                args, kwargs = pytree.tree_map(lambda value: cast(value, dtype), (args, kwargs))
            elif dtype is not None and func in IN_32_BITS:
                args, kwargs = pytree.tree_map(lambda value: cast(value, torch.float32), (args, kwargs))
        result = func(*args, **kwargs)
        if self.in_step:
            self._refuse_waiting(func, found, result, kwargs)
        return result

    @staticmethod
    def _refuse_mixture(func, found):
        """Operations may take 0-d tensors from the CPU; copies may take any tensor."""
        allowed = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.data.__set__}
        if func not in allowed and any(tensor.device.type == "cpu" and tensor.ndim for tensor in found):
            raise RuntimeError(f"{getattr(func, '__name__', func)} of tensors on the device and on the CPU")

    @staticmethod
    def _refuse_waiting(func, found, result, kwargs):
        """A copy to the device blocks the host unless it comes from pinned memory and is non_blocking."""
        arrived = isinstance(result, Tensor) and result.is_meta
        name = getattr(func, "__name__", str(func))
        if arrived and not found and func in (torch.tensor, torch.as_tensor):
            raise RuntimeError(f"{name} copies numbers from the host into a tensor on the device: the host waits")
        from_host = any(tensor.device.type == "cpu" and tensor.ndim for tensor in found)
        if arrived and from_host and not kwargs.get("non_blocking"):
            raise RuntimeError(f"{name} copies to the device without non_blocking: the host waits")


def cast(value, dtype):
    """A floating-point tensor on the device in another dtype; everything else unchanged."""
    if isinstance(value, Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


class Accelerator:
    """The part of accelerate.Accelerator that the stages use, for one GPU in bf16 or float32."""

    device = META
    num_processes, process_index, is_main_process, scaler = 1, 0, True, None

    def __init__(self, mixed_precision="bf16"):
        self.mixed_precision = mixed_precision

    def autocast(self):
        return Autocast("cuda", torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def prepare(self, *modules):
        prepared = [self.wrap(module) for module in modules]
        return prepared[0] if len(prepared) == 1 else prepared

    def wrap(self, module):
        """As Accelerate does: the forward pass under autocast, its outputs in float32."""
        module = module.to(self.device)
        forward = module.forward

        def wrapped(*args, **kwargs):
            with self.autocast():
                result = forward(*args, **kwargs)
            return pytree.tree_map(lambda value: value.float() if is_16_bits(value) else value, result)

        module.forward = wrapped
        return module

    def backward(self, loss):
        # Checkpointing computes the forward pass again, which needs the same autocast.
        with self.autocast():
            torch.autograd.backward([loss])  # Tensor.backward would be intercepted by `Rehearsal`

    def no_sync(self, module):
        return contextlib.nullcontext()


def is_16_bits(value):
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


class FusedAdam:
    """Replaces the fused Adam, which does not exist on `meta`, and checks what a step of it requires."""

    def __init__(self, parameters, lr, optim):
        groups = list(parameters)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups, "lr": lr}]
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.found_inf = None
        self.steps = 0

    @property
    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def step(self):
        assert isinstance(self.found_inf, Tensor)
        assert self.found_inf.is_meta, "whether the step is taken is decided on the device"
        assert self.found_inf.dtype == torch.float32
        for parameter in self.parameters:
            assert parameter.is_meta
            assert parameter.grad is None or parameter.grad.is_meta
        assert any(parameter.grad is not None for parameter in self.parameters)
        self.steps += 1

    def zero_grad(self, set_to_none=True):
        for parameter in self.parameters:
            parameter.grad = None


def on_meta(build) -> nn.Module:
    """The module that `build()` returns, built with its parameters on `meta`."""
    with META:
        return build()
