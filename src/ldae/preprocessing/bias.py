"""The slow drift of brightness across a scan, removed by N4 (Tustison et al. 2010, doi 10.1109/TMI.2010.2046908)."""

from dataclasses import dataclass

from ldae.preprocessing.volume import Volume


@dataclass(frozen=True)
class N4:
    """ANTs' N4 on the whole head.

    shrink: the field is estimated on every n-th voxel; iterations: at most, by level of the spline; tolerance: a level
    ends when the field changes by less.
    """

    shrink: int = 4
    iterations: tuple[int, ...] = (50, 50, 30, 20)
    tolerance: float = 1e-3

    def __call__(self, scan: Volume) -> Volume:
        """`scan` with its field divided out."""
        import ants

        convergence = {"iters": list(self.iterations), "tol": self.tolerance}
        corrected = ants.n4_bias_field_correction(scan.to_ants(), shrink_factor=self.shrink, convergence=convergence)
        return scan.with_data(corrected.numpy())
