"""How several processes share a long list of work without waiting for each other: what is done is seen on the disk."""

import numpy as np


def work_order(count: int, process: int, processes: int) -> np.ndarray:
    """The order in which a process looks for pieces that nobody has done yet, a permutation of 0 to count - 1, int64.

    First every n-th, its own share; then those of the others at random: two that help a third one, or a helper and the
    one that it helps, seldom take the same piece, and nothing but time is lost where they do. All come to an end within
    about a piece of each other, so that they may then meet in a collective.
    """
    own = np.arange(process, count, processes)
    return np.concatenate([own, np.random.default_rng(process).permutation(np.setdiff1d(np.arange(count), own))])
