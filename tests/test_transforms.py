"""Proves the transform: exact on made-up scans in any orientation, invertible, plausible on real scans, and strict."""

import gzip
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ldae.data.nifti import MAX_VOXELS, BadScan
from ldae.data.transforms import MinMax, Percentiles, Transform
from ldae.utils.errors import UserError

REAL = Path(os.environ.get("LDAE_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def blob(shape: tuple[int, int, int] = (20, 24, 22), seed: int = 0) -> np.ndarray:
    """Positive noise inside an ellipsoid and zero outside: without a symmetry, so that a flip changes it."""
    grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    inside = sum(axis**2 for axis in grid) < 0.8
    return (np.random.default_rng(seed).uniform(10, 1000, shape) * inside).astype(np.float32)


def image(data: np.ndarray, spacing: float | tuple = 2.0, axcodes: str = "RAS") -> nib.Nifti1Image:
    """A scan whose voxels are `data` in RAS, stored in the axes `axcodes`."""
    affine = np.diag([*np.broadcast_to(spacing, 3), 1.0])
    affine[:3, 3] = (-31, 7, 12)
    ras = nib.Nifti1Image(data, affine)
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axcodes)
    )
    stored = ras.as_reoriented(change)
    assert "".join(nib.aff2axcodes(stored.affine)) == axcodes
    return stored


@pytest.mark.parametrize("spacing", [2.0, 1.5, 4.5, None])
@pytest.mark.parametrize("axcodes", ["LAS", "LPI", "ASR", "PSR", "SRA"])
def test_the_orientation_of_the_file_does_not_matter(axcodes: str, spacing: float | None) -> None:
    data = blob()
    transform = Transform((16, 26, 20), spacing)
    expected = transform(image(data))
    assert expected.shape == (1, 16, 26, 20)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(transform(image(data, axcodes=axcodes)), expected)


def test_las_is_ras_with_x_reversed() -> None:
    ras = Transform((20, 24, 22), 2.0)(image(blob(), axcodes="PSR"))
    las = Transform((20, 24, 22), 2.0, orientation="LAS")(image(blob(), axcodes="PSR"))
    np.testing.assert_array_equal(las, ras[:, ::-1])


def test_a_scan_of_the_wanted_voxel_size_is_not_resampled() -> None:
    """To the bit: only the intensities change, and the centre is cropped and padded with 0."""
    data = blob((21, 24, 22))
    low, high = np.percentile(data[data != 0], (0.5, 99.5))
    expected = ((torch.from_numpy(data) - float(low)) / (float(high) - float(low))).clamp(0, 1).numpy()
    # A voxel size that is rounded in the header counts as equal.
    found = Transform((21, 20, 26), 2.0)(image(data, spacing=2.0000001))[0]
    np.testing.assert_array_equal(found[:, :, 2:24], expected[:, 2:22])
    assert not found[:, :, :2].any()
    assert not found[:, :, 24:].any()


def test_percentiles_are_those_of_the_foreground() -> None:
    """Empty background does not change the values, and a single very bright voxel hardly does."""
    data = blob()
    transform = Transform(data.shape, 2.0)
    prepared = transform.to_model_space(image(data))
    assert (prepared.low, prepared.high) == tuple(np.percentile(data[data != 0], (0.5, 99.5)))
    padded = np.pad(data, 10)
    np.testing.assert_array_equal(transform(image(padded)), prepared.volume)
    data[10, 10, 10] = 1e6
    assert transform.to_model_space(image(data)).high < 1000
    np.testing.assert_allclose(transform(image(data * 7 + 0)), transform(image(data)), atol=1e-5)


def test_min_max_spans_exactly_zero_to_one() -> None:
    data = blob((40, 40, 40))
    data[0, 0, 0], data[-1, -1, -1] = -500, 5000  # outside the crop
    found = Transform((12, 12, 12), 4.5, intensity=MinMax())(image(data))
    assert found.min() == 0
    assert found.max() == 1


def test_downsampling_does_not_alias() -> None:
    """A checkerboard of 1 mm has no content at 4.5 mm; without a low-pass filter a pattern of full contrast remains."""
    x, y, z = np.indices((45, 54, 45))
    board = 500 + 400 * (-1.0) ** (x + y + z)
    found = Transform((10, 12, 10), 4.5, intensity=MinMaxOf(0, 1000))(image(board.astype(np.float32), spacing=1.0))
    inner = found[0, 2:-2, 2:-2, 2:-2]
    assert abs(inner.mean() - 0.5) < 0.01
    assert inner.std() < 0.01


class MinMaxOf(Percentiles):
    """A fixed range of intensities."""

    def limits(self, native: np.ndarray, cropped: np.ndarray) -> tuple[float, float]:
        return self.low, self.high

    def __post_init__(self) -> None:
        pass


