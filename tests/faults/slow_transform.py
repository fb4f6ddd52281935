"""A transform that takes its time; what it makes is what the usual one makes."""

import time
from collections.abc import Sequence

import numpy as np

from ldae.data.transforms import Source, Transform


class SlowTransform(Transform):
    """As Transform, `seconds` a scan later. Of the same key: a slow scan is no other volume."""

    def __init__(self, shape: Sequence[int], spacing: float, seconds: float) -> None:
        super().__init__(shape, spacing)
        self.seconds = seconds

    def __call__(self, source: Source) -> np.ndarray:
        """See Transform."""
        time.sleep(self.seconds)
        return super().__call__(source)
