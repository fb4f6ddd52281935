"""Proves that the cache holds what the transform gives, made once, and that unusable scans are rejected or refused."""

import logging
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from ldae.data import splits
from ldae.data.augmentation import Augmentation
from ldae.data.cohort import Cohort, load_cohort
from ldae.data.file_version import FileVersion
from ldae.data.transforms import MinMax, Transform
from ldae.data.volumes import VolumeCache
from ldae.utils.errors import UserError

SHAPE = (8, 10, 8)
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def transform() -> Transform:
    return Transform(SHAPE, 2.0)


def write_scan(path: Path, seed: int) -> str:
    data = np.random.default_rng(seed).uniform(1, 100, (9, 9, 9)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), path)
    return str(path)


@pytest.fixture
def scans(tmp_path: Path) -> list[str]:
    return [write_scan(tmp_path / f"{number}.nii", number) for number in range(6)]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("uint8", 0.5 / 255)])
def test_volumes_are_the_transformed_scans(tmp_path: Path, scans: list[str], dtype: str, error: float) -> None:
    cache = VolumeCache(tmp_path / "cache", transform(), dtype)
    volumes, rejected = cache.build(scans[::-1], progress=False)
    assert rejected == {}
    assert len(volumes) == 6
    batch = volumes.batch(np.array([5, 0, 5]))
    assert batch.shape == (3, 1, *SHAPE)
    assert batch.dtype == torch.float32
    expected = np.stack([transform()(scans[0]), transform()(scans[5]), transform()(scans[0])])
    assert np.abs(batch.numpy() - expected).max() <= error * 1.001
    assert torch.equal(volumes[5], batch[0])
    assert volumes.batch([]).shape == (0, 1, *SHAPE)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_stored_values_are_decoded_without_loss(tmp_path: Path, scans: list[str], dtype: str) -> None:
    """`read_stored` gives the file's own values; decoded, they equal NumPy's division to the last bit."""
    cache = VolumeCache(tmp_path / "cache", transform(), dtype)
    file = cache.file(scans[1])
    file.parent.mkdir(parents=True)
    whole = np.arange(640).reshape(SHAPE) % 256
    np.save(file, (whole if dtype == "uint8" else whole / 255).astype(dtype))  # every value of uint8
    volumes, _ = cache.build(scans, progress=False)
    stored = volumes.read_stored(np.array([1, 4]))
    assert stored.shape == (2, 1, *SHAPE)
    assert stored.dtype == getattr(torch, dtype)
    for volume, scan in zip(stored, (scans[1], scans[4]), strict=True):
        np.testing.assert_array_equal(volume[0].numpy(), np.load(cache.file(scan)))
    decoded = volumes.decode(stored)
    top = np.float32(255 if dtype == "uint8" else 1)
    np.testing.assert_array_equal(decoded.numpy(), np.divide(stored.numpy(), top, dtype=np.float32))
    assert torch.equal(decoded, volumes.batch([1, 4]))
    assert stored.dtype == getattr(torch, dtype)  # and is left as it was
    np.testing.assert_array_equal(stored[0, 0].numpy(), np.load(file))
    there = volumes.decode(stored.to("meta"))
    assert (there.device.type, there.dtype, there.shape) == ("meta", torch.float32, stored.shape)


def test_a_file_of_another_type_is_damaged(tmp_path: Path, scans: list[str]) -> None:
    cache = VolumeCache(tmp_path / "cache", transform(), "uint8")
    volumes, _ = cache.build(scans, progress=False)
    np.save(cache.file(scans[0]), np.zeros(SHAPE, np.float16))
    with pytest.raises(UserError, match=r"0\.nii is gone or damaged .*its data type is float16, not uint8"):
        volumes.read_stored([0])