@pytest.mark.parametrize("spacing", [1.0, 3.0, 4.5])
def test_resampling_keeps_places_in_millimetres(spacing: float) -> None:
    """The centre of mass of a smooth blob, computed with the returned affine, does not change."""
    grid = np.stack(np.meshgrid(*(np.arange(size) * 2.0 for size in (40, 48, 40)), indexing="ij"), axis=-1)
    data = 1000 * np.exp(-((grid - (31.0, 52.0, 44.0)) ** 2).sum(-1) / (2 * 9.0**2))
    scan = image(data.astype(np.float32), axcodes="PSR")
    size = round(100 / spacing)
    prepared = Transform((size, size, size), spacing, intensity=MinMax()).to_model_space(scan)
    index = np.stack(np.indices(prepared.volume.shape[1:]), axis=-1).reshape(-1, 3)
    weight = prepared.volume[0].reshape(-1)
    centre = prepared.affine[:3, :3] @ (index * weight[:, None]).sum(0) / weight.sum() + prepared.affine[:3, 3]
    np.testing.assert_allclose(centre, np.add((31.0, 52.0, 44.0), (-31, 7, 12)), atol=0.15)
    np.testing.assert_allclose(np.abs(prepared.affine[:3, :3]), np.eye(3) * spacing, atol=1e-5)


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "PSR"])
def test_inverse_returns_the_scan_where_nothing_was_lost(axcodes: str) -> None:
    scan = image(blob(), axcodes=axcodes)
    transform = Transform((24, 26, 22), 2.0, intensity=MinMax())
    restored = transform.inverse(transform(scan), scan)
    np.testing.assert_array_equal(restored.affine, scan.affine)
    assert restored.shape == scan.shape
    np.testing.assert_allclose(np.asarray(restored.dataobj), np.asarray(scan.dataobj), atol=1e-3)


def test_inverse_of_a_resampled_scan_and_outside_the_field_of_view(tmp_path: Path) -> None:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 50) for _ in range(3)), indexing="ij"), axis=-1)
    smooth = (100 + 900 * np.exp(-4 * (grid**2).sum(-1))).astype(np.float32)
    scan = image(smooth, spacing=1.0, axcodes="ASR")
    scan.header.set_xyzt_units("mm")
    nib.save(scan, tmp_path / "scan.nii.gz")
    transform = Transform((16, 16, 16), 2.0, intensity=MinMax())
    prepared = transform.to_model_space(tmp_path / "scan.nii.gz")
    restored = transform.inverse(torch.from_numpy(prepared.volume)[0], tmp_path / "scan.nii.gz")
    data = np.asarray(restored.dataobj)
    inner = (slice(11, 39),) * 3
    assert np.abs(data - np.asarray(scan.dataobj))[inner].max() < 0.04 * 900  # what 2 mm voxels cannot hold
    assert data[0, 0, 0] == prepared.low
    assert restored.header.get_xyzt_units()[0] == "mm"
    with pytest.raises(ValueError, match="model space"):
        transform.inverse(prepared.volume[:, 1:], scan)


def test_labels_keep_their_numbers_and_fractions_their_volume() -> None:
    """Nearest-neighbour interpolation keeps the numbers; sums of fractions keep the volume in mm3."""
    labels = np.zeros((60, 72, 60), np.int16)
    labels[20:34, 30:41, 22:35] = 51
    labels[40:44, 20:50, 20:40] = 47
    scan = image(labels, spacing=1.0, axcodes="PSR")
    same = Transform((60, 72, 60), 1.0).labels(scan)
    np.testing.assert_array_equal(same, labels)
    transform = Transform((16, 18, 16), 4.5)
    assert set(np.unique(transform.labels(scan))) == {0, 47, 51}
    assert transform.fraction(scan, [51]).sum() * 4.5**3 == pytest.approx((labels == 51).sum(), rel=0.02)
    assert transform.fraction(scan, [47, 51]).sum() * 4.5**3 == pytest.approx((labels > 0).sum(), rel=0.02)
    assert not transform.labels(image(np.zeros((60, 72, 60), np.int16))).any()


def test_the_key_changes_with_every_parameter() -> None:
    changes = [
        {},
        {"shape": (8, 8, 9)},
        {"spacing": 2.0},
        {"spacing": (1.0, 1.0, 2.0)},
        {"spacing": None},
        {"intensity": MinMax()},
        {"intensity": Percentiles(1, 99.5)},
        {"orientation": "LAS"},
    ]
    keys = [Transform(**{"shape": (8, 8, 8), "spacing": 1.0, **change}).key() for change in changes]
    assert len(set(keys)) == len(keys)
    assert Transform([8, 8, 8], [1, 1, 1], Percentiles(0.5, 99.5)).key() == keys[0]
    used = Transform((8, 8, 8), 1.0)
    used(image(blob()))
    assert used.key() == keys[0]
    assert pickle.loads(pickle.dumps(used)).key() == keys[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (8, 8)},
        {"shape": (8, 8, 0)},
        {"spacing": 0},
        {"spacing": (1, 2)},
        {"orientation": "RAA"},
        {"orientation": "XYZ"},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Transform(**{"shape": (8, 8, 8), "spacing": 1.0, **wrong})
    with pytest.raises(UserError):
        Percentiles(99, 1)


