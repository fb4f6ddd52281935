"""Damaged and malicious files in the formats that the project reads: NIfTI, NPZ, safetensors, CSV, YAML, JSON, PyTorch.

Each `write_...` function writes `count` files to a folder and yields their paths; one random generator draws them all.
"""

import gzip
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

from ldae.data.latent_file import write_latents
from ldae.data.latent_npz import write_npz
from ldae.data.latents import METADATA_FILE, write_metadata

CANARY = "executed"  # file that appears in the working folder if code from an input was executed
SHARED = "LDAE_SHARED"  # environment variable: a folder with real scans below data/, used where there is one
HEADER = 352  # bytes of a NIfTI-1 header


class Hostile:
    """An object whose unpickling creates the file `CANARY`."""

    def __reduce__(self) -> tuple:
        return Path(CANARY).touch, ()


def _damage(data: bytes, draw: random.Random) -> bytes:
    """Overwrite, cut off, insert or zero bytes at a random place."""
    data, place = bytearray(data), draw.randrange(len(data))
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randrange(1, 30)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place : place + 40] = draw.randbytes(40)
    elif kind == 3:
        data[place:place] = data[: draw.randrange(1, 200)]
    else:
        data[place : place + 60] = bytes(60)
    return bytes(data)


# NIfTI-1 header fields: offset in bytes, struct format, hostile values (https://nifti.nimh.nih.gov/nifti-1).
FIELDS = (
    (0, "<i", (0, 540, -348, 2**31 - 1)),
    (40, "<8h", ((3, 32767, 32767, 32767, 1, 1, 1, 1), (3, -5, 8, 8, 1, 1, 1, 1), (7, *[9] * 7), (0, *[0] * 7))),
    (70, "<h", (0, 1, 32, 128, 1792, 2304, 9999, -1)),
    (76, "<8f", ((1, np.nan, 1, 1, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0), (1, 1e30, 1, 1, 0, 0, 0, 0))),
    (108, "<f", (-352.0, 1e12, np.nan, -np.inf, 3.0)),
    (112, "<2f", ((np.nan, 0.0), (1e38, 1e38), (np.inf, 0))),
    (252, "<2h", ((0, 0), (-1, 99))),
    (280, "<12f", ((0.0,) * 12, (np.nan,) * 12, (1e30,) * 12)),
    (344, "4s", (b"\0\0\0\0", b"ni1\0", b"evil")),
    (348, "4s", (b"\1\0\0\0",)),  # says that header extensions follow
)


def _valid_scans(folder: Path) -> list[bytes]:
    """A scan of noise and, where $LDAE_SHARED/data has scans, up to 4 of those, every 10th voxel along each axis."""
    image = nib.Nifti1Image(np.random.default_rng(0).random((8, 8, 8), np.float32), np.diag([2.0, 2, 2, 1]))
    real = [nib.load(path) for path in sorted(Path(os.environ.get(SHARED, "-"), "data").rglob("*_T1w.nii.gz"))[:4]]
    images = [image, *(scan.slicer[::10, ::10, ::10] for scan in real)]
    for number, scan in enumerate(images):
        nib.save(scan, folder / f"valid{number}.nii")
    return [(folder / f"valid{number}.nii").read_bytes() for number in range(len(images))]


