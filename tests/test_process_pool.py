"""Proves that results do not depend on the number of workers, that only the item whose process dies is reported, and
that an interrupted iteration leaves no worker behind."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from ldae.utils.process_pool import DIED, available_cores, ignoring_interrupts, run_in_processes


def report_interrupt_handler():
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def square(number):
    return number**2


def die_at_three(number):
    if number == 3:
        os._exit(1)
    return number**2


def fail_at_one(number):
    if number == 1:
        raise ValueError("one")
    return number


def write_process_number_and_sleep(folder, seconds):
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_do_not_depend_on_the_number_of_workers(workers):
    found = dict(run_in_processes(square, [(n,) for n in range(5)], workers, progress=False))
    assert found == {n: n**2 for n in range(5)}


def test_only_the_item_whose_process_dies_twice_is_reported_as_died():
    found = dict(run_in_processes(die_at_three, [(n,) for n in range(6)], workers=2, progress=False))
    assert found.pop(3) is DIED
    assert found == {n: n**2 for n in (0, 1, 2, 4, 5)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_of_the_function_is_raised(workers):
    with pytest.raises(ValueError, match="one"):
        list(run_in_processes(fail_at_one, [(n,) for n in range(3)], workers, progress=False))


def test_an_interrupted_iteration_ends_its_workers_at_once(tmp_path):
    items = [(tmp_path, 0.0), (tmp_path, 600.0)]
    with closing(run_in_processes(write_process_number_and_sleep, items, workers=2, progress=False)) as results:
        assert next(results) == (0, None)
        start = time.monotonic()
    assert time.monotonic() - start < 30
    assert not [path.name for path in tmp_path.iterdir() if Path(f"/proc/{path.name}").exists()]


def test_more_workers_than_items_are_not_started():
    found = dict(run_in_processes(square, [(n,) for n in range(2)], workers=8, progress=False))
    assert found == {0: 0, 1: 1}


def test_workers_leave_ctrl_c_to_the_caller():
    assert dict(run_in_processes(report_interrupt_handler, [()], workers=1, progress=False)) == {0: True}


def test_a_second_ctrl_c_does_not_interrupt_what_the_first_one_started():
    finished = []

    def interrupt_twice():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with ignoring_interrupts():
                signal.raise_signal(signal.SIGINT)
                finished.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_twice()
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished


def test_cores_are_counted_without_sched_getaffinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() >= 1
