"""The sample stream is a function of position: resumable, complete, and the same for one process or several."""

import threading

import numpy as np
import pytest

from ldae.data.stream import Batches, SampleStream
from ldae.errors import UserError


def fetch(indices: np.ndarray) -> dict:
    return {"x": indices * 10}


def test_every_epoch_has_every_sample_once_in_its_own_order() -> None:
    stream = SampleStream(7, seed=3)
    epochs = stream.indices(0, 28).reshape(4, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert SampleStream(7, seed=4).indices(0, 28).tolist() != epochs.ravel().tolist()
    assert epochs.dtype == np.int64


def test_a_piece_of_the_stream_needs_no_past() -> None:
    whole = SampleStream(5, seed=0).indices(0, 200)
    for start, count in [(0, 3), (4, 2), (13, 50), (199, 1), (100, 0)]:
        np.testing.assert_array_equal(SampleStream(5, seed=0).indices(start, count), whole[start : start + count])
    far = SampleStream(5, seed=0).indices(5 * 10**12, 5)
    assert sorted(far) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(SampleStream(5, seed=0).at(np.array([[17, 3], [99, 17]])), whole[[[17, 3], [99, 17]]])


def test_no_samples_is_the_users_error() -> None:
    with pytest.raises(UserError):
        SampleStream(0, seed=0)


def test_the_order_is_pinned() -> None:
    """A run must resume in the order it began with, also under a later version."""
    assert SampleStream(8, seed=0).indices(0, 8).tolist() == [4, 2, 0, 7, 6, 5, 1, 3]


def test_steps_follow_the_stream() -> None:
    with Batches(fetch, SampleStream(11, 1), batch_size=3, accumulate=2) as batches:
        found = [batch for step in range(4) for batch in batches.at(step)]
    assert [len(batch["x"]) for batch in found] == [3] * 8
    np.testing.assert_array_equal(np.concatenate([b["position"] for b in found]), np.arange(24))
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in found]), SampleStream(11, 1).indices(0, 24))
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), SampleStream(11, 1).indices(0, 24) * 10)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_processes_share_the_batch_of_one(accumulate: int) -> None:
    """In every micro-batch, two processes of 2 see together what one of 4 sees."""
    stream = SampleStream(9, 5)
    one = Batches(fetch, stream, 4, accumulate)
    two = [Batches(fetch, stream, 2, accumulate, rank, world=2) for rank in range(2)]
    for step in (0, 1, 7):
        parts = [batches.at(step) for batches in two]
        for micro, whole in enumerate(one.at(step)):
            for name in ("position", "index", "x"):
                joined = np.concatenate([part[micro][name] for part in parts])
                np.testing.assert_array_equal(joined, whole[name])
    for batches in (one, *two):
        batches.close()


def test_a_resumed_run_sees_what_the_uninterrupted_one_sees() -> None:
    def steps(first: int, last: int) -> list[list[int]]:
        with Batches(fetch, SampleStream(6, 2), 4, 2) as batches:
            return [batch["index"].tolist() for step in range(first, last) for batch in batches.at(step)]

    assert steps(0, 9) == steps(0, 4) + steps(4, 9)


def test_the_next_step_is_fetched_meanwhile_and_only_once() -> None:
    seen, main = [], threading.get_ident()
    second = threading.Event()

    def watched(indices: np.ndarray) -> dict:
        assert threading.get_ident() != main
        seen.append(indices.tolist())
        if len(seen) == 2:
            second.set()
        return {}

    stream = SampleStream(10, 0)
    with Batches(watched, stream, 2) as batches:
        batches.at(0)
        assert second.wait(10)
        batches.at(1)
        batches.at(5)
    assert seen[:2] == [stream.indices(0, 2).tolist(), stream.indices(2, 2).tolist()]
    assert seen.count(stream.indices(2, 2).tolist()) == 1
    assert stream.indices(10, 2).tolist() in seen


def test_a_fault_in_the_thread_reaches_the_caller() -> None:
    def faulty(indices: np.ndarray) -> dict:
        if 3 in indices:
            raise UserError("scan 3 is gone")
        return {}

    stream = SampleStream(6, 0)
    step = int(np.flatnonzero(stream.indices(0, 6) == 3)[0])
    with Batches(faulty, stream, 1) as batches:
        for number in range(step):
            batches.at(number)
        with pytest.raises(UserError, match="scan 3 is gone") as caught:
            batches.at(step)
        assert caught.value.__notes__ == [f"while fetching samples [3] of step {step}"]
        batches.at(step + 1)


def test_close_ends_the_thread_and_may_be_repeated() -> None:
    before = threading.active_count()
    batches = Batches(fetch, SampleStream(4, 0), 2)
    batches.close()
    batches.at(0)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert len(batches.at(1)[0]["x"]) == 2
    batches.close()


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"accumulate": 0}, {"rank": 1}, {"world": 0}])
def test_sizes_without_meaning_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        Batches(fetch, SampleStream(4, 0), **{"batch_size": 1, **wrong})