def test_hydra_builds_a_transform() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        {
            "_target_": "ldae.data.transforms.Transform",
            "spacing": 2.0,
            "shape": [8, 8, 8],
            "intensity": {"_target_": "ldae.data.transforms.MinMax"},
        }
    )
    assert instantiate(node).key() == Transform((8, 8, 8), 2.0, MinMax()).key()


def without_affine(scan: nib.Nifti1Image) -> nib.Nifti1Image:
    scan.set_sform(None, 0)
    scan.set_qform(None, 0)
    return scan


def with_affine(affine: np.ndarray) -> nib.Nifti1Image:
    scan = nib.Nifti1Image(blob(), np.eye(4))
    scan.set_qform(None, 0)
    scan.header["sform_code"] = 2
    for name, row in zip(("srow_x", "srow_y", "srow_z"), affine, strict=False):
        scan.header[name] = row
    return scan


def save(scan: nib.Nifti1Image, path: Path) -> None:
    """Write header and voxels unchanged: nibabel's own writer corrects or refuses some headers."""
    header = scan.header.copy()
    header["vox_offset"], header["magic"], header["scl_slope"] = 352, b"n+1", np.nan
    path.write_bytes(gzip.compress(header.binaryblock + b"\0" * 4 + np.asarray(scan.dataobj).tobytes(order="F")))


def holding(value: float) -> np.ndarray:
    data = blob()
    data[3, 4, 5] = value
    return data


CONTENT = {
    "4-D": (lambda: image4d(3), "3-D"),
    "2-D": (lambda: nib.Nifti1Image(np.ones((9, 9)), np.eye(4)), "3-D"),
    "slice": (lambda: nib.Nifti1Image(np.ones((9, 9, 1)), np.eye(4)), "not a volume"),
    "zero": (lambda: image(np.zeros((9, 9, 9), np.float32)), "zero"),
    "constant": (lambda: image(np.full((9, 9, 9), 7, np.float32)), "equal"),
    "NaN": (lambda: image(holding(np.nan)), "NaN"),
    "infinite": (lambda: image(holding(-np.inf)), "infinite"),
    "no affine": (lambda: without_affine(image(blob())), "affine"),
    "NaN affine": (lambda: with_affine(np.diag([1, np.nan, 1, 1])), "affine"),
    "flat affine": (
        lambda: with_affine(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])),
        "degenerate",
    ),
    "zero affine": (lambda: with_affine(np.diag([1, 0, 1, 1.0])), "mm"),
    "huge voxels": (lambda: with_affine(np.diag([1e5, 1, 1, 1.0])), "mm"),
    "colours": (
        lambda: nib.Nifti1Image(np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)),
        "real",
    ),
    "complex": (lambda: nib.Nifti1Image(np.ones((9, 9, 9), np.complex64), np.eye(4)), "real"),
}


