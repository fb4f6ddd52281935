"""What is damaged: NIfTI, NPZ, CSV, YAML, JSON and PyTorch files with hostile values, from real ones where there are.

Every generator yields (kind, path) of `count` files that it has written to a folder, all drawn from one seed.
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

CANARY = "executed"  # a file that hostile content would make
SHARED = "LDAE_SHARED"  # names a folder with real scans
HEADER = 352  # bytes of NIfTI-1

Case = tuple[str, Path]


class Hostile:
    """Unpickled, it would leave the canary."""

    def __reduce__(self) -> tuple:
        return Path(CANARY).touch, ()


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, repeated or blanked."""
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


# NIfTI-1 header fields: offset, format and hostile values (https://nifti.nimh.nih.gov/nifti-1).
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
    (348, "4s", (b"\1\0\0\0",)),  # extensions follow
)


def _good_scans(folder: Path) -> list[bytes]:
    """A made-up scan, and the real ones of $LDAE_SHARED/data with their headers, thinned out to be quick."""
    image = nib.Nifti1Image(np.random.default_rng(0).random((8, 8, 8), np.float32), np.diag([2.0, 2, 2, 1]))
    real = [nib.load(path) for path in sorted(Path(os.environ.get(SHARED, "-"), "data").rglob("*_T1w.nii.gz"))[:4]]
    images = [image, *(scan.slicer[::10, ::10, ::10] for scan in real)]
    for number, scan in enumerate(images):
        nib.save(scan, folder / f"good{number}.nii")
    return [(folder / f"good{number}.nii").read_bytes() for number in range(len(images))]