def write_niftis(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """NIfTI with hostile header values, random bytes in the header, or damage anywhere; plain and gzipped."""
    valid = _valid_scans(folder)
    fields = [(offset, form, value) for offset, form, values in FIELDS for value in values]
    draw.shuffle(fields)
    for number in range(count):
        data = valid[number % len(valid)]
        if number % 2 == 0:
            offset, form, value = fields[(number // 2) % len(fields)]
            packed = struct.pack(form, *(value if isinstance(value, tuple) else (value,)))
            data = data[:offset] + packed + data[offset + len(packed) :]
        elif number % 4 == 1:
            place, length = draw.randrange(HEADER), draw.randrange(1, 9)
            data = data[:place] + draw.randbytes(length) + data[place + length :]
        packs = number % 3 == 0
        data = gzip.compress(data, 1) if packs else data
        path = folder / f"scan{number}{'.nii.gz' if packs else '.nii'}"
        path.write_bytes(_damage(data, draw) if number % 4 == 3 else data)
        yield path


def write_npzs(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """NPZ with pickles, arrays that claim terabytes, compression bombs, member names outside the folder, or damage."""
    valid = folder / "valid.npz"
    write_npz(valid, np.ones((3, 2, 2, 2)), np.ones((3, 2, 2, 2)), "hash")
    mean = zipfile.ZipFile(valid).read("mean.npy")
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 9999999999999, 9), }\n"
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    members = (
        {"mean.npy": pickle.dumps(Hostile())},
        {"mean.npy": huge},
        {"mean.npy": mean[:80] + b"\n" * 9},
        {"../../mean.npy": mean},
        {"mean.npy": mean + bytes(2**31 // 16)},
        {"mean.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 70000},
    )
    for number in range(count):
        path = folder / f"latent{number}.npz"
        if number % 4 == 0:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in members[number // 4 % len(members)].items():
                    archive.writestr(name, data)
        elif number % 4 == 1:
            wrong = np.array([Hostile()]) if number % 8 == 1 else np.full((3, 2, 2, 2), (1j, np.nan)[number % 3 > 0])
            np.savez(path, mean=wrong, std=wrong, autoencoder=np.str_("hash"))
        else:
            path.write_bytes(_damage(valid.read_bytes(), draw))
        yield path


def write_latent_files(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """Latent files whose header claims terabytes, other types, gaps or other names, or with damaged bytes."""
    valid, row = folder / "valid.safetensors", np.zeros((2, 16), np.uint8)
    write_latents(valid, "hash", row, row, [(np.ones((2, 3, 2, 2, 2)), np.ones((2, 3, 2, 2, 2)))])
    data = valid.read_bytes()
    fields = (
        (b"[2,3,2,2,2]", (b"[2,3,9,9,9]", b"[99999999]", b"[2,24,1,1 ]", b"[0,3,2,2,2]", b"[2,3,2,2.2]")),
        (b'"F32"', (b'"F64"', b'"I32"', b'"BF1"', b"12345")),
        (b'"offset', (b'"offse\xff', b'"\0ffset')),
        (b'"hash"', (b"[[[[[[", b'"evil"', b"[null]")),
        (data[:8], ((2**63).to_bytes(8, "little"), bytes(8), (7).to_bytes(8, "little"))),
    )
    hostile = [(old, new) for old, several in fields for new in several]
    draw.shuffle(hostile)
    for number in range(count):
        path = folder / f"latents{number}.safetensors"
        path.write_bytes(data.replace(*hostile[number // 2 % len(hostile)]) if number % 2 == 0 else _damage(data, draw))
        yield path


def write_latent_metadata(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """Folders of latents whose latents.json has a hostile value or damaged bytes."""
    valid = {"table": "table.csv", "scale": [1.0, 1.0, 1.0], "split_hash": "0", "autoencoder_sha256": "hash"}
    for number in range(count):
        path = folder / f"latents{number}"
        path.mkdir()
        write_npz(path / "a.npz", np.ones((3, 2, 2, 2)), np.ones((3, 2, 2, 2)), "hash")
        (path / "table.csv").write_text(
            "subject,session,path,diagnosis,age,split,latent_path\na,0,a,CN,70,train,a.npz\n"
        )
        write_metadata(path, _replace_value(valid, draw) if number % 2 == 0 else valid)
        if number % 2:
            (path / METADATA_FILE).write_bytes(_damage((path / METADATA_FILE).read_bytes(), draw))
        yield path


ROWS = (
    "=cmd|' /C calc'!A0,0,{scan},CN,70", "../../etc,0,{scan},CN,70", "a,x,{scan},CN,70", "a,0,/dev/zero,CN,70",
    "a,0,../../../../etc/passwd-,CN,70", "a,0,{scan},@SUM(A1),70", "a,0,{scan},CN,1e999", 'a,0,"{scan},CN,70',
    "a,0,{scan},CN", "a,0,,CN,70", "a\0b,0,{scan},CN,70", "a,0,{scan},CN,70\na,M000,{scan},CN,70",
    "a,99999999999999999999,{scan},CN,70", ",0,{scan},CN,70", "a,0,{scan}\0,CN,70", "a,0," + "x" * 200000 + ",CN,70",
)  # fmt: skip


def write_tables(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """Tables with spreadsheet formulas, paths that leave the folder, malformed cells, or damaged bytes."""
    scan = folder / "valid.nii"
    header = "subject,session,path,diagnosis,age\n"
    valid = header + "".join(f"s{i},{i},{scan},CN,{60 + i}\n" for i in range(8))
    for number in range(count):
        path = folder / f"table{number}.csv"
        row = ROWS[number // 2 % len(ROWS)].format(scan=scan)
        path.write_bytes(f"{header}{row}\n".encode() if number % 2 == 0 else _damage(valid.encode(), draw))
        yield path


def write_splits(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """Stored splits with damaged bytes."""
    valid = b"subject,split\n" + b"".join(b"s%d,%s\n" % (i, (b"train", b"val", b"test")[i % 3]) for i in range(20))
    for number in range(count):
        path = folder / f"split{number}.csv"
        path.write_bytes(_damage(valid, draw))
        yield path


YAMLS = (
    "!!python/object/apply:os.system ['touch executed']", "a: !!python/name:os.system", "[" * 5000, "a: ${b}", "\t",
    "model: 3", "- 1", "a: &a [*a]", "model: {autoencoder: {_target_: os.system, _args_: ['touch executed']}}",
    "model: {autoencoder: {_target_: nowhere.Class}}", "\0", "model: {autoencoder: ???}", "",
)  # fmt: skip

# Values put in place of one in a config or in a bundle's description.
VALUES = (
    -1, 0, 1e30, float("nan"), 4000, 10**12, "os.system", "", None, [], {}, [[]], "../../x", "${oc.env:HOME}", True,
    {"_target_": "os.system", "_args_": ["touch executed"]}, "x" * 10**5, [1] * 20000,
)  # fmt: skip


def _replace_value(content: Any, draw: random.Random) -> Any:
    """A copy of nested lists and mappings in which one random value is replaced by one of `VALUES`."""
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    key, value = draw.choice(items)
    content = content.copy()
    deeper = isinstance(value, dict | list) and value and draw.random() < 0.8
    content[key] = _replace_value(value, draw) if deeper else draw.choice(VALUES)
    return content


def write_run_configs(folder: Path, count: int, draw: random.Random, run: Path) -> Iterator[Path]:
    """Copies of `run` whose config.yaml has YAML tags, recursion, a hostile value, or damaged bytes."""
    valid = (run / "config.yaml").read_bytes()
    plain = OmegaConf.to_container(OmegaConf.create(valid.decode()))
    for number in range(count):
        path = folder / f"run{number}"
        path.mkdir()
        (path / "weights").symlink_to(run / "weights")
        text = YAMLS[number // 3 % len(YAMLS)].encode() if number % 3 == 0 else _damage(valid, draw)
        if number % 3 == 1:
            model = {"autoencoder": _replace_value(plain["model"]["autoencoder"], draw)}
            text = yaml.safe_dump({**plain, "model": model}).encode()
        (path / "config.yaml").write_bytes(text)
        yield path


TARGETS = (
    "os.system",
    "subprocess.run",
    "ldae.utils.files.write_text",
    "builtins.eval",
    "ldae.models.state.read_tensors",
)


def write_bundles(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """Bundles whose description names functions, files outside the bundle or huge sizes, or has damaged bytes."""
    for number in range(count):
        path = folder / f"bundle{number}"
        path.mkdir()
        about = {"format": 1, "modules": {}, "scale": [1.0], "probes": None, "sources": {}}
        about |= {key: {"_target_": TARGETS[number % 5]} for key in ("schedule", "parameterisation", "sampler")}
        target = {"_target_": "ldae.data.transforms.Transform", "shape": [8, 8, 10**9], "spacing": 2.0}
        about |= {"transform": target}
        entry = {"file": "../../valid.nii", "sha256": "0", "config": {"_target_": "ldae.models.unet.UNet"}}
        about["modules"] = {name: entry for name in ("autoencoder", "encoder", "unet", "estimator")}
        text = json.dumps(_replace_value(about, draw) if number % 4 == 2 else about).encode()
        (path / "bundle.json").write_bytes(text if number % 2 == 0 else _damage(text, draw))
        yield path


def write_checkpoints(folder: Path, count: int, draw: random.Random) -> Iterator[Path]:
    """PyTorch files with pickled code or damaged bytes, and plain pickles."""
    torch.save({"a": torch.ones(30)}, folder / "valid.pt")
    for number in range(count):
        path = folder / f"weights{number}.pt"
        if number % 3 == 0:
            torch.save({"a": torch.ones(3), "b": Hostile()}, path)
        elif number % 3 == 1:
            path.write_bytes(pickle.dumps(Hostile()))
        else:
            path.write_bytes(_damage((folder / "valid.pt").read_bytes(), draw))
        yield path
