"""Proves what the semantic encoder sees of a scan: the same from a table, a NIfTI, a run and a bundle."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate

from ldae.config import compose_config
from ldae.data.cohort import load_cohort
from ldae.data.transforms import Transform
from ldae.data.view import T1View
from ldae.data.volumes import VolumeCache
from ldae.utils.errors import UserError

SHAPE = (8, 10, 8)
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def transform() -> Transform:
    return Transform(SHAPE, 4.0)


@pytest.fixture
def scans(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.nii" for number in range(6)]
    for seed, path in enumerate(paths):
        data = np.random.default_rng(seed).uniform(1, 100, (16, 20, 16)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), path)
    return list(map(str, paths))


@pytest.fixture
def table(tmp_path: Path, scans: list[str]) -> Path:
    rows = {"subject": [f"s{i}" for i in range(6)], "session": "M000", "path": scans, "diagnosis": "", "age": ""}
    pd.DataFrame(rows).to_csv(tmp_path / "scans.csv", index=False)
    return tmp_path / "scans.csv"


class TwoMaps(T1View):
    """A view of two maps per scan, which refuses the scan named 3.nii."""

    def __init__(self) -> None:
        super().__init__(transform())
        self.channels = 2

    def key(self):
        return "two"

    def __call__(self, source):
        return np.concatenate([transform()(source), 1 - transform()(source)])


def test_a_cache_holds_several_maps_of_a_scan(tmp_path, scans):
    volumes, rejected = VolumeCache(tmp_path / "cache", TwoMaps()).build(scans, progress=False)
    assert not rejected
    np.testing.assert_allclose(volumes[1], TwoMaps()(scans[1]), atol=2**-11)
    assert volumes.of_scans(scans[:3][::-1]).batch([2, 1]).equal(volumes.batch([0, 1]))


def test_the_t1_view_on_the_grid_of_the_volumes_is_the_volumes(tmp_path, table):
    view = T1View(transform())
    cohort = load_cohort(table, None, transform(), tmp_path / "cache", SHARES, progress=False, view=view)
    plain = load_cohort(table, None, transform(), tmp_path / "cache", SHARES, progress=False)
    assert cohort.views is cohort.volumes
    assert cohort.view_key is None
    assert (cohort.digest_views() == plain.digest_scans()).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    x = cohort.volumes.batch([0])
    assert view.of_volumes(x) is x


def test_a_finer_view_has_its_own_cache_and_identity(tmp_path, table, scans):
    view = T1View(transform(), shape=(16, 20, 16), spacing=2.0)
    cohort = load_cohort(table, None, transform(), tmp_path / "cache", SHARES, progress=False, view=view)
    assert cohort.views.batch([0, 1]).shape == (2, 1, 16, 20, 16)
    assert cohort.view_key == view.key() != transform().key()
    assert (cohort.digest_views() != cohort.digest_scans()).any(1).all()
    for row, path in enumerate(cohort.table["path"]):
        assert (cohort.views.batch([row])[0].numpy() == view(path).astype(np.float16)).all()
    with pytest.raises(RuntimeError, match="without views"):
        _ = replace(cohort, stored_views=None).views


def test_volumes_of_another_grid_are_interpolated_about_the_common_centre():
    x = torch.linspace(0, 1, 8).view(1, 1, 8, 1, 1).expand(1, 1, *SHAPE).contiguous()
    finer = T1View(transform(), shape=(16, 20, 16), spacing=2.0).of_volumes(x)
    assert finer.shape == (1, 1, 16, 20, 16)
    steps = finer[0, 0, 1:-1, 10, 8].diff()
    torch.testing.assert_close(steps, torch.full((13,), 1 / 14))
    torch.testing.assert_close(finer[0, 0, 7:9, 10, 8].mean(), torch.tensor(0.5))


def test_the_config_of_a_view_follows_the_volumes_unless_it_is_given_a_grid():
    config = compose_config("train", ["stage=repr", "data=ixi"])
    view = instantiate(config.data.view)
    assert view.is_volume(instantiate(config.data.transform))
    assert (config.data.view.channels, tuple(config.data.view.shape)) == (1, (32, 40, 32))
    config = compose_config("train", ["stage=repr", "data=ixi", "data.view.spacing=3", "data.view.shape=[48,64,48]"])
    assert instantiate(config.data.view).spacing == (3.0, 3.0, 3.0)
    with pytest.raises(UserError, match=r"data\.view\.channels=3"):
        T1View(transform(), channels=3)
