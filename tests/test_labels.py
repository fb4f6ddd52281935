"""Proves that a label map is read once, that cached regions equal computed ones, and that a damaged one is not used."""

import os
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ldae.data.labels import RegionCache
from ldae.data.nifti import BadScan
from ldae.data.transforms import Transform

VENTRICLES, HIPPOCAMPI, OTHER = (49, 51), (47, 48), (60,)


@pytest.fixture
def transform():
    """A Transform that counts the regions that it resamples."""

    class Counting(Transform):
        resampled = 0

        def fraction(self, source, labels):
            self.resampled += 1
            return super().fraction(source, labels)

    return Counting((12, 14, 12), 4.5)


def label_map(path, seed=0):
    """Write a label map of boxes at random places, oblique, with voxels of 2 mm."""
    rng = np.random.default_rng(seed)
    data = np.zeros((24, 30, 26), np.int16)
    for label in (*VENTRICLES, *HIPPOCAMPI, *OTHER):
        x, y, z = rng.integers(3, 15, 3)
        data[x : x + 6, y : y + 7, z : z + 5] = label
    affine = np.array([[-2, 0.1, 0, 20], [0.1, 2, 0, -30], [0, 0, 2, -25], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def test_cached_regions_equal_computed_ones_and_each_map_is_read_once(tmp_path, transform, monkeypatch):
    maps = [label_map(tmp_path / f"{seed}.nii.gz", seed) for seed in range(3)]
    plain = Transform(transform.shape, transform.spacing)
    fresh = {labels: np.stack([plain.fraction(path, labels) for path in maps]) for labels in (VENTRICLES, HIPPOCAMPI)}
    assert 0 < (fresh[VENTRICLES] > 0).mean() < 0.5
    opened, load = [], nib.load
    monkeypatch.setattr(
        nib, "load", lambda path, *more, **options: opened.append(Path(path)) or load(path, *more, **options)
    )
    for _ in range(2):
        cache = RegionCache(tmp_path / "cache", transform, [VENTRICLES, HIPPOCAMPI])
        for labels, expected in fresh.items():
            found = cache.fractions(maps, labels)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(cache.fractions(maps, labels[::-1]), expected)
    assert sorted(opened) == maps
    assert transform.resampled == 2 * len(maps)


def test_a_region_that_was_not_announced_is_made_on_request(tmp_path, transform):
    path, cache = label_map(tmp_path / "map.nii.gz"), RegionCache(tmp_path / "cache", transform, [VENTRICLES])
    expected = Transform(transform.shape, transform.spacing).fraction(path, OTHER)
    for _ in range(2):
        np.testing.assert_array_equal(cache.fraction(path, OTHER), expected)
    cache.fraction(path, VENTRICLES)
    assert transform.resampled == 2


def test_another_version_transform_or_region_has_another_file(tmp_path, transform):
    path, cache = label_map(tmp_path / "map.nii.gz"), RegionCache(tmp_path, transform)
    places = {cache.file(path, VENTRICLES), cache.file(path, HIPPOCAMPI)}
    places.add(RegionCache(tmp_path, Transform((12, 14, 12), 4.0)).file(path, VENTRICLES))
    os.utime(path, ns=(1, 1))
    places.add(cache.file(path, VENTRICLES))
    assert len(places) == 4
    before = cache.fraction(path, VENTRICLES)
    label_map(path, seed=5)
    assert not np.array_equal(cache.fraction(path, VENTRICLES), before)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_cache_file_is_made_again(tmp_path, transform, caplog, damage):
    path, cache = label_map(tmp_path / "map.nii.gz"), RegionCache(tmp_path / "cache", transform)
    expected, file = cache.fraction(path, VENTRICLES), cache.file(path, VENTRICLES)
    content = bytearray(file.read_bytes())
    whole = bytes(content)
    content[-2] ^= 0x40
    broken = {"cut": whole[:-8], "flipped": bytes(content), "empty": b"", "foreign": b"not a region" * 9}[damage]
    file.write_bytes(broken)
    np.testing.assert_array_equal(cache.fraction(path, VENTRICLES), expected)
    assert file.read_bytes() == whole
    assert transform.resampled == 2
    assert f"{file} is damaged" in caplog.text


def test_a_label_map_that_cannot_be_used_is_named(tmp_path, transform):
    cache, path = RegionCache(tmp_path / "cache", transform), tmp_path / "map.nii.gz"
    with pytest.raises(BadScan, match=r"map\.nii\.gz: no such file"):
        cache.fraction(path, VENTRICLES)
    path.write_bytes(b"nothing")
    with pytest.raises(BadScan, match=r"map\.nii\.gz: unreadable"):
        cache.fraction(path, VENTRICLES)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), path)
    with pytest.raises(BadScan, match=r"map\.nii\.gz: not one 3-D volume"):
        cache.fraction(path, VENTRICLES)
    assert not list((tmp_path / "cache").rglob("*.region"))


def test_several_threads_may_ask_for_a_region_at_once(tmp_path, transform):
    """All get the complete region, and only complete files are left."""
    path = label_map(tmp_path / "map.nii.gz")
    expected, found = Transform(transform.shape, transform.spacing).fraction(path, VENTRICLES), []

    def ask():
        cache = RegionCache(tmp_path / "cache", Transform(transform.shape, transform.spacing), [VENTRICLES, HIPPOCAMPI])
        found.append(cache.fraction(path, VENTRICLES))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for share in found:
        np.testing.assert_array_equal(share, expected)
    assert [file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [".region"] * 2
