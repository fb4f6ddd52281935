"""Proves that the order of samples is a function of position, the same for any number of processes and threads."""

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ldae.data.stream import Batches, SampleStream
from ldae.utils.errors import UserError

WAIT = 10  # seconds to wait for a thread before the test fails


def fetch(index: np.ndarray, position: np.ndarray, number: int) -> dict:
    return {"x": index * 10, "drawn": position * 100 + number}


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    stream = SampleStream(7, seed=3)
    epochs = stream.indices(0, 28).reshape(4, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert SampleStream(7, seed=4).indices(0, 28).tolist() != epochs.ravel().tolist()
    assert epochs.dtype == np.int64


def test_part_of_the_stream_can_be_computed_alone() -> None:
    whole = SampleStream(5, seed=0).indices(0, 200)
    for start, count in [(0, 3), (4, 2), (13, 50), (199, 1), (100, 0)]:
        np.testing.assert_array_equal(SampleStream(5, seed=0).indices(start, count), whole[start : start + count])
    far = SampleStream(5, seed=0).indices(5 * 10**12, 5)
    assert sorted(far) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(SampleStream(5, seed=0).at(np.array([[17, 3], [99, 17]])), whole[[[17, 3], [99, 17]]])


def test_a_stream_without_samples_is_refused() -> None:
    with pytest.raises(UserError):
        SampleStream(0, seed=0)


def test_the_order_is_pinned() -> None:
    """A run must be resumed in the order in which it was started, also with a later version."""
    assert SampleStream(8, seed=0).indices(0, 8).tolist() == [4, 2, 0, 7, 6, 5, 1, 3]


def test_several_threads_may_use_a_stream() -> None:
    stream, alone = SampleStream(50, 3), SampleStream(50, 3)
    starts = [50 * (number * 7 % 40) for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: stream.indices(start, 50), starts))
    np.testing.assert_array_equal(found, [alone.indices(start, 50) for start in starts])


def test_steps_follow_the_stream() -> None:
    with Batches(fetch, SampleStream(11, 1), batch_size=3, accumulate=2) as batches:
        found = [batch for step in range(4) for batch in batches.at(step)]
    assert [len(batch["x"]) for batch in found] == [3] * 8
    np.testing.assert_array_equal(np.concatenate([b["position"] for b in found]), np.arange(24))
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in found]), SampleStream(11, 1).indices(0, 24))
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), SampleStream(11, 1).indices(0, 24) * 10)
    assert [batch["number"] for batch in found] == list(range(8))
    for number, batch in enumerate(found):
        np.testing.assert_array_equal(batch["drawn"], batch["position"] * 100 + number)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_see_together_what_one_process_sees(accumulate: int) -> None:
    """In every micro-batch, two processes with batches of 2 use the samples of one with batches of 4."""
    stream = SampleStream(9, 5)
    one = Batches(fetch, stream, 4, accumulate)
    two = [Batches(fetch, stream, 2, accumulate, rank, world=2) for rank in range(2)]
    for step in (0, 1, 7):
        parts = [batches.at(step) for batches in two]
        for micro, whole in enumerate(one.at(step)):
            assert {part[micro]["number"] for part in parts} == {whole["number"]}
            for name in ("position", "index", "x", "drawn"):
                joined = np.concatenate([part[micro][name] for part in parts])
                np.testing.assert_array_equal(joined, whole[name])
    for batches in (one, *two):
        batches.close()


def test_a_resumed_run_sees_what_the_uninterrupted_one_sees() -> None:
    def steps(first: int, last: int) -> list[list[int]]:
        with Batches(fetch, SampleStream(6, 2), 4, 2) as batches:
            return [batch["index"].tolist() for step in range(first, last) for batch in batches.at(step)]

    assert steps(0, 9) == steps(0, 4) + steps(4, 9)


@pytest.mark.parametrize("workers", [None, 2, 5])
def test_the_number_of_threads_changes_no_batch(workers: int | None) -> None:
    """Batches come in the order of the steps, although some take longer to read."""

    def slow(index: np.ndarray, position: np.ndarray, number: int) -> dict:
        time.sleep(0.01 * (number % 4 == 0))
        return fetch(index, position, number)

    def steps(batches: Batches) -> list[list[dict]]:
        with batches:
            return [[{k: np.array(v).tolist() for k, v in b.items()} for b in batches.at(step)] for step in range(12)]

    stream = SampleStream(7, 2)
    assert steps(Batches(slow, stream, 3, 2, workers=workers)) == steps(Batches(fetch, stream, 3, 2))


class Gate:
    """A fetch that records the numbers it was called with, and blocks at some of them until `open` is set."""

    def __init__(self, *held: int) -> None:
        self.held, self.calls, self.threads = held, [], set()
        self.called, self.open = threading.Condition(), threading.Event()

    def __call__(self, index: np.ndarray, position: np.ndarray, number: int) -> dict:
        with self.called:
            self.calls.append(number)
            self.threads.add(threading.get_ident())
            self.called.notify_all()
        if number in self.held:
            assert self.open.wait(WAIT)
        return {}

    def has(self, *numbers: int) -> bool:
        """Whether it is called with all of these numbers within `WAIT` seconds."""
        with self.called:
            return self.called.wait_for(lambda: set(numbers) <= set(self.calls), WAIT)


