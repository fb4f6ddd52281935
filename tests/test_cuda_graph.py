"""Recorded work is replayed from current inputs, and falls back to running as it is: with a stand-in for CUDA graphs.

The stand-in records a function and computes it again at each replay, into the memory of its first result, as a graph
does. `make gpu-check` compares recorded training steps with a CPU's on a GPU.
"""

import contextlib
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.utils.flop_counter
from torch import nn
from torch.utils import _pytree as pytree

from ldae.models.cuda_graph import MOST_GRAPHS, GraphCache, RecordedWork
from ldae.training.optimizer_step import Updater
from ldae.training.step_graph import WARM_UP, StepGraph, can_record

CPU = torch.device("cpu")


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class Graph:
    """Computes what was recorded again, into the memory of the recorded result and gradients."""

    work = None
    parameters = ()

    def replay(self):
        for parameter in self.parameters:  # the stand-in's backward pass adds to gradients, a graph overwrites them
            parameter.grad.zero_()
        for target, value in zip(leaves(self.result), leaves(self.work()), strict=True):
            target.detach().copy_(value.detach())


def leaves(result):
    return [tensor for tensor in pytree.tree_leaves(result) if isinstance(tensor, torch.Tensor)]


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """CUDA as RecordedWork uses it, on a CPU."""
    fakes = {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream,
        "is_current_stream_capturing": lambda: False, "stream": lambda stream: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    record = RecordedWork.record

    def remember(self, work):
        record(self, work)
        self.graph.work, self.graph.result = work, self.result

    monkeypatch.setattr(RecordedWork, "record", remember)


def batches(number):
    generator = torch.Generator().manual_seed(number)
    return [{"x": torch.randn(3, 4, generator=generator), "index": number}]


def mean_square(network, batch):
    return {"loss": network(batch["x"]).square().mean()}


def test_a_recorded_step_trains_as_one_that_is_not():
    results = []
    for record in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(4, 1)
        Graph.parameters = list(network.parameters())
        loss = partial(mean_square, network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        accelerator = SimpleNamespace(
            device=CPU, mixed_precision="no", scaler=None, num_processes=1, backward=lambda loss: loss.backward(),
            no_sync=lambda module: contextlib.nullcontext(),
        )  # fmt: skip
        updater = Updater(accelerator, network, optimizer, None, record)
        losses = []
        for number in range(WARM_UP + 3):
            gradients = updater.accumulate(batches(number), loss)
            losses.append(gradients.scalars["loss"])
            optimizer.step()
            if not record:
                optimizer.zero_grad()
        assert updater.graph is None or updater.graph.work.recorded
        results.append((torch.stack(losses), *(p.detach().clone() for p in network.parameters())))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(monkeypatch, caplog):
    @contextlib.contextmanager
    def fail(graph, **options):
        raise RuntimeError("not permitted\nwhen stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", fail)
    graph, seen = StepGraph(CPU), []

    def passes(micro_batches):
        seen.append(micro_batches[0]["index"])
        return {}, torch.zeros(1)

    with caplog.at_level(logging.WARNING):
        for number in range(WARM_UP + 3):
            graph(passes, batches(number), lambda: None)
    assert seen == list(range(WARM_UP + 3))
    assert len(caplog.messages) == 1
    assert "not permitted" in caplog.text


@pytest.mark.parametrize(
    ("device", "processes", "wanted", "checkpointing", "recorded"),
    [
        ("cuda", 1, True, False, True), ("cpu", 1, True, False, False), ("cuda", 2, True, False, False),
        ("cuda", 1, False, False, False), ("cuda", 1, True, True, False),
    ],
)  # fmt: skip
def test_steps_are_recorded_on_one_gpu(device, processes, wanted, checkpointing, recorded):
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    assert can_record(SimpleNamespace(cuda_graph=wanted, checkpointing=checkpointing), accelerator) is recorded


def double(x, y):
    return 2 * x + y, x - y


@torch.no_grad()
def test_evaluations_are_replayed_from_their_current_inputs():
    cache = GraphCache(CPU)
    kept = []
    for number in range(5):
        x, y = torch.full((2,), float(number)), torch.ones(2)
        kept.append(cache(double, x, y))
        assert torch.equal(kept[-1][0], 2 * x + y)
    assert torch.equal(kept[2][0], torch.full((2,), 5.0)), "a result was overwritten by a later evaluation"
    assert torch.equal(cache(double, torch.ones(3), torch.ones(3))[0], torch.full((3,), 3.0))
    assert len(cache.cached) == 2


@torch.no_grad()
def test_the_number_of_graphs_is_bounded():
    cache = GraphCache(CPU)
    for size in range(1, 2 * MOST_GRAPHS):
        for _ in range(2):
            cache(double, torch.ones(size), torch.ones(size))
    assert len(cache.cached) == MOST_GRAPHS


def test_evaluations_with_gradients_or_counted_ones_are_not_recorded():
    cache = GraphCache(CPU)
    x = torch.ones(2, requires_grad=True)
    assert cache(double, x, torch.ones(2))[0].requires_grad
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False):
        cache(double, x, torch.ones(2))
    assert not cache.cached
