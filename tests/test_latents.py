"""Proves that the file of latents has the same content in whichever way it was made.

By one process or several, interrupted or not, or from NPZ files of an earlier version. Scans that changed and latents
that are damaged are encoded again; foreign, truncated and incomplete files are refused in one line.
"""

import json
import os
import shutil
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from ldae.data.cohort import load_cohort
from ldae.data.latent_file import LATENT_FILE, LatentFile, digest_rows, write_latents
from ldae.data.latent_npz import npz_name, write_npz
from ldae.data.latents import CHUNK, METADATA_FILE, LatentSet, channel_scale, write_metadata
from ldae.data.table import read_table, write_table
from ldae.data.transforms import Transform
from ldae.stages.encode_latents import OOD_FILE, encode_cohort
from ldae.stages.predecessors import match_latents
from ldae.utils.errors import UserError
from ldae.utils.shards import Shard

SCANS, BATCH = 10, 2
WEIGHTS = "5" * 64


class Encoder(torch.nn.Module):
    """In place of an autoencoder: counts batches, and is interrupted at batch `fail_at`."""

    def __init__(self, fail_at=None, factor=1.0):
        super().__init__()
        self.count, self.fail_at, self.factor = 0, fail_at, factor

    def encode(self, x):
        if self.count == self.fail_at:
            raise KeyboardInterrupt
        self.count += 1
        mean = torch.nn.functional.avg_pool3d(x, 4) * torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1)
        return mean * self.factor, mean.abs() / 3 + 0.01


class Run(SimpleNamespace):
    def module(self, name, node):
        return self.encoder

    def sha256(self, name):
        return self.weights


def run(encoder, weights=WEIGHTS):
    config = SimpleNamespace(model=SimpleNamespace(autoencoder=None))
    return Run(encoder=encoder, weights=weights, config=config, metadata={"step": 4}, path=Path("aekl"))


