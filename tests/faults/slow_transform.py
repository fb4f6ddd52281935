"""A transform that takes longer than the usual one, and makes the same volumes."""

import time
from collections.abc import Sequence

import numpy as np

from ldae.data.transforms import Source, Transform


class SlowTransform(Transform):
    """As Transform, and with its key, but each scan takes `seconds` longer."""

    def __init__(self, shape: Sequence[int], spacing: float, seconds: float) -> None:
        super().__init__(shape, spacing)
        self.seconds = seconds

    def __call__(self, source: Source) -> np.ndarray:
        """See Transform."""
        time.sleep(self.seconds)
        return super().__call__(source)
