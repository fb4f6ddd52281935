"""Brain phantoms: a cohort of labelled scans made from nilearn's template, with known anatomy and true counterfactuals.

`draw_table` draws who is in a cohort, `make_cohort` writes it to disk, `render` makes one scan, with the person's own
severity and age or with others. The names are resolved on first use: torch and pandas are slow to import.
"""

from typing import Any

__all__ = ["SHAPE", "SPACING", "RenderedScan", "draw_table", "make_cohort", "render", "render_labels"]

SPACING, SHAPE = 4.75, (32, 40, 32)  # mm and voxels of a cohort, unless it says otherwise

_HOMES = {name: "rendering" for name in ("RenderedScan", "render_labels", "render")} | {
    "draw_table": "subjects",
    "make_cohort": "synthetic_cohort",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