def accelerator(index=0, count=1, barrier=None):
    return SimpleNamespace(
        device=torch.device("cpu"), process_index=index, num_processes=count, is_main_process=index == 0,
        mixed_precision="no", autocast=nullcontext, wait_for_everyone=barrier.wait if barrier else lambda: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with scans and their table."""
    folder, rng, rows = tmp_path_factory.mktemp("scans"), np.random.default_rng(0), []
    for number in range(SCANS):
        image = nib.Nifti1Image(rng.random((8, 8, 8), np.float32), np.diag([2.0, 2, 2, 1]))
        nib.save(image, folder / f"{number}.nii")
        rows.append((f"s{number}", "M000", f"{number}.nii", "CN", 70, ("train", "val", "test")[number % 3]))
    pd.DataFrame(rows, columns=["subject", "session", "path", "diagnosis", "age", "split"]).to_csv(
        folder / "scans.csv", index=False
    )
    return folder


def cohort(scans):
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    return load_cohort(
        scans / "scans.csv", None, Transform((8, 8, 8), 2.0), scans / "cache", shares, workers=1, progress=False
    )


def encode(scans, folder, encoder=None, weights=WEIGHTS, processes=1):
    """Encode into `folder` in threads, one per process. Returns the number of batches that each encoded."""
    encoders = [encoder or Encoder() for _ in range(processes)]
    barrier, of_all = threading.Barrier(processes, timeout=60), cohort(scans)
    arguments = [(run(e, weights), of_all, folder, Path("scans.csv")) for e in encoders]
    threads = [
        threading.Thread(target=encode_cohort, args=(*args, accelerator(index, processes, barrier), BATCH))
        for index, args in enumerate(arguments[1:], 1)
    ]
    for thread in threads:
        thread.start()
    encode_cohort(*arguments[0], accelerator(0, processes, barrier), BATCH)
    for thread in threads:
        thread.join()
    return [e.count for e in encoders]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(scans, tmp_path_factory):
    """The latents of one process that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert encode(scans, folder) == [SCANS // BATCH]
    return folder


def expected(scans):
    """Posterior mean and standard deviation of all scans."""
    parts = [Encoder().encode(cohort(scans).volumes.batch([row])) for row in range(SCANS)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def npz_folder(scans, folder, weights=WEIGHTS):
    """A folder as earlier versions wrote it."""
    table = read_table(scans / "scans.csv")
    names = [npz_name(row.subject, row.session) for row in table.itertuples()]
    for name, mean, std in zip(names, *expected(scans), strict=True):
        write_npz(folder / name, mean.numpy(), std.numpy(), weights)
    write_table(table.assign(latent_path=names), folder / "old.csv")
    about = {"table": "old.csv", "scale": [1.0, 1.0, 1.0], "split_hash": "0", "autoencoder_sha256": weights}
    write_metadata(folder, about)


def test_the_file_of_latents_equals_the_npz_files_to_the_bit(scans, whole, tmp_path):
    npz_folder(scans, tmp_path)
    new, old = LatentSet.open(whole), LatentSet.open(tmp_path)
    for mine, theirs, right in zip((new.mean, new.std), (old.mean, old.std), expected(scans), strict=True):
        assert torch.equal(mine, right)
        assert torch.equal(theirs, right)
    assert sorted(p.name for p in whole.iterdir()) == [
        METADATA_FILE, LATENT_FILE, OOD_FILE, "rejected.csv", "scans_with_compressed_latent.csv"
    ]  # fmt: skip
    assert set(pd.read_csv(whole / "scans_with_compressed_latent.csv")["latent_path"]) == {LATENT_FILE}
    assert new.table["subject"].tolist() == [f"s{number}" for number in range(SCANS)]
    assert json.loads((whole / METADATA_FILE).read_text())["shape"] == [3, 2, 2, 2]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_bytes(scans, whole, tmp_path, processes):
    counts = encode(scans, tmp_path, processes=processes)
    assert sum(counts) >= SCANS // BATCH
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    "order", [("1/2", "2/2"), ("2/3", "3/3", "2/3", "1/3"), ("4/9", *(f"{n}/9" for n in range(9)))]
)
def test_jobs_in_any_order_write_the_same_bytes_as_one(scans, whole, tmp_path, order):
    counts = []
    for shard in order:
        assert (tmp_path / METADATA_FILE).exists() == (sum(counts) == SCANS // BATCH)
        encoder = Encoder()
        encode_cohort(
            run(encoder), cohort(scans), tmp_path, Path("scans.csv"), accelerator(), BATCH, Shard.parse(shard)
        )
        counts.append(encoder.count)
    assert sum(counts) == SCANS // BATCH
    (tmp_path / ".lock").unlink()
    assert contents(tmp_path) == contents(whole)


def test_jobs_at_once_write_the_same_bytes_as_one(scans, whole, tmp_path):
    cohorts = [cohort(scans) for _ in range(4)]
    arguments = [
        (run(Encoder()), of_all, tmp_path, Path("scans.csv"), accelerator(), BATCH, Shard(index % 3, 3))
        for index, of_all in enumerate(cohorts)  # the first shard twice
    ]
    threads = [threading.Thread(target=encode_cohort, args=args) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tmp_path / ".lock").unlink()
    assert contents(tmp_path) == contents(whole)


def test_a_fast_process_helps_a_slow_one(scans, whole, tmp_path):
    class Slow(Encoder):
        def encode(self, x):
            time.sleep(0.5)
            return super().encode(x)

    encoders, barrier = [Slow(), Encoder()], threading.Barrier(2, timeout=60)
    arguments = [
        (run(e), cohort(scans), tmp_path, Path("scans.csv"), accelerator(i, 2, barrier), BATCH)
        for i, e in enumerate(encoders)
    ]
    helper = threading.Thread(target=encode_cohort, args=arguments[1])
    helper.start()
    encode_cohort(*arguments[0])
    helper.join()
    assert encoders[0].count <= 2  # of its share of 3: one at work and one read ahead
    assert contents(tmp_path) == contents(whole)


def test_an_interrupted_run_is_continued(scans, whole, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        encode(scans, tmp_path, Encoder(fail_at=3))
    shards = sorted(tmp_path.rglob("shards/*.safetensors"))
    assert len(shards) == 3
    assert not (tmp_path / METADATA_FILE).exists()
    shards[0].write_bytes(shards[0].read_bytes()[:-5])  # truncated by a power failure
    (tmp_path / "shards" / ".tmp-00-x.safetensors").write_bytes(b"half")
    caplog.set_level("INFO")
    assert encode(scans, tmp_path) == [3]
    assert "3 of 5 batches of scans are encoded already" in caplog.text
    assert contents(tmp_path) == contents(whole)


def test_finished_latents_are_neither_encoded_nor_written_again(scans, tmp_path):
    encode(scans, tmp_path)
    before = (tmp_path / LATENT_FILE).stat()
    assert encode(scans, tmp_path) == [0]
    after = (tmp_path / LATENT_FILE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_latents_that_extend_others_keep_their_scale_however_often_they_are_made(scans, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    metadata = json.loads((tmp_path / METADATA_FILE).read_text())
    write_metadata(tmp_path, metadata | {"scale": [7.0] * 3, "split_hash": "earlier"})
    of_all = cohort(scans)
    extended = replace(of_all, split=replace(of_all.split, earlier=("earlier",)))
    for _ in range(2):
        encode_cohort(run(Encoder()), extended, tmp_path, Path("scans.csv"), accelerator(), BATCH)
        stored = json.loads((tmp_path / METADATA_FILE).read_text())
        assert (stored["scale"], stored["split_hash"]) == ([7.0] * 3, of_all.split_hash)


def test_a_damaged_row_is_encoded_again(scans, whole, tmp_path):
    encode(scans, tmp_path)
    data = bytearray((tmp_path / LATENT_FILE).read_bytes())
    data[len(data) // 2] ^= 64  # within the standard deviations
    (tmp_path / LATENT_FILE).write_bytes(data)
    assert encode(scans, tmp_path) == [1]
    assert contents(tmp_path) == contents(whole)


def test_a_scan_that_changed_is_encoded_again_and_no_other(scans, tmp_path):
    encode(scans, tmp_path)
    before = LatentSet.open(tmp_path)
    path, times = scans / "4.nii", os.stat(scans / "4.nii")
    old = path.read_bytes()
    image = np.random.default_rng(1).random((8, 8, 8), np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([2.0, 2, 2, 1])), path)
    assert encode(scans, tmp_path) == [1]
    after = LatentSet.open(tmp_path)
    changed = (before.mean != after.mean).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [4]
    path.write_bytes(old)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_npz_files_of_an_earlier_version_are_used(scans, whole, tmp_path, caplog):
    npz_folder(scans, tmp_path)
    caplog.set_level("INFO")
    damaged = tmp_path / npz_name("s3", "ses-M000")
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert encode(scans, tmp_path) == [1]
    assert "9 scans are taken from the NPZ files" in caplog.text
    assert (tmp_path / LATENT_FILE).read_bytes() == (whole / LATENT_FILE).read_bytes()
    assert LatentSet.open(tmp_path).table["latent_path"].tolist() == [str(tmp_path / LATENT_FILE)] * SCANS


@pytest.mark.parametrize("old", [npz_folder, lambda scans, folder, weights: encode(scans, folder, weights=weights)])
def test_latents_of_another_autoencoder_are_not_used(scans, tmp_path, caplog, old):
    old(scans, tmp_path, "other")
    assert encode(scans, tmp_path, Encoder(factor=3.0)) == [SCANS // BATCH]
    assert "another autoencoder" in caplog.text
    assert torch.equal(LatentSet.open(tmp_path).mean, expected(scans)[0] * 3)


def test_non_finite_latents_are_refused_with_the_names_of_their_scans(scans, tmp_path):
    with pytest.raises(UserError, match="not finite for s0 ses-M000, s1 ses-M000") as caught:
        encode(scans, tmp_path, Encoder(factor=float("inf")))
    assert "\n" not in str(caught.value)


def made_up(folder, count, shape=(2, 2, 1, 1), file_of=None, weights=WEIGHTS):
    """A folder with a table of `count` scans and a file with random latents of its rows `file_of`."""
    rows = [(f"s{n}", "ses-M000", f"{n}.nii", "CN", 70, ("train", "val")[n % 2], LATENT_FILE) for n in range(count)]
    columns = ["subject", "session", "path", "diagnosis", "age", "split", "latent_path"]
    table = pd.DataFrame(rows, columns=columns)
    row = digest_rows(table)[slice(None) if file_of is None else file_of]
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal((2, len(row), *shape), dtype=np.float32)
    # Written in batches of 7.
    parts = [(mean[i : i + 7], std[i : i + 7]) for i in range(0, len(row), 7)]
    write_latents(folder / LATENT_FILE, weights, row, row, parts)
    write_table(table, folder / "scans.csv")
    about = {"table": "scans.csv", "scale": [1.0, 2.0], "split_hash": "0", "autoencoder_sha256": WEIGHTS}
    write_metadata(folder, about)
    return mean, std


def test_thousands_of_latents_are_mapped_and_not_copied(tmp_path):
    mean, std = made_up(tmp_path, 5000)
    start = time.perf_counter()
    latents = LatentSet.open(tmp_path)
    assert time.perf_counter() - start < 3
    np.testing.assert_array_equal(latents.mean.numpy(), mean)
    np.testing.assert_array_equal(latents.std.numpy(), std)
    assert latents.to(torch.device("cpu")).mean.data_ptr() == latents.mean.data_ptr()
    address = latents.mean.data_ptr()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(LATENT_FILE)]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert any(begin <= address < end for begin, end in spans)


def test_a_table_in_another_order_has_the_right_latents(tmp_path):
    mean, _ = made_up(tmp_path, 20)
    table = read_table(tmp_path / "scans.csv", require_files=False)
    write_table(table.iloc[[7, 3, 12]], tmp_path / "scans.csv")
    np.testing.assert_array_equal(LatentSet.open(tmp_path).mean.numpy(), mean[[7, 3, 12]])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def other_shape(path):
    """The header describes the bytes of `std` as another grid."""
    data = path.read_bytes()
    std = data.index(b'"std"')
    path.write_bytes(data[:std] + data[std:].replace(b"[9,2,2,1,1]", b"[9,2,1,2,1]", 1))


def fewer_dimensions(path):
    path.write_bytes(path.read_bytes().replace(b"[9,2,2,1,1]", b"[  9,2,2,1]"))


def of_integers(path):
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


def without_index(path):
    path.write_bytes(path.read_bytes().replace(b'"scan"', b'"scam"'))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, other_shape, fewer_dimensions, of_integers, without_index, empty, Path.unlink])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage):
    made_up(tmp_path, 9)
    LatentSet.open(tmp_path)
    before = contents(tmp_path)
    damage(tmp_path / LATENT_FILE)
    assert contents(tmp_path) != before
    with pytest.raises(UserError, match=r"encode_latents\.py again") as caught:
        LatentSet.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_foreign_file_and_a_missing_row_are_refused(tmp_path):
    made_up(tmp_path, 9, weights="other")
    with pytest.raises(UserError, match="another autoencoder"):
        LatentSet.open(tmp_path)
    made_up(tmp_path, 9, file_of=slice(8))
    with pytest.raises(UserError, match="no latent of s8 ses-M000"):
        LatentSet.open(tmp_path)


def test_batches_of_a_wrong_shape_or_number_are_not_written(tmp_path):
    row, first = np.zeros((3, 16), np.uint8), np.zeros((2, 3, 2, 2, 2), np.float32)
    with pytest.raises(UserError, match="differ in shape"):
        write_latents(tmp_path / LATENT_FILE, WEIGHTS, row, row, [(first, first), (first[:1, :2], first[:1, :2])])
    with pytest.raises(ValueError, match="2 latents for 3 rows"):
        write_latents(tmp_path / LATENT_FILE, WEIGHTS, row, row, [(first, first)])
    assert not list(tmp_path.iterdir())


def test_the_scale_computed_in_chunks_is_that_of_all_values(tmp_path):
    count, rng = 2 * CHUNK + 9, np.random.default_rng(3)
    mean = (rng.standard_normal((count, 2, 2, 3, 1)) * [[[[3]]], [[[0.2]]]] + 5).astype(np.float32)
    std = rng.random((count, 2, 2, 3, 1), np.float32)
    rows = np.arange(0, count, 2)
    m, s = mean[rows].astype(np.float64), std[rows].astype(np.float64)
    axes = (0, 2, 3, 4)
    right = 1 / np.sqrt(m.var(axes) + np.square(s).mean(axes))
    np.testing.assert_allclose(channel_scale(torch.from_numpy(mean), torch.from_numpy(std), rows), right, rtol=1e-9)


def test_the_moments_computed_in_chunks_are_those_of_all_rows(tmp_path):
    mean, std = made_up(tmp_path, 2 * CHUNK + 3)
    latents = LatentSet.open(tmp_path)
    rows = latents.rows("train")
    scale = np.array([1.0, 2.0]).reshape(2, 1, 1, 1)
    m, v = latents.moments(rows)
    np.testing.assert_allclose(m, scale * mean[rows].mean(0), atol=1e-6)
    variance = mean[rows].astype(float).var(0) + np.square(std[rows].astype(float)).mean(0)
    np.testing.assert_allclose(v, scale**2 * variance, rtol=1e-6)
    assert LatentFile.open(tmp_path / LATENT_FILE, WEIGHTS).is_intact()


def test_the_digests_of_scans_change_with_the_precision(scans):
    read = cohort(scans)
    assert (read.digest_scans("no") == read.digest_scans()).all()
    assert not (read.digest_scans("bf16") == read.digest_scans()).all(axis=1).any()


def test_latents_of_scans_that_have_changed_are_found(scans, whole, tmp_path):
    """By size and time of change, or by content alone; a scan without a recorded version is not among them."""
    copied = shutil.copytree(scans, tmp_path / "scans")
    latents = LatentSet.open(whole)
    assert latents.find_outdated(cohort(copied)).tolist() == []
    status = os.stat(copied / "3.nii")
    other = np.random.default_rng(9).random((8, 8, 8), np.float32)
    nib.save(nib.Nifti1Image(other, np.diag([2.0, 2, 2, 1])), copied / "3.nii")
    os.utime(copied / "3.nii", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(copied / "5.nii", ns=(1, 1))
    changed = cohort(copied)
    assert latents.find_outdated(changed).tolist() == [3, 5]
    with pytest.raises(UserError, match=r"latents of 2 scans \(s3 ses-M000, ...\).*python encode_latents.py"):
        match_latents(changed, latents)
    assert encode(copied, shutil.copytree(whole, tmp_path / "latents")) == [2]
    assert LatentSet.open(tmp_path / "latents").find_outdated(changed).tolist() == []
    (tmp_path / "npz").mkdir()
    npz_folder(scans, tmp_path / "npz")
    assert LatentSet.open(tmp_path / "npz").find_outdated(changed).tolist() == []


def test_scans_that_fail_the_out_of_distribution_check_are_listed(scans, tmp_path, caplog):
    copied = shutil.copytree(scans, tmp_path / "scans")
    ramp = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    for number in range(SCANS):
        image = np.flip(ramp, 0) if number in (1, 8) else ramp
        noise = np.random.default_rng(number).normal(0, 5, image.shape)
        nib.save(nib.Nifti1Image((image + noise).astype(np.float32), np.diag([2.0, 2, 2, 1])), copied / f"{number}.nii")
    with caplog.at_level("INFO"):
        encode(copied, tmp_path / "latents")
    assert "2 of 10 scans fail the out-of-distribution check" in caplog.text
    listed = pd.read_csv(tmp_path / "latents" / OOD_FILE)
    assert listed["subject"].tolist() == ["s1", "s8"]
    for number in (1, 8):
        nib.save(nib.load(copied / "0.nii"), copied / f"{number}.nii")
    encode(copied, tmp_path / "latents")
    assert not (tmp_path / "latents" / OOD_FILE).exists()
