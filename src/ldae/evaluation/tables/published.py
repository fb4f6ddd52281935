"""Figures of the paper (LDAE, arXiv 2504.08635), all on ADNI. They are of other scans and people than a run's own.

SSIM there is of the whole volume in a window of 3 voxels (`ssim_published` here), LPIPS the sum over three planes.
"""

from ldae.evaluation.tables.layout import PAPER, Cell, Row

STEPS = (10, 20, 50, 100)  # of the DDIM sampler
SSIM_ENCODED = {10: 0.953, 20: 0.960, 50: 0.962, 100: 0.962}
LPIPS_ENCODED = {10: 0.081, 20: 0.077, 50: 0.076, 100: 0.075}
SSIM_SEMANTIC = {10: 0.872, 20: 0.871, 50: 0.870, 100: 0.869}
SSIM_AUTOENCODER, LPIPS_AUTOENCODER = 0.962, 0.075

# AUC and accuracy of AD against CN; mean absolute and root mean squared error of age, in years.
PROBES = {
    "LDAE": {"diagnosis/auc": 0.8948, "diagnosis/accuracy": 0.8365, "age/mae": 4.16, "age/rmse": 5.23},
    "the same in voxel space (DAE)": {
        "diagnosis/auc": 0.7800, "diagnosis/accuracy": 0.7468, "age/mae": 4.93, "age/rmse": 6.11,
    },
    "supervised, same encoder": {
        "diagnosis/auc": 0.9067, "diagnosis/accuracy": 0.8464, "age/mae": 4.34, "age/rmse": 4.63,
    },
}  # fmt: skip

INTERPOLATION_SSIM = {6: Cell(0.969), 24: Cell(0.93, at_least=True)}  # by months between first and last visit
OVER_VOXEL_SPACE = 20.0  # times faster inference


def published_row(label: str, cells: list[Cell | None]) -> Row:
    """A row of the paper."""
    return Row(label, cells, PAPER)
