"""The comparison of CPU kernels times the same networks with and without each kernel, and leaves them as they were."""

import json

from torch import nn

from ldae.bench.cpu_kernels import WITHOUT, compare_kernel, compare_kernels
from ldae.config import compose_config
from ldae.models.cpu_kernels import CPU_KERNELS, CpuGroupNorm, SmallVolumeConv3d


def composed(more=()):
    return compose_config("bench", ["bench=cpu_kernels", *more])


def test_every_kernel_that_saves_time_is_compared():
    compared = {kernel for without in WITHOUT.values() for kernel in without}
    assert compared == set(CPU_KERNELS.values()) - {CpuGroupNorm}


def test_times_are_taken_in_turn_and_the_kernel_is_in_use_again_afterwards():
    module, seen = SmallVolumeConv3d(2, 2, 3), []
    times = compare_kernel([module], {SmallVolumeConv3d: nn.Conv3d}, lambda: seen.append(type(module)), 2)
    assert seen == [SmallVolumeConv3d, nn.Conv3d, SmallVolumeConv3d, nn.Conv3d]
    assert type(module) is SmallVolumeConv3d
    assert len(times) == 2


def test_a_run_writes_times_of_every_task_with_and_without_every_kernel(tmp_path):
    given = [
        'bench.variants.demo=["model=tiny","diffusion=linear_v","accelerator=cpu"]', "~bench.variants.small",
        "bench.repeats=1", "bench.scans=3", f"bench.output={tmp_path}", "data.shape=[16,16,16]",
        "bench.batch={aekl: 1, pretrain: 2, repr: 2}",
    ]  # fmt: skip
    numbers = compare_kernels(composed(given), lambda more: composed([*given, *more]))
    assert json.loads((tmp_path / "cpu_kernels.json").read_text()) == numbers
    tasks = {name.split("/")[1] for name in numbers if name.startswith("demo/")}
    assert tasks == {"train_aekl", "train_pretrain", "train_repr", "encode", "embed", "sample", "decode"}
    for kernel in WITHOUT:
        assert numbers[f"demo/train_aekl/{kernel}/ms"] > 0
        assert numbers[f"demo/train_aekl/{kernel}/without_ms"] > 0
