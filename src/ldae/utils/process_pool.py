"""Work in processes of few threads each, that survives the death of a process.

A native library that crashes, or the kernel that ends a process for lack of memory, takes the whole pool along. The
scans that were under way are then tried one by one, each in a process of its own: the one that dies again is to blame.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

log = logging.getLogger(__name__)

THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)  # fmt: skip
DIED = object()  # in place of the result of a call whose process died


def run(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """(index, work(*calls[index])) in order of completion; DIED where the process did not survive the call.

    Exceptions of `work` are raised here. However the iteration ends, no process stays behind.
    """
    left = dict(enumerate(calls))
    while left:
        under_way: set[int] = set()
        yield from _pooled(work, left, under_way, workers, threads)
        for index in sorted(under_way):  # in a pool that broke
            alone = {index: left[index]}
            yield from _pooled(work, alone, set(), 1, threads)
            if alone:
                yield index, DIED
            del left[index]


def _pooled(
    work: Callable[..., Any], left: dict[int, tuple[Any, ...]], under_way: set[int], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """Results as they come, taken out of `left`; ends early when the pool breaks, with `under_way` not empty."""
    from concurrent.futures import FIRST_COMPLETED, Future, wait
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    limits = dict.fromkeys(THREADS, str(threads))
    pool = ProcessPoolExecutor(min(workers, len(left)), env=limits, initializer=_limit, initargs=(threads,))
    waiting, futures = sorted(left, reverse=True), dict[Future, int]()
    try:
        while waiting or futures:
            # Few at a time: so it is known whom a crash may have hit, and an interrupt has little to call back.
            while waiting and len(futures) < workers + 1:
                index = waiting.pop()
                under_way.add(index)
                futures[pool.submit(work, *left[index])] = index
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                index = futures.pop(future)
                result = future.result()
                under_way.remove(index)
                del left[index]
                yield index, result
    except BrokenProcessPool:
        log.warning("a worker process died; the scans under way are tried again one by one")
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _limit(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
