"""A viewer in one HTML file that needs nothing else: three planes, a slider over frames, the change in colour."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldae.utils.files import write_text

MOST_BYTES = 3_000_000  # of all frames; larger volumes lose every other voxel


def write_viewer(
    path: Path, title: str, frames: Mapping[str, np.ndarray], reference: str, spacing: Sequence[float]
) -> Path:
    """Write labelled volumes (X, Y, Z) in RAS, in [0, 1], to `path`; differences are shown against `reference`.

    Args:
        frames: in the order of the slider.
        spacing: voxel size along x, y, z in mm.
    """
    stride = 1
    while sum(frame[::stride, ::stride, ::stride].size for frame in frames.values()) > MOST_BYTES:
        stride += 1
    kept = {name: np.clip(frame[::stride, ::stride, ::stride], 0, 1) for name, frame in frames.items()}
    data = {
        "shape": list(kept[reference].shape),
        "spacing": [float(size) for size in spacing],
        "labels": list(kept),
        "reference": list(kept).index(reference),
        # x runs fastest, as the page reads it
        "frames": [_encoded(np.rint(255 * frame).astype(np.uint8)) for frame in kept.values()],
    }
    template = (Path(__file__).parent / "html_viewer.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in a label may end the script
    write_text(path, template.replace("{{title}}", html.escape(title)).replace("{{data}}", text))
    return path


def _encoded(frame: np.ndarray) -> str:
    return base64.b64encode(frame.tobytes(order="F")).decode("ascii")
