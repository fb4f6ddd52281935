"""Run a function over many items in worker processes, and survive the death of a worker.

A crash in a native library, or the kernel killing a process for lack of memory, breaks the whole pool. The items under
way at that moment are then tried again one at a time, each in a process of its own: only an item whose process dies
again is reported as `DIED`.

Workers are fresh interpreters that do not import the caller's main script, so a script needs no `__main__` guard.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

THREAD_LIMITS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)  # fmt: skip
DIED = object()  # in place of the result of an item whose process died twice
DIED_REASON = "its process died twice, most likely for lack of memory"


def available_cores() -> int:
    """Number of CPU cores that this process may use: the default number of workers."""
    from joblib import cpu_count

    return cpu_count()


def run_in_processes(
    function: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    workers: int,
    threads: int = 1,
    label: str = "",
    unit: str = "scan",
    progress: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, function(*items[index])) in order of completion; `DIED` in place of a result, see above.

    However the iteration ends, no worker is left behind; wrap it in `contextlib.closing` where the loop may raise.

    Args:
        function: Picklable. An exception that it raises is raised here.
        items: Arguments of each call.
        workers: Number of processes; 0 runs everything in this process.
        threads: Number of threads in each worker.
        label, unit: Text of the progress bar, which also shows the time left.
        progress: Whether to show the bar.
    """
    from tqdm import tqdm

    if workers:
        results = run_in_pools(function, items, workers, threads)
    else:
        results = ((index, function(*item)) for index, item in enumerate(items))
    with tqdm(total=len(items), desc=label, unit=unit, disable=not progress or not items) as bar:
        for index, result in results:
            bar.update()
            yield index, result


def run_in_pools(
    function: Callable[..., Any], items: Sequence[tuple[Any, ...]], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """Run pool after pool until every item has a result or is reported as `DIED`."""
    left = dict(enumerate(items))
    while left:
        under_way: set[int] = set()
        yield from _run_in_pool(function, left, under_way, workers, threads)
        for index in sorted(under_way):  # not empty if the pool broke
            alone = {index: left.pop(index)}
            yield from _run_in_pool(function, alone, set(), 1, threads)
            if alone:
                yield index, DIED


def _run_in_pool(
    function: Callable[..., Any], left: dict[int, tuple[Any, ...]], under_way: set[int], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """Yield results and remove their items from `left`; end early, with `under_way` not empty, if the pool breaks."""
    from concurrent.futures import FIRST_COMPLETED, Future, wait
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    environment = dict.fromkeys(THREAD_LIMITS, str(threads))
    pool = ProcessPoolExecutor(
        min(workers, len(left)), env=environment, initializer=_set_up_worker, initargs=(threads,)
    )
    waiting, futures = sorted(left, reverse=True), dict[Future, int]()
    try:
        while waiting or futures:
            # Submit few at a time: this bounds the items that a crash can have hit, and what an interrupt must cancel.
            while waiting and len(futures) < workers + 1:
                index = waiting.pop()
                under_way.add(index)
                futures[pool.submit(function, *left[index])] = index
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                index = futures.pop(future)
                result = future.result()
                under_way.remove(index)
                del left[index]
                yield index, result
    except BrokenProcessPool:
        log.warning("a worker process died; the items it worked on are tried again one by one")
    finally:
        with ignoring_interrupts():  # a second Ctrl-C must not leave workers behind
            pool.shutdown(wait=True, kill_workers=True)


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for a moment, as while a table is written after the first Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may change handlers
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _set_up_worker(threads: int) -> None:
    import torch

    # A terminal sends Ctrl-C to the workers as well, but it is the caller that ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
