"""Proves what the semantic encoder sees of a scan: the same from a table, a NIfTI, a run and a bundle."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldae import LDAE
from ldae.config import compose_config
from ldae.data.augmentation import Augmentation
from ldae.data.cohort import load_cohort
from ldae.data.nifti import BadScan
from ldae.data.tissues import Mixture, PartialVolume, Ramps, SoftSegmentation, TissueMaker
from ldae.data.transforms import Transform
from ldae.data.view import T1View, TissueView
from ldae.data.volumes import VolumeCache
from ldae.utils.errors import UserError
from small_run import SMALL, small_run

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


def write_brain(path: Path, seed: int, scale: float = 1.0) -> Path:
    """A ball of three tissues, 0 outside, as a NIfTI of 2 mm."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.arange(size) - (size - 1) / 2 for size in (36, 36, 36)], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes)) + generator.normal(0, 0.3, (36, 36, 36))
    levels = np.select([radius < 5, radius < 11, radius < 16], [30, 100, 70], 0) * scale
    data = np.where(levels > 0, levels + generator.normal(0, 3 * scale, levels.shape), 0)
    nib.save(nib.Nifti1Image(np.maximum(data, 0).astype(np.float32), np.diag([2.0, 2, 2, 1])), path)
    return path


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


def tissue_view(maker: TissueMaker | None = None, **grid) -> TissueView:
    maker = maker or SoftSegmentation()
    return TissueView(transform(), maker=maker, channels=maker.channels, **grid)


def test_tissues_are_found_at_the_resolution_of_the_scan_and_then_resampled(tmp_path):
    view, path = tissue_view(shape=(18, 18, 18), spacing=4.0), write_brain(tmp_path / "a.nii.gz", 0)
    csf, grey, white = view(path)
    middle = (9, 9, 9)
    assert csf[middle] > 0.95
    assert white[9, 9, 5] > 0.8
    assert grey[9, 9, 2] > 0.8
    assert not np.stack([csf, grey, white])[:, 0, 0, 0].any()
    mask = np.float32(np.asarray(nib.load(path).dataobj) > 0)
    brain = view.transform.maps(mask[None], np.diag([2, 2, 2, 1]))
    np.testing.assert_allclose(csf + grey + white, brain[0], atol=1e-5)
    brighter = view(write_brain(tmp_path / "b.nii.gz", 0, scale=40))
    np.testing.assert_allclose(brighter, [csf, grey, white], atol=2e-3)


def test_the_same_scan_has_the_same_bytes_and_another_maker_or_grid_another_cache(tmp_path):
    path = str(write_brain(tmp_path / "a.nii.gz", 0))
    makers = [SoftSegmentation(), SoftSegmentation(boundary=0.7), PartialVolume(), Mixture(), Mixture(bins=256)]
    views = [tissue_view(maker) for maker in makers] + [tissue_view(shape=(9, 10, 8)), tissue_view(spacing=3.0)]
    views += [T1View(transform()), TissueView(transform(), maker=Ramps(), channels=2)]
    assert len({view.key() for view in views}) == len(views)
    stored = [VolumeCache(tmp_path / name, views[0]).build([path], progress=False)[0] for name in "ab"]
    assert stored[0].files[0].read_bytes() == stored[1].files[0].read_bytes()
    assert (stored[0].batch([0])[0].numpy() == views[0](path).astype(np.float16)).all()


def test_scans_without_three_tissues_are_rejected_with_the_reason(tmp_path, table, scans):
    for number, path in enumerate(scans):
        write_brain(Path(path), number)
    data = np.zeros((36, 36, 36), np.float32)
    data[10:20, 10:20, 10:20], data[15:20, 10:20, 10:20] = 5, 9
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), scans[3])
    cohort = load_cohort(table, None, transform(), tmp_path / "cache", SHARES, progress=False, view=tissue_view())
    assert cohort.rejected["path"].tolist() == [scans[3]]
    assert "no three tissues" in cohort.rejected["reason"][0]
    assert len(cohort) == len(cohort.volumes) == len(cohort.views) == 5
    for row, path in enumerate(cohort.table["path"]):
        assert (cohort.views.batch([row])[0].numpy() == tissue_view()(path).astype(np.float16)).all()
        assert (cohort.volumes.batch([row])[0].numpy() == transform()(path).astype(np.float16)).all()
    with pytest.raises(BadScan, match=r"3\.nii: no three tissues"):
        tissue_view()(scans[3])


