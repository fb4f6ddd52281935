"""Regions of label maps in model space, cached on disk so that each map is read and resampled once.

A cache file consists of (flat index, fraction) for every voxel that the region touches, exactly as `Transform.fraction`
gives them, preceded by the SHA-256 of these bytes. A region fills a few percent of the volume: a file takes kilobytes.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ldae.data.file_version import FileVersion
from ldae.data.nifti import BadScan, load_label_map
from ldae.data.transforms import Transform
from ldae.utils.files import replacing

log = logging.getLogger(__name__)

Region = tuple[int, ...]  # label numbers, ascending
VOXEL = np.dtype([("index", "<i4"), ("fraction", "<f4")])
DIGEST = hashlib.sha256().digest_size


class RegionCache:
    """A folder of regions: <root>/<transform key>-regions/<2 hex>/<key>.region, one file per label map and region.

    Several processes may use it at the same time: each file appears complete or not at all. A damaged file is made
    again, with a line in the log.

    Args:
        root: folder of all caches.
        transform: brings a label map to model space.
        regions: label numbers of each region that will be asked for. They are resampled together when the first of
            them is asked for, so that a label map is read once. Other regions may be asked for as well.
    """

    def __init__(self, root: Path | str, transform: Transform, regions: Iterable[Sequence[int]] = ()) -> None:
        self.transform = transform
        self.regions = [_region(labels) for labels in regions]
        self.folder = Path(root).absolute() / f"{transform.key()}-regions"

    def file(self, source: str | Path, labels: Sequence[int]) -> Path:
        """The cache file of a region of the label map `source`, whether it exists or not.

        Raises:
            BadScan: there is no such label map.
        """
        return self._file(FileVersion.of(source), _region(labels))

    def fraction(self, source: str | Path, labels: Sequence[int]) -> np.ndarray:
        """Fraction of each model-space voxel that belongs to `labels` of the map `source`, (X, Y, Z) float32 in [0, 1].

        Raises:
            BadScan: the label map is missing or cannot be used.
        """
        version, region = FileVersion.of(source), _region(labels)
        file = self._file(version, region)
        # A map that was touched since may have changed under the same size and time of change.
        stored = self._read(file) if file.exists() and version.is_older_than(file) else None
        return self._make(version, region) if stored is None else stored

    def fractions(self, sources: Sequence[str | Path], labels: Sequence[int]) -> np.ndarray:
        """The same for several label maps, (B, X, Y, Z)."""
        return np.stack([self.fraction(source, labels) for source in sources])

    def _file(self, version: FileVersion, region: Region) -> Path:
        key = version.cache_key(region)
        return self.folder / key[:2] / f"{key[2:]}.region"

    def _make(self, version: FileVersion, wanted: Region) -> np.ndarray:
        """Resample the region `wanted`, and store it together with the other regions that are missing on disk."""
        labels = load_label_map(version.path, self.transform.assume_orientation)
        image = nib.Nifti1Image(labels.data, labels.affine)
        result = None
        for region in dict.fromkeys((wanted, *self.regions)):
            target = self._file(version, region)
            if region != wanted and target.exists():
                continue
            try:
                fraction = self.transform.fraction(image, region)
            except BadScan as error:
                raise BadScan(error.reason, version.path) from None
            _write(target, fraction)
            result = fraction if region == wanted else result
        return result

    def _read(self, file: Path) -> np.ndarray | None:
        """The region in `file`; None if it is damaged."""
        content = file.read_bytes()
        digest, body = content[:DIGEST], content[DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            log.warning("cached region %s is damaged and is made again", file)
            return None
        voxels = np.frombuffer(body, VOXEL)
        fraction = np.zeros(int(np.prod(self.transform.shape)), np.float32)
        fraction[voxels["index"]] = voxels["fraction"]
        return fraction.reshape(self.transform.shape)


def _region(labels: Sequence[int]) -> Region:
    return tuple(sorted({int(label) for label in labels}))


def _write(file: Path, fraction: np.ndarray) -> None:
    indices = np.flatnonzero(fraction)
    voxels = np.empty(len(indices), VOXEL)
    voxels["index"], voxels["fraction"] = indices, fraction.ravel()[indices]
    body = voxels.tobytes()
    with replacing(file) as temporary:
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
