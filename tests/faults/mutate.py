"""Mutated NIfTI, NPZ, CSV, YAML, bundle and PyTorch files: refused in one line or read, in bounded time and memory."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ldae.allowed import check_targets
from ldae.bundle import Bundle
from ldae.data.latents import read_latent, write_latent
from ldae.data.scans import load_scan
from ldae.data.table import read_table
from ldae.main import explain
from ldae.models.state import read_tensors
from ldae.runs import Run

LIMIT = 10.0  # seconds
MEMORY = 6 * 2**30
CANARY = "executed"  # a file that hostile content would make

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


def niftis(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Hostile headers, then damaged bytes, plain and compressed."""
    image = nib.Nifti1Image(np.random.default_rng(0).random((8, 8, 8), np.float32), np.diag([2.0, 2, 2, 1]))
    for suffix in (".nii", ".nii.gz"):
        nib.save(image, folder / f"good{suffix}")
    fields = [(offset, form, value) for offset, form, values in FIELDS for value in values]
    for number in range(count):
        suffix = (".nii", ".nii.gz")[number % 5 == 4]
        data = (folder / f"good{suffix}").read_bytes()
        if number % 2 == 0 and suffix == ".nii":
            offset, form, value = fields[(number // 2) % len(fields)]
            packed = struct.pack(form, *(value if isinstance(value, tuple) else (value,)))
            data = data[:offset] + packed + data[offset + len(packed) :]
        else:
            data = _damaged(data, draw)
        path = folder / f"scan{number}{suffix}"
        path.write_bytes(data)
        yield "nifti", path


def npzs(folder: Path, count: int, draw: random.Random) -> Iterator[Case]:
    """Pickles, arrays that claim terabytes, bombs, names outside, and damaged bytes."""
    good = folder / "good.npz"
    write_latent(good, np.ones((3, 2, 2, 2)), np.ones((3, 2, 2, 2)), "hash")
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


YAMLS = (
    "!!python/object/apply:os.system ['touch executed']", "a: !!python/name:os.system", "[" * 5000, "a: ${b}", "\t",
    "model: 3", "- 1", "a: &a [*a]", "model: {autoencoder: {_target_: os.system, _args_: ['touch executed']}}",
    "model: {autoencoder: {_target_: nowhere.Class}}", "\0", "model: {autoencoder: ???}", "",
)  # fmt: skip


def yamls(folder: Path, count: int, draw: random.Random, run: Path) -> Iterator[Case]:
    """A run's config: tags, recursion, wrong values, and damaged bytes."""
    good = (run / "config.yaml").read_bytes()
    for number in range(count):
        path = folder / f"run{number}"
        path.mkdir()
        (path / "weights").symlink_to(run / "weights")
        text = YAMLS[number // 2 % len(YAMLS)].encode() if number % 2 == 0 else _damaged(good, draw)
        (path / "config.yaml").write_bytes(text)
        yield "yaml", path


TARGETS = ("os.system", "subprocess.run", "ldae.files.write_text", "builtins.eval", "ldae.models.state.read_tensors")


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
        text = json.dumps(about).encode()
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


def _read_run(path: Path) -> None:
    run = Run(path)
    # A run's own config may name any class; one from a stranger comes as a bundle.
    node = run.config.model.autoencoder
    if isinstance(node, DictConfig):
        check_targets(OmegaConf.to_container(node), str(path))
    run.module("autoencoder", node)


READ: dict[str, Callable[[Path], object]] = {
    "nifti": load_scan, "npz": lambda path: read_latent(path, "hash"), "csv": read_table, "yaml": _read_run,
    "bundle": Bundle.open, "pt": read_tensors,
}  # fmt: skip


def _judge(cases: list[Case], folder: Path) -> None:
    """In a process of its own: read each case, one JSON line each."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open("results", "a", encoding="utf-8") as results:
        for kind, path in cases:
            begin = time.monotonic()
            try:
                READ[kind](path)
                outcome = "read"
            except Exception as error:  # noqa: BLE001  what is looked for
                line = explain(error)  # as the scripts do
                fine = line is not None and "\n" not in line and "Traceback" not in line
                outcome = "refused" if fine else f"{type(error).__name__}: {str(error)[:200]}"
            results.write(json.dumps([kind, path.name, outcome, time.monotonic() - begin]) + "\n")
            results.flush()


def mutated(folder: Path, run: Path, each: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Read `each` mutated inputs of every kind; outcomes by kind. `run` is a finished run of stage 1."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    cases = [
        *niftis(folder, each, draw), *npzs(folder, each, draw), *csvs(folder, each, draw),
        *yamls(folder, each, draw, run), *bundles(folder, each, draw), *checkpoints(folder, each, draw),
    ]  # fmt: skip
    results = folder / "results"
    results.touch()
    process = multiprocessing.get_context("forkserver").Process(target=_judge, args=(cases, folder))
    process.start()
    done, since = 0, time.monotonic()
    while process.is_alive():
        process.join(0.2)
        now = len(results.read_text().splitlines())
        done, since = (now, time.monotonic()) if now > done else (done, since)
        if time.monotonic() - since > 20 * LIMIT:
            process.kill()
    found = [json.loads(line) for line in results.read_text().splitlines()]
    outcomes: dict[str, Counter] = {kind: Counter() for kind in READ}
    faults = [row for row in found if row[2] not in ("read", "refused") or row[3] > LIMIT]
    for kind, _, outcome, _ in found:
        outcomes[kind][outcome] += 1
    assert len(found) == len(cases), f"the process died or hung (exit {process.exitcode}) at {cases[len(found)]}"
    assert not faults, "\n".join(map(str, faults))
    assert not list(folder.rglob(CANARY)), "something was executed"
    return {kind: dict(counts) for kind, counts in outcomes.items()}