def niftis(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Hostile values in headers, random bytes in headers, damaged bytes anywhere; plain and compressed."""
    good = _good_scans(folder)
    fields = [(offset, form, value) for offset, form, values in FIELDS for value in values]
    draw.shuffle(fields)
    for number in range(count):
        data = good[number % len(good)]
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
        path.write_bytes(_damaged(data, draw) if number % 4 == 3 else data)
        yield "nifti", path


def npzs(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Pickles, arrays that claim terabytes, bombs, names outside, and damaged bytes."""
    good = folder / "good.npz"
    write_npz(good, np.ones((3, 2, 2, 2)), np.ones((3, 2, 2, 2)), "hash")
    mean = zipfile.ZipFile(good).read("mean.npy")
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
            path.write_bytes(_damaged(good.read_bytes(), draw))
        yield "npz", path


def latent_files(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Headers that claim terabytes, other types, holes and names, and damaged bytes."""
    good, row = folder / "good.safetensors", np.zeros((2, 16), np.uint8)
    write_latents(good, "hash", row, row, [(np.ones((2, 3, 2, 2, 2)), np.ones((2, 3, 2, 2, 2)))])
    data = good.read_bytes()
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
        path.write_bytes(
            data.replace(*hostile[number // 2 % len(hostile)]) if number % 2 == 0 else _damaged(data, draw)
        )
        yield "safetensors", path


def abouts(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """latents.json with hostile values, and damaged bytes."""
    good = {"table": "table.csv", "scale": [1.0, 1.0, 1.0], "split_hash": "0", "autoencoder_sha256": "hash"}
    for number in range(count):
        path = folder / f"latents{number}"
        path.mkdir()
        write_npz(path / "a.npz", np.ones((3, 2, 2, 2)), np.ones((3, 2, 2, 2)), "hash")
        (path / "table.csv").write_text(
            "subject,session,path,diagnosis,age,split,latent_path\na,0,a,CN,70,train,a.npz\n"
        )
        write_metadata(path, _with_another_value(good, draw) if number % 2 == 0 else good)
        if number % 2:
            (path / METADATA_FILE).write_bytes(_damaged((path / METADATA_FILE).read_bytes(), draw))
        yield "latents.json", path


ROWS = (
    "=cmd|' /C calc'!A0,0,{scan},CN,70", "../../etc,0,{scan},CN,70", "a,x,{scan},CN,70", "a,0,/dev/zero,CN,70",
    "a,0,../../../../etc/passwd-,CN,70", "a,0,{scan},@SUM(A1),70", "a,0,{scan},CN,1e999", 'a,0,"{scan},CN,70',
    "a,0,{scan},CN", "a,0,,CN,70", "a\0b,0,{scan},CN,70", "a,0,{scan},CN,70\na,M000,{scan},CN,70",
    "a,99999999999999999999,{scan},CN,70", ",0,{scan},CN,70", "a,0,{scan}\0,CN,70", "a,0," + "x" * 200000 + ",CN,70",
)  # fmt: skip


def csvs(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Formulas, paths that climb, wrong cells, and damaged bytes."""
    scan = folder / "good.nii"
    header = "subject,session,path,diagnosis,age\n"
    good = header + "".join(f"s{i},{i},{scan},CN,{60 + i}\n" for i in range(8))
    for number in range(count):
        path = folder / f"table{number}.csv"
        row = ROWS[number // 2 % len(ROWS)].format(scan=scan)
        path.write_bytes(f"{header}{row}\n".encode() if number % 2 == 0 else _damaged(good.encode(), draw))
        yield "csv", path


def splits(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """A stored split with damaged bytes."""
    good = b"subject,split\n" + b"".join(b"s%d,%s\n" % (i, (b"train", b"val", b"test")[i % 3]) for i in range(20))
    for number in range(count):
        path = folder / f"split{number}.csv"
        path.write_bytes(_damaged(good, draw))
        yield "split", path


YAMLS = (
    "!!python/object/apply:os.system ['touch executed']", "a: !!python/name:os.system", "[" * 5000, "a: ${b}", "\t",
    "model: 3", "- 1", "a: &a [*a]", "model: {autoencoder: {_target_: os.system, _args_: ['touch executed']}}",
    "model: {autoencoder: {_target_: nowhere.Class}}", "\0", "model: {autoencoder: ???}", "",
)  # fmt: skip


# In place of a value of a config or a description.
VALUES = (
    -1, 0, 1e30, float("nan"), 4000, 10**12, "os.system", "", None, [], {}, [[]], "../../x", "${oc.env:HOME}", True,
    {"_target_": "os.system", "_args_": ["touch executed"]}, "x" * 10**5, [1] * 20000,
)  # fmt: skip


def _with_another_value(content: Any, draw: random.Random) -> Any:
    """`content`, lists and mappings, with one of its values replaced."""
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    key, value = draw.choice(items)
    content = content.copy()
    deeper = isinstance(value, dict | list) and value and draw.random() < 0.8
    content[key] = _with_another_value(value, draw) if deeper else draw.choice(VALUES)
    return content


def yamls(folder: Path, count: int, draw: random.Random, run: Path) -> Iterator[Case]:
    """A run's config: tags, recursion, hostile values, and damaged bytes."""
    good = (run / "config.yaml").read_bytes()
    plain = OmegaConf.to_container(OmegaConf.create(good.decode()))
    for number in range(count):
        path = folder / f"run{number}"
        path.mkdir()
        (path / "weights").symlink_to(run / "weights")
        text = YAMLS[number // 3 % len(YAMLS)].encode() if number % 3 == 0 else _damaged(good, draw)
        if number % 3 == 1:
            model = {"autoencoder": _with_another_value(plain["model"]["autoencoder"], draw)}
            text = yaml.safe_dump({**plain, "model": model}).encode()
        (path / "config.yaml").write_bytes(text)
        yield "yaml", path


TARGETS = (
    "os.system",
    "subprocess.run",
    "ldae.utils.files.write_text",
    "builtins.eval",
    "ldae.models.state.read_tensors",
)


def bundles(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Descriptions that name functions, files elsewhere or any size, and damaged bytes."""
    for number in range(count):
        path = folder / f"bundle{number}"
        path.mkdir()
        about = {"format": 1, "modules": {}, "scale": [1.0], "probes": None, "sources": {}}
        about |= {key: {"_target_": TARGETS[number % 5]} for key in ("schedule", "parameterisation", "sampler")}
        target = {"_target_": "ldae.data.transforms.Transform", "shape": [8, 8, 10**9], "spacing": 2.0}
        about |= {"transform": target}
        entry = {"file": "../../good.nii", "sha256": "0", "config": {"_target_": "ldae.models.unet.UNet"}}
        about["modules"] = {name: entry for name in ("autoencoder", "encoder", "unet", "estimator")}
        text = json.dumps(_with_another_value(about, draw) if number % 4 == 2 else about).encode()
        (path / "bundle.json").write_bytes(text if number % 2 == 0 else _damaged(text, draw))
        yield "bundle", path


def checkpoints(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Pickles with code, and damaged bytes, in both formats."""
    torch.save({"a": torch.ones(30)}, folder / "good.pt")
    for number in range(count):
        path = folder / f"weights{number}.pt"
        if number % 3 == 0:
            torch.save({"a": torch.ones(3), "b": Hostile()}, path)
        elif number % 3 == 1:
            path.write_bytes(pickle.dumps(Hostile()))
        else:
            path.write_bytes(_damaged((folder / "good.pt").read_bytes(), draw))
        yield "pt", path
