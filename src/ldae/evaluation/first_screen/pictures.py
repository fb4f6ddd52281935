"""Pictures of an edited scan, one for each alpha: three slices, and below them the change in colour."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np

from ldae.utils.slices import slices_to_show

WIDTH = 660  # pixels of a picture, about
RED, BLUE = (214, 48, 40), (40, 100, 230)  # brighter, darker


def draw_pictures(frames: Sequence[np.ndarray], unedited: int) -> tuple[list[bytes], float]:
    """A PNG for each volume (X, Y, Z) in [0, 1]: three planes through the centre of the change, and the change below.

    Returns:
        The pictures, and the change of full colour in percent of the intensity range.
    """
    changes = [frame - frames[unedited] for frame in frames]
    largest = np.max(np.abs(changes), axis=0)
    limit = max(float(np.percentile(largest, 99.5)), 0.005)
    cut = _centre(largest)
    rows = [
        (_side_by_side(slices_to_show(frame, cut)), _side_by_side(slices_to_show(change, cut)))
        for frame, change in zip(frames, changes, strict=True)
    ]
    return [_to_png(scan, change / limit) for scan, change in rows], 100 * limit


def _centre(change: np.ndarray) -> tuple[int, int, int]:
    """The centre of the largest changes, a little to one side as in the other pictures."""
    strongest = np.argwhere(change >= max(np.percentile(change, 99), 1e-6))
    x, y, z = np.rint(strongest.mean(0)).astype(int).tolist() if len(strongest) else [s // 2 for s in change.shape]
    return min(x + max(1, change.shape[0] // 20), change.shape[0] - 1), y, z


def _side_by_side(slices: Mapping[str, np.ndarray]) -> np.ndarray:
    height = max(len(image) for image in slices.values())
    padded = []
    for image in slices.values():
        above = (height - len(image)) // 2
        padded.append(np.pad(image, ((above, height - len(image) - above), (1, 1))))
    return np.concatenate(padded, 1)


def _to_png(scan: np.ndarray, change: np.ndarray) -> bytes:
    """The scan (H, W) in [0, 1], and below it the scan with its change (H, W) in colour, full at -1 and 1."""
    from PIL import Image

    grey = np.repeat(255 * scan.clip(0, 1)[..., None], 3, -1)
    share = np.abs(change).clip(0, 1)[..., None]
    colour = np.where(change[..., None] > 0, np.array(RED, float), np.array(BLUE, float))
    both = np.concatenate([grey, (1 - share) * 0.6 * grey + share * colour], 0).astype(np.uint8)
    scale = max(1, round(WIDTH / both.shape[1]))
    image = Image.fromarray(both, "RGB").resize(
        (both.shape[1] * scale, both.shape[0] * scale), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_data_url(picture: bytes) -> str:
    """A PNG as the address of an image that is part of the page."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
