"""Regions of label maps in model space on disk: each map is read and resampled once, under a key of file and transform.

A file holds a SHA-256 of the rest, then (flat position, share) of every voxel that the region touches, exactly as
`Transform.fraction` gives them. A region fills a few percent of the volume: a file takes kilobytes, a megabyte at most.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ldae.data.cache_key import cache_key
from ldae.data.nifti import BadScan, load_scan
from ldae.data.transforms import Transform
from ldae.utils.files import replacing

log = logging.getLogger(__name__)

Region = tuple[int, ...]  # label numbers, ascending
VOXEL = np.dtype([("place", "<i4"), ("share", "<f4")])
DIGEST = hashlib.sha256().digest_size


class RegionCache:
    """A folder of regions: <root>/<transform key>-regions/<2 hex>/<key>.region, one file a label map and region.

    Any number of processes may use it at the same time; each file appears whole or not at all. A damaged file is made
    again and said so in the log.

    Args:
        root: folder of all caches.
        transform: what brings a label map to model space.
        regions: label numbers of the regions that will be asked for. They are resampled together, the first time that
            one of them is asked for, so that a label map is read once. Others may be asked for as well.
    """

    def __init__(self, root: Path | str, transform: Transform, regions: Iterable[Sequence[int]] = ()) -> None:
        self.transform = transform
        self.regions = [_region(labels) for labels in regions]
        self.folder = Path(root).absolute() / f"{transform.key()}-regions"

    def file(self, source: str | Path, labels: Sequence[int]) -> Path:
        """Where a region of the label map `source` is or will be.

        Raises:
            BadScan: there is no such label map.
        """
        key = cache_key(source, _region(labels))
        return self.folder / key[:2] / f"{key[2:]}.region"

    def fraction(self, source: str | Path, labels: Sequence[int]) -> np.ndarray:
        """Share of each model-space voxel that belongs to `labels` of the map `source`, (X, Y, Z) float32 in [0, 1].

        Raises:
            BadScan: the label map is missing or cannot be used.
        """
        stored = self._read(self.file(source, labels))
        return self._make(source, _region(labels)) if stored is None else stored

    def fractions(self, sources: Sequence[str | Path], labels: Sequence[int]) -> np.ndarray:
        """The same of several label maps, (B, X, Y, Z)."""
        return np.stack([self.fraction(source, labels) for source in sources])

    def _make(self, source: str | Path, wanted: Region) -> np.ndarray:
        """The region `wanted`, and on disk with it whatever else of this map is not there yet."""
        data, affine = load_scan(source, reject_constant=False)
        image = nib.Nifti1Image(data, affine)
        result = None
        for region in dict.fromkeys((wanted, *self.regions)):
            target = self.file(source, region)
            if region != wanted and target.exists():
                continue
            try:
                share = self.transform.fraction(image, region)
            except BadScan as error:
                raise BadScan(error.reason, source) from None
            _write(target, share)
            result = share if region == wanted else result
        return result

    def _read(self, file: Path) -> np.ndarray | None:
        """The region in `file`; None where it has to be made."""
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = content[:DIGEST], content[DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            log.warning("cached region %s is damaged and is made again", file)
            return None
        voxels = np.frombuffer(body, VOXEL)
        share = np.zeros(int(np.prod(self.transform.shape)), np.float32)
        share[voxels["place"]] = voxels["share"]
        return share.reshape(self.transform.shape)


def _region(labels: Sequence[int]) -> Region:
    return tuple(sorted({int(label) for label in labels}))


def _write(file: Path, share: np.ndarray) -> None:
    places = np.flatnonzero(share)
    voxels = np.empty(len(places), VOXEL)
    voxels["place"], voxels["share"] = places, share.ravel()[places]
    body = voxels.tobytes()
    with replacing(file) as temporary:
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