def image4d(frames: int) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.stack([blob()] * frames, axis=-1), image(blob()).affine)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CONTENT)
def test_the_reason_against_unusable_content_is_named(tmp_path: Path, name: str) -> None:
    make, what = CONTENT[name]
    path = tmp_path / "scan.nii.gz"
    save(make(), path)
    with pytest.raises(BadScan, match=what) as caught:
        Transform((8, 8, 8), 2.0)(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


def test_a_4_d_file_with_one_frame_is_a_volume() -> None:
    transform = Transform((20, 24, 22), 2.0)
    np.testing.assert_array_equal(transform(image4d(1)), transform(image(blob())))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_and_foreign_files_are_named(tmp_path: Path, suffix: str) -> None:
    good, path = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    nib.save(image(blob()), good)
    content = good.read_bytes()
    transform = Transform((8, 8, 8), 2.0)
    junk = np.random.default_rng(0).bytes(5000)
    for damaged in (
        content[: len(content) // 2],
        content[:-50],
        content[:200],
        b"",
        b"not a scan",
        junk,
        gzip.compress(junk),
    ):
        path.write_bytes(damaged)
        with pytest.raises(BadScan, match="bad"):
            transform(path)
    with pytest.raises(BadScan, match="no such file"):
        transform(tmp_path / "none.nii")
    transform(good)


@pytest.mark.parametrize("shape", [(32767, 32767, 32767), (2000, 2000, 2000)])
def test_a_header_that_states_too_many_voxels_is_refused_before_they_are_read(tmp_path: Path, shape: tuple) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float64)
    header.set_sform(np.eye(4), 2)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    path = tmp_path / "hostile.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + b"\0" * 4 + b"\1" * 1000))
    assert np.prod(np.array(shape, float)) > MAX_VOXELS
    with pytest.raises(BadScan, match="header states"):
        Transform((8, 8, 8), 2.0)(path)
    wide = nib.Nifti1Image(blob((200, 9, 9)), np.diag([50.0, 50, 50, 1]))
    with pytest.raises(BadScan, match="cannot be right"):
        Transform((8, 8, 8), 0.1)(wide)


def test_random_bytes_in_a_header_raise_nothing_but_bad_scan(tmp_path: Path) -> None:
    """With random bytes in a valid header there is either a valid volume or a BadScan."""
    rng = np.random.default_rng(0)
    nib.save(image(blob((8, 8, 8))), tmp_path / "good.nii")
    content = (tmp_path / "good.nii").read_bytes()
    transform, path, bad = Transform((8, 8, 8), None), tmp_path / "fuzzed.nii", 0
    for _ in range(150):
        fuzzed = bytearray(content)
        for place in rng.integers(0, 352, 6):
            fuzzed[place] = rng.integers(256)
        path.write_bytes(fuzzed)
        try:
            found = transform(path)
            assert np.isfinite(found).all()
            assert 0 <= found.min() <= found.max() <= 1
        except BadScan:
            bad += 1
    assert 0 < bad < 150


@pytest.mark.skipif(not REAL.exists(), reason="no real scans beside the project")
@pytest.mark.parametrize(
    "name", ["ixi_hh/sub-IXI012/anat/sub-IXI012_T1w.nii.gz", "ds000011/sub-01/anat/sub-01_T1w.nii.gz"]
)
@pytest.mark.parametrize(("shape", "spacing"), [((40, 48, 40), 4.5), ((96, 112, 96), 2.0)])
def test_a_real_head_is_centred_symmetric_and_restored(name: str, shape: tuple, spacing: float) -> None:
    """The head is in the middle, the whole range of intensities is used, and the inverse agrees with the scan."""
    transform = Transform(shape, spacing)
    prepared = transform.to_model_space(REAL / name)
    volume = prepared.volume[0]
    assert volume.shape == shape
    assert (volume.min(), volume.max()) == pytest.approx((0, 1), abs=0.2)
    assert 0.05 < volume.mean() < 0.6
    centre = [(np.indices(shape)[axis] * volume).sum() / volume.sum() / shape[axis] for axis in range(3)]
    assert np.abs(np.array(centre) - 0.5).max() < 0.12
    # A head is most similar to its reflection from left to right.
    match = [np.corrcoef(volume.ravel(), np.flip(volume, axis).ravel())[0, 1] for axis in range(3)]
    assert match[0] > max(match[1:]) + 0.03
    scan = nib.load(REAL / name)
    restored = transform.inverse(prepared.volume, REAL / name)
    np.testing.assert_array_equal(restored.affine, scan.affine)
    seen = np.asarray(transform.inverse(np.ones(shape), scan).dataobj) > (prepared.low + prepared.high) / 2
    pair = np.asarray(scan.dataobj)[seen].astype(float), np.asarray(restored.dataobj)[seen]
    assert np.corrcoef(*pair)[0, 1] > (0.9 if spacing > 4 else 0.97)


@pytest.mark.skipif(not REAL.exists(), reason="no real scans beside the project")
def test_real_anatomy_is_where_ras_has_it() -> None:
    """x increases to the right, y to the front and z upwards; the files are stored as PSR."""
    folder = REAL / "ixi_hh" / "derivatives" / "dlmuse"
    transform = Transform((40, 48, 40), 4.5)
    for path in sorted(folder.glob("sub-*/anat/*_dseg.nii.gz"))[:3]:
        labels = transform.labels(path)
        right, left, hippocampus, cerebellum = (np.argwhere(labels == n).mean(0) for n in (51, 52, 47, 38))
        assert right[0] > left[0] + 2
        assert right[1] > cerebellum[1] + 2
        assert right[2] > hippocampus[2] + 2


@pytest.mark.skipif(not REAL.exists(), reason="no real scans beside the project")
def test_the_central_crop_contains_real_brains() -> None:
    folder = REAL / "ixi_hh" / "derivatives" / "dlmuse"
    transform = Transform((40, 48, 40), 4.5)
    for path in sorted(folder.glob("sub-*/anat/*_dseg.nii.gz"))[::50]:
        labels = nib.load(path)
        data = np.asarray(labels.dataobj)
        volume = (data > 0).sum() * abs(np.linalg.det(labels.affine[:3, :3]))
        kept = transform.fraction(path, np.unique(data[data > 0]).tolist()).sum() * 4.5**3
        assert kept > 0.99 * volume