def test_a_second_build_does_nothing_and_a_replaced_scan_is_done_again(tmp_path: Path, scans: list[str]) -> None:
    cache = VolumeCache(tmp_path / "cache", transform())
    cache.build(scans, progress=False)
    files = sorted(cache.folder.rglob("*"))
    stamps = [file.stat().st_mtime_ns for file in files]
    cache.build(scans, progress=False)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    write_scan(Path(scans[0]), seed=99)
    os.utime(scans[0], ns=(1, 1))
    assert not cache.file(scans[0]).exists()
    volumes, _ = cache.build(scans, progress=False)
    assert len(sorted(cache.folder.rglob("*.npy"))) == 7
    np.testing.assert_allclose(volumes[0].numpy(), transform()(scans[0]), atol=2**-11)
    assert volumes.versions[0].changed == 1
    assert not [file for file in cache.folder.rglob("*") if "tmp" in file.name]


def write_unnoticed(path: str, seed: int) -> None:
    """Another scan under the same path, size and time of change."""
    status = os.stat(path)
    write_scan(Path(path), seed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(path).st_size == status.st_size


def test_a_scan_that_changes_under_the_same_size_and_time_is_done_again(tmp_path: Path, scans: list[str]) -> None:
    """Its version then differs too, until the first content comes back; what was only touched is kept."""
    cache, read_cohort = VolumeCache(tmp_path / "cache", transform()), []
    for seed in (None, 99, None, 0):
        if seed is not None:
            write_unnoticed(scans[0], seed)
            os.utime(scans[1], ns=(os.stat(scans[1]).st_atime_ns, os.stat(scans[1]).st_mtime_ns))
        volumes, rejected = VolumeCache(tmp_path / "cache", transform()).build(scans, progress=False)
        assert rejected == {}
        np.testing.assert_allclose(volumes[0].numpy(), transform()(scans[0]), atol=2**-11)
        read_cohort.append([version.identity for version in volumes.versions])
    first, changed, again, back = read_cohort
    assert first[0] == back[0] != changed[0] == again[0]
    assert first[1:] == changed[1:] == again[1:] == back[1:]
    assert len(list(cache.folder.rglob("*.npy"))) == 7


def test_volumes_of_an_earlier_version_are_kept_unless_their_scan_is_read_differently(tmp_path, monkeypatch) -> None:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 9),) * 3, indexing="ij"))
    head = np.where((grid**2).sum(0) < 0.7, 300 + 100 * grid[0], 0).astype(np.float32)
    scans = [str(tmp_path / name) for name in ("usual.nii", "shifted.nii")]
    for path, background in zip(scans, (0, 200), strict=True):
        nib.save(nib.Nifti1Image(np.where(head > 0, head, np.float32(background)), np.diag([2.0, 2, 2, 1])), path)
    cache = VolumeCache(tmp_path / "cache", transform())
    present, _ = cache.build(scans, workers=0)
    right = present[1]
    torch.testing.assert_close(present[0], right)
    kept = present.files[0].stat().st_ino
    next(cache.folder.glob("reading_*")).unlink()
    np.save(present.files[1], np.full(SHAPE, 0.5, np.float16))  # what it was before
    time.sleep(0.05)  # longer than the resolution of a file's time
    transformed = []
    make = VolumeCache.make
    monkeypatch.setattr(VolumeCache, "make", lambda self, scan: transformed.append(scan) or make(self, scan))
    for _ in range(2):
        again, rejected = cache.build(scans, workers=0)
        assert not rejected
        assert transformed == scans[1:]  # once
        torch.testing.assert_close(again[1], right)
        assert again.files[0].stat().st_ino == kept


def test_volumes_of_another_user_are_checked_as_well(tmp_path: Path, scans: list[str], monkeypatch) -> None:
    cache = VolumeCache(tmp_path / "cache", transform())
    first, _ = cache.build(scans, workers=0)
    next(cache.folder.glob("reading_*")).unlink()  # they are of an earlier version
    time.sleep(0.05)  # longer than the resolution of a file's time
    utime = os.utime

    def refuse(path, ns):
        if Path(path) in first.files:
            raise PermissionError(1, "Operation not permitted", str(path))
        utime(path, ns=ns)

    monkeypatch.setattr(os, "utime", refuse)
    again, rejected = cache.build(scans, workers=0)
    assert (again.files, rejected) == (first.files, {})
    np.testing.assert_array_equal(again.batch(range(6)), first.batch(range(6)))
    monkeypatch.setattr(VolumeCache, "update", lambda *_: pytest.fail("a volume is checked again"))
    cache.build(scans, workers=0)


