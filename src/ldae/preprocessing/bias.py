"""Bias field correction: removes the slow drift of brightness across a scan.

N4 is described in Tustison et al. 2010, doi 10.1109/TMI.2010.2046908.
"""

from dataclasses import dataclass

from ldae.preprocessing.volume import Volume


@dataclass(frozen=True)
class N4:
    """ANTs' N4, estimated on the whole head.

    Attributes:
        shrink: the field is estimated on every `shrink`-th voxel along each axis.
        iterations: maximum number of iterations for each spline level, coarse to fine.
        tolerance: a level ends when the field changes by less than this.
    """

    shrink: int = 4
    iterations: tuple[int, ...] = (50, 50, 30, 20)
    tolerance: float = 1e-3

    def __call__(self, scan: Volume) -> Volume:
        """Divide `scan` by its estimated bias field."""
        import ants

        convergence = {"iters": list(self.iterations), "tol": self.tolerance}
        corrected = ants.n4_bias_field_correction(scan.to_ants(), shrink_factor=self.shrink, convergence=convergence)
        return scan.with_data(corrected.numpy())
