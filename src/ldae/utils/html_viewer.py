"""An interactive viewer in a single HTML file: three planes, a slider over volumes, and their differences in colour."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldae.utils.files import write_text

START, END = "const data = ", ";\n"  # of the data in a viewer
MAX_BYTES = 3_000_000  # of all volumes; larger ones are subsampled


@dataclass(frozen=True)
class StoredViewer:
    """What a viewer shows.

    Attributes:
        frames: volumes (X, Y, Z) in RAS, float32 in [0, 1], by label in the order of the slider; larger ones were
            subsampled when they were stored.
        reference: label of the volume that the others are compared with.
    """

    title: str
    frames: dict[str, np.ndarray]
    reference: str


def read_viewer(path: Path) -> StoredViewer | None:
    """What `write_viewer` has stored in `path`; None if it is another page."""
    page = path.read_text(encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    start = page.find(START) + len(START)
    try:
        data = json.loads(page[start : page.index(END, start)])
        shape, labels = tuple(data["shape"]), list(data["labels"])
        stored = [np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape, order="F") for text in data["frames"]]
        frames = {str(name): frame.astype(np.float32) / 255 for name, frame in zip(labels, stored, strict=True)}
        return StoredViewer(html.unescape(title[1] if title else ""), frames, str(labels[data["reference"]]))
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def write_viewer(
    path: Path, title: str, frames: Mapping[str, np.ndarray], reference: str, spacing: Sequence[float]
) -> Path:
    """Write the viewer to `path`.

    Args:
        frames: volumes (X, Y, Z) in RAS with values in [0, 1], by label, in the order of the slider.
        reference: label of the volume that the others are compared with.
        spacing: voxel size along x, y, z in mm.
    """
    stride = 1
    while sum(frame[::stride, ::stride, ::stride].size for frame in frames.values()) > MAX_BYTES:
        stride += 1
    shown = {name: np.clip(frame[::stride, ::stride, ::stride], 0, 1) for name, frame in frames.items()}
    data = {
        "shape": list(shown[reference].shape),
        "spacing": [float(size) for size in spacing],
        "labels": list(shown),
        "reference": list(shown).index(reference),
        # Fortran order, x changes fastest, as the page reads it.
        "frames": [_encode(np.rint(255 * frame).astype(np.uint8)) for frame in shown.values()],
    }
    template = (Path(__file__).parent / "html_viewer.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # so that no label can end the script
    write_text(path, template.replace("{{title}}", html.escape(title)).replace("{{data}}", text))
    return path


def _encode(frame: np.ndarray) -> str:
    return base64.b64encode(frame.tobytes(order="F")).decode("ascii")