def test_another_transform_has_another_folder(tmp_path: Path, scans: list[str]) -> None:
    first = VolumeCache(tmp_path, transform())
    first.build(scans, progress=False)
    for other in (VolumeCache(tmp_path, Transform(SHAPE, 2.0, MinMax())), VolumeCache(tmp_path, transform(), "uint8")):
        assert not any(other.file(scan).exists() for scan in scans)
    with pytest.raises(UserError, match="cache_dtype"):
        VolumeCache(tmp_path, transform(), "float32")


def test_a_pool_makes_the_same_bytes(tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldae.data.volumes.MIN_SCANS_PER_PROCESS", 1)
    bad = tmp_path / "bad.nii"
    bad.write_bytes(b"nothing")
    alone, pooled = VolumeCache(tmp_path / "a", transform()), VolumeCache(tmp_path / "b", transform())
    _, reasons = alone.build([*scans, str(bad)], 1, progress=False)
    assert pooled.build([*scans, str(bad)], 2, progress=False)[1] == reasons
    assert list(reasons) == [str(bad)]
    for scan in scans:
        assert alone.file(scan).read_bytes() == pooled.file(scan).read_bytes()


def _build(root: Path, scans: list[str]) -> None:
    assert VolumeCache(root, transform()).build(scans, workers=1, progress=False)[1] == {}


def test_processes_may_build_at_the_same_time(tmp_path: Path, scans: list[str]) -> None:
    context = multiprocessing.get_context("spawn")  # forked children of a threaded torch may hang
    processes = [context.Process(target=_build, args=(tmp_path / "cache", scans)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    volumes, _ = VolumeCache(tmp_path / "cache", transform()).build(scans, progress=False)
    assert volumes.batch(range(6)).isfinite().all()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_cache_file_is_named(tmp_path: Path, scans: list[str], content: bytes | None) -> None:
    cache = VolumeCache(tmp_path, transform())
    (volumes, _), file = cache.build(scans, progress=False), cache.file(scans[2])
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"2\.nii is gone or damaged") as caught:
        volumes.batch([1, 2])
    assert str(file) in str(caught.value)


def write_cohort(folder: Path, subjects: int = 10, bad: tuple[int, ...] = ()) -> Path:
    lines = ["subject,session,path,diagnosis,age"]
    for number in range(subjects):
        path = folder / f"{number}.nii"
        if number in bad:
            nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.eye(4)), path)
        else:
            write_scan(path, number)
        lines.append(f"{number:03d},0,{path.name},{'AD' if number % 2 else 'CN'},70")
    table = folder / "scans.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def load(table: Path, **options: object) -> Cohort:
    folder = table.parent
    defaults = {
        "split_file": folder / "split.csv",
        "transform": transform(),
        "cache": folder / "cache",
        "shares": SHARES,
        "progress": False,
    }
    return load_cohort(table=table, **{**defaults, **options})


def test_rows_of_table_and_volumes_are_the_same_scans(tmp_path: Path) -> None:
    cohort = load(write_cohort(tmp_path, bad=(3,)))
    assert len(cohort) == len(cohort.volumes) == 9
    for row, scan in enumerate(cohort.table["path"]):
        np.testing.assert_allclose(cohort.volumes[row].numpy(), transform()(scan), atol=2**-11)
    rows = np.concatenate([cohort.rows(split) for split in ("train", "val", "test")])
    assert sorted(rows) == list(range(9))
    assert set(cohort.table["split"][cohort.rows("val")]) == {"val"}
    x = cohort.volumes.batch([0])
    assert cohort.draw_augmentation(0, [0]) == {}
    assert cohort.augment(x, {"x": x, "position": np.array([0])}) is x