def test_the_maps_of_a_volume_in_model_space_are_those_of_its_scan(tmp_path):
    view = TissueView(Transform((36, 36, 36), 2.0))
    path = write_brain(tmp_path / "a.nii.gz", 0)
    x = torch.from_numpy(view.volumes(path))[None]
    difference = view.of_volumes(x) - torch.from_numpy(view(path))
    assert difference.abs().mean() < 0.005
    soft = {"maker": SoftSegmentation()}  # whose maps depend on the size of the voxels
    coarse = TissueView(Transform((18, 18, 18), 4.0), scan_spacing=2.0, **soft)
    x_coarse, own = torch.from_numpy(coarse.volumes(path))[None], torch.from_numpy(coarse(path))
    sharp = TissueView(Transform((18, 18, 18), 4.0), **soft)
    assert sharp.key() == coarse.key()
    errors = [(other.of_volumes(x_coarse) - own).square().mean() for other in (coarse, sharp)]
    assert errors[0] < 0.9 * errors[1]
    finer = TissueView(Transform((18, 18, 18), 4.0), shape=(36, 36, 36), spacing=2.0)
    assert finer.of_volumes(x[..., ::2, ::2, ::2]).shape == (1, 3, 36, 36, 36)
    assert not view.of_volumes(torch.zeros(2, 1, 36, 36, 36)).any()


def test_the_spacing_of_the_scans_is_that_of_the_phantoms_or_of_preprocessed_scans():
    spacings = {}
    for data in ("phantom", "ixi", "table"):
        config = compose_config("train", ["stage=repr", f"data={data}", "data.table=x.csv", "data/view=tissues"])
        spacings[data] = instantiate(config.data.view).scan_spacing
    assert spacings == {"phantom": 4.75, "ixi": 1.5, "table": 1.5}


def test_augmentation_changes_only_the_geometry_of_tissues(tmp_path, table, scans):
    for number, path in enumerate(scans):
        write_brain(Path(path), number)
    augmentation = Augmentation(flip=0.5, rotation=5, shift=0.1, contrast=0.2)
    options = {"progress": False, "augmentation": augmentation}
    t1 = load_cohort(table, None, transform(), tmp_path / "cache", SHARES, **options)
    tissues = load_cohort(table, None, transform(), tmp_path / "cache", SHARES, view=tissue_view(), **options)
    assert t1.draw_view_augmentation(0, [1, 2]).keys() == t1.draw_augmentation(0, [1, 2]).keys()
    drawn = tissues.draw_view_augmentation(0, [1, 2])
    assert drawn.keys() == {"augment_flip", "augment_theta"}
    changed = tissues.augment(tissues.views.batch([0, 1]), drawn)
    assert changed.shape == (2, 3, *SHAPE)
    assert changed.sum(1).max() < 1.001


TISSUES = [
    *[setting for setting in SMALL if not setting.startswith("model.encoder") and "encoder=" not in setting],
    "model/encoder=components", "model.encoder.dim=16", "model.encoder.components=4", "data/view=tissues",
    "data.view.shape=[12,12,12]", "data.view.spacing=6",
]  # fmt: skip


def test_a_run_and_its_bundle_see_a_nifti_as_the_cohort_does(tmp_path):
    path, run = write_brain(tmp_path / "a.nii.gz", 0), small_run(tmp_path / "run", settings=TISSUES)
    model = LDAE.load(run, device="cpu")
    bundle = LDAE.load(model.export(tmp_path / "bundle"), device="cpu")
    config = compose_config("train", TISSUES)
    expected = instantiate(config.data.view)(path)
    for opened in (model, bundle):
        scan = opened.open(path)
        assert torch.equal(scan.view, torch.from_numpy(expected)[None])
        assert scan.volume.shape == (1, 1, 8, 8, 8)
        assert torch.equal(opened.views([path, scan]), scan.view.expand(2, -1, -1, -1, -1))
        assert torch.equal(opened.embed(path), opened.embed_views(scan.view))
        assert torch.equal(opened.embed(scan.volume), opened.embed_views(opened.view.of_volumes(scan.volume)))
    assert torch.equal(model.embed(path), bundle.embed(path))
    assert model.view.key() == bundle.view.key() == instantiate(config.data.view).key()
    assert "sees 3 maps of tissue of 12 x 12 x 12 voxels of 6" in (tmp_path / "bundle" / "README.md").read_text()
    assert torch.equal(model.reconstruct(path, steps=2), model.reconstruct(model.open(path), steps=2))


def test_runs_and_bundles_without_a_view_see_the_volume(tmp_path):
    run = small_run(tmp_path / "run")
    config = OmegaConf.load(run / "repr" / "config.yaml")
    former = OmegaConf.create({**config, "data": {key: value for key, value in config.data.items() if key != "view"}})
    present = LDAE.load(run, device="cpu")
    (run / "repr" / "config.yaml").write_text(OmegaConf.to_yaml(former))
    path, old = write_brain(tmp_path / "a.nii.gz", 0), LDAE.load(run, device="cpu")
    assert present.view is old.view is None
    assert torch.equal(present.embed(path), old.embed(path))
    assert torch.equal(old.open(path).view, old.open(path).volume)
    assert "view" not in json.loads((old.export(tmp_path / "bundle") / "bundle.json").read_text())