def test_two_steps_are_read_ahead_and_each_is_read_once() -> None:
    gate = Gate()
    with Batches(gate, SampleStream(10, 0), 2) as batches:
        batches.at(0)
        assert gate.has(1, 2)
        time.sleep(0.05)  # enough time to read more
        assert gate.calls == [0, 1, 2]
        batches.at(1)
        assert gate.has(3)
        assert gate.calls == [0, 1, 2, 3]
    assert threading.get_ident() not in gate.threads
    assert len(gate.threads) == 1


def test_several_threads_read_several_steps_at_once() -> None:
    gate = Gate(1, 2)
    with Batches(gate, SampleStream(10, 0), 2, workers=3) as batches:
        batches.at(0)
        assert gate.has(1, 2, 3)  # 1 and 2 are read at the same time, and 3 does not wait for them
        assert not gate.open.is_set()
        assert len(gate.threads) >= 2
        time.sleep(0.05)
        assert sorted(gate.calls) == [0, 1, 2, 3]
        gate.open.set()
        assert [batch["number"] for step in (1, 2, 3) for batch in batches.at(step)] == [1, 2, 3]
    assert len(gate.calls) == len(set(gate.calls))


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_may_be_asked_for_in_any_order(workers: int) -> None:
    stream = SampleStream(11, 4)
    with Batches(fetch, stream, 3, workers=workers) as batches:
        for step in (0, 1, 9, 10, 8, 8, 0, 2, 100):
            (batch,) = batches.at(step)
            assert batch["index"].tolist() == stream.indices(3 * step, 3).tolist()
            assert batch["number"] == step


def test_batches_are_not_kept_after_use() -> None:
    class Content:
        pass

    made = weakref.WeakSet()

    def tracked(index: np.ndarray, position: np.ndarray, number: int) -> dict:
        content = Content()
        made.add(content)
        return {"content": content}

    with Batches(tracked, SampleStream(10, 0), 2, workers=4) as batches:
        for step in (*range(40), 100, 101):
            batches.at(step)
        deadline = time.monotonic() + WAIT
        while len(made) != 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made) == 4  # the four steps ahead


def test_after_a_jump_the_steps_in_the_queue_are_not_read() -> None:
    gate = Gate(1)
    with Batches(gate, SampleStream(10, 0), 2) as batches:
        batches.at(0)
        assert gate.has(1)
        gate.held = ()
        threading.Timer(0.05, gate.open.set).start()
        batches.at(20)
    assert 2 not in gate.calls


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_thread_is_raised_at_its_step(workers: int) -> None:
    def faulty(index: np.ndarray, position: np.ndarray, number: int) -> dict:
        if 3 in index:
            raise UserError("scan 3 is gone")
        return {}

    stream = SampleStream(6, 0)
    step = int(np.flatnonzero(stream.indices(0, 6) == 3)[0])
    with Batches(faulty, stream, 1, workers=workers) as batches:
        for number in range(step):
            batches.at(number)
        with pytest.raises(UserError, match="scan 3 is gone") as caught:
            batches.at(step)
        assert caught.value.__notes__ == [f"while fetching samples [3] of step {step}"]
        batches.at(step + 1)


def test_tensors_are_pinned_in_the_thread_and_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(threading.get_ident()) or x + 1)

    def tensors(index: np.ndarray, position: np.ndarray, number: int) -> dict:
        return {"x": torch.tensor(index), "there": torch.empty(2, device="meta"), "names": ["a"]}

    with Batches(tensors, SampleStream(4, 0), 2, pin=False) as batches:
        batch = batches.at(0)[0]
        assert batch["x"].tolist() == batch["index"].tolist()
        assert not pinned
    with Batches(tensors, SampleStream(4, 0), 2, pin=True) as batches:
        batch = batches.at(0)[0]
    assert batch["x"].tolist() == (batch["index"] + 1).tolist()
    assert batch["there"].device.type == "meta"
    assert batch["names"] == ["a"]
    assert threading.get_ident() not in pinned


def test_close_ends_the_threads_and_may_be_repeated() -> None:
    before = threading.active_count()
    batches = Batches(fetch, SampleStream(4, 0), 2, workers=3)
    batches.close()
    batches.at(0)
    assert threading.active_count() == before + 3
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert len(batches.at(1)[0]["x"]) == 2
    batches.close()


def test_close_waits_neither_for_the_rest_of_a_step_nor_for_a_fetch_that_hangs(monkeypatch) -> None:
    gate = Gate(4)
    batches = Batches(gate, SampleStream(4, 0), 2, accumulate=4)
    batches.at(0)
    assert gate.has(4)
    monkeypatch.setattr("ldae.data.stream.PATIENCE", 0.1)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 2
    assert len(batches.at(3)) == 4  # by a new thread
    batches.close()
    gate.open.set()
    time.sleep(0.05)
    assert 5 not in gate.calls


UNCLOSED = """
import threading, time
from ldae.data import stream

def fetch(index, position, number):
    if number == 1:
        time.sleep(0.5)
        print("fetched", flush=True)
    if number == 2:
        threading.Event().wait()
    return {}

stream.PATIENCE = 2
stream.Batches(fetch, stream.SampleStream(4, 0), 2, workers=2).at(0)
print("end", flush=True)
"""


def test_a_fetch_that_hangs_does_not_keep_the_process_alive() -> None:
    """One that does not hang is waited for before the interpreter shuts down."""
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "end\nfetched\n"), done.stderr


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"accumulate": 0}, {"rank": 1}, {"world": 0}, {"workers": 0}])
def test_sizes_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        Batches(fetch, SampleStream(4, 0), **{"batch_size": 1, **wrong})