def test_loading_a_cohort_reads_the_split_once_and_the_state_of_each_scan_once(tmp_path: Path, monkeypatch) -> None:
    table, calls = write_cohort(tmp_path), Counter()
    load(table).split.store()
    read_split, version_of = splits.read_split, FileVersion.of
    monkeypatch.setattr(splits, "read_split", lambda path: calls.update([str(path)]) or read_split(path))
    monkeypatch.setattr(FileVersion, "of", lambda path: calls.update([str(path)]) or version_of(path))
    load(table)
    assert calls == dict.fromkeys([str(tmp_path / "split.csv"), *(str(tmp_path / f"{n}.nii") for n in range(10))], 1)


def test_a_cohort_augments_as_drawn_into_the_batch(tmp_path: Path) -> None:
    change = Augmentation(flip=1.0, translation=2.0)
    cohort = load(write_cohort(tmp_path), augmentation=change)
    x = cohort.volumes.batch([0, 1])
    drawn = cohort.draw_augmentation(3, [20, 21])
    assert set(drawn) == {"augment_flip", "augment_theta"}
    expected = change.apply(x, change.draw(3, [20, 21], SHAPE))
    assert torch.equal(cohort.augment(x, {"x": x, "position": np.array([20, 21]), **drawn}), expected)
    assert not torch.equal(expected, x)


def test_unusable_scans_are_rejected_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = write_cohort(tmp_path, bad=(3,))
    with caplog.at_level(logging.WARNING):
        cohort = load(table)
    assert [record.message for record in caplog.records] == [
        f"rejected: {tmp_path}/3.nii (subject 003, ses-M000): all voxels are zero"
    ]
    cohort.write_rejected(tmp_path / "rejected.csv")
    written = pd.read_csv(tmp_path / "rejected.csv", dtype=str)
    assert written.to_numpy().tolist() == [["003", "ses-M000", "3.nii", "all voxels are zero"]]
    assert list(written.columns) == ["subject", "session", "path", "reason"]
    with pytest.raises(UserError, match=r"3\.nii .*subject 003.*all voxels are zero"):
        load(table, on_bad_scan="stop")
    with pytest.raises(UserError, match="on_bad_scan=ignore"):
        load(table, on_bad_scan="ignore")


def test_rejected_scans_and_filters_leave_the_split_as_it_is(tmp_path: Path) -> None:
    """All stages hold out the same subjects, though one of them may see fewer scans."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    first, second = load(write_cohort(whole)), load(write_cohort(broken, bad=(0, 5)))
    first.split.store()
    third = load(whole / "scans.csv", diagnoses=["AD"], shares={"train": 0.5, "val": 0.3, "test": 0.2}, seed=5)
    expected = dict(zip(first.table["subject"], first.table["split"], strict=True))
    for other in (second, third):
        assert 0 < len(other) < len(first)
        assert dict(zip(other.table["subject"], other.table["split"], strict=True)).items() < expected.items()
        assert other.split_hash == first.split_hash
    assert set(third.table["diagnosis"]) == {"AD"}


def test_no_split_may_end_empty(tmp_path: Path) -> None:
    table = write_cohort(tmp_path)
    cohort = load(table)
    for number in cohort.rows("val"):
        Path(cohort.table["path"][number]).write_bytes(b"truncated")
    with pytest.raises(UserError, match="split 'val' is empty: what the 2 rejected scans leave"):
        load(table)
    with pytest.raises(UserError, match="none of XX; it has AD, CN"):
        load(table, diagnoses=["XX"])


def test_many_rejected_scans_do_not_flood_the_console(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = write_cohort(tmp_path, 60, bad=tuple(range(0, 60, 2)))
    with caplog.at_level(logging.WARNING):
        assert len(load(table).rejected) == 30
    assert len(caplog.records) == 21
    assert caplog.records[-1].message == "rejected: 10 more"
