"""Brain phantoms: synthetic scans made from nilearn's template, with known anatomy and true counterfactuals.

`draw_table` draws the subjects of a synthetic cohort, `make_cohort` writes their scans to disk, and `render` makes one
scan, with the subject's own severity and age or with others. The names are imported on first use, because torch and
pandas take seconds to import.
"""

from typing import Any

__all__ = ["SHAPE", "SPACING", "RenderedScan", "draw_table", "make_cohort", "render", "render_labels"]

SPACING, SHAPE = 4.75, (32, 40, 32)  # default voxel size in mm and number of voxels of a cohort

_MODULES = {
    "RenderedScan": "rendering",
    "render": "rendering",
    "render_labels": "rendering",
    "draw_table": "subjects",
    "make_cohort": "synthetic_cohort",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
