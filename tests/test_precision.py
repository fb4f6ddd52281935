"""Proves that mixed precision follows what the hardware computes in."""

import pytest
import torch

from ldae.training import precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True}, "no")],
)
def test_bfloat16_only_where_the_cpu_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "Accelerator", lambda **options: options)  # a real one keeps its first precision
    assert precision.fastest_accelerator(cpu=True) == {"mixed_precision": expected, "cpu": True}
