"""How several processes share a long list of items without communicating: results on disk show what is done."""

import numpy as np


def work_order(count: int, process: int, processes: int) -> np.ndarray:
    """The order in which a process goes through `count` items, skipping those that are done: a permutation, int64.

    First comes its own share, every n-th item; then the items of the other processes in random order. Two processes
    therefore seldom take the same item, and only time is lost if they do. All processes end within about one item of
    each other, so that a collective operation may follow.
    """
    own = np.arange(process, count, processes)
    return np.concatenate([own, np.random.default_rng(process).permutation(np.setdiff1d(np.arange(count), own))])
