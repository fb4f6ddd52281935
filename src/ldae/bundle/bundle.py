"""A trained model as a description: what each network is, where its weights lie, and what its numbers mean.

It is read from a run, `runs/<name>`, or from a bundle, a folder that can be moved and shared:

    bundle.json                 format, each network's config and weights' hash, latent scale, transform, diffusion,
                                sampler, where it came from; written last, so that a torn folder is none
    <network>.safetensors       autoencoder, encoder, unet, estimator
    probes.json                 optional: frozen probes of y (ldae/evaluation/frozen.py)
    directions.json             optional: directions of edits and their settings (ldae/knowledge.py)
    README.md                   the model card (ldae/card.py)

A bundle may come from strangers: nothing in it is unpickled, its configs may name only classes of this package that
build networks, transforms and diffusion, its files must be those that were described, its tensors exactly those that
the networks have.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ldae.bundle.allowlist import ALLOWED, refuse_untrusted_targets
from ldae.bundle.description import (
    DESCRIBED,
    DESCRIPTION,
    DIRECTIONS,
    FORMAT,
    MEASURED,
    PROBES,
    described_file,
    read_description,
)
from ldae.bundle.model_card import CARD, describe_provenance, render_model_card
from ldae.data.latents import METADATA_FILE
from ldae.runs import Run, Workspace, build_stored, estimator_node, load_module, to_container
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, replacing, write_json, write_text


@dataclass(frozen=True)
class StoredNetwork:
    """One network: its config with `_target_`, its safetensors file, and that file's SHA-256."""

    config: dict[str, Any]
    file: Path
    sha256: str

    def build(self) -> nn.Module:
        """The network with its weights, on the CPU, frozen, in eval mode; its random start is never computed."""
        return load_module(self.config, self.file, self.file)


@dataclass(frozen=True)
class Bundle:
    """Everything that `LDAE` is made of.

    Attributes:
        networks: the four networks by name.
        scale: 1 / standard deviation of each latent channel.
        transform, schedule, parameterisation, sampler: configs with `_target_`; the sampler holds the guidance.
        probes: file of frozen probes, or None.
        directions: file of directions found by evaluation=manipulation, or None.
        likeness: what the training scans look like (data/likeness.py), or None where nobody measured it.
        preprocess: parameters of every step by which they were made (preprocessing/steps.py), or None.
        affine: voxel to mm, 4x4, of model space on their common grid, or None where they have none.
        sources: where it came from, for people.
    """

    networks: dict[str, StoredNetwork]
    scale: list[float]
    transform: dict[str, Any]
    schedule: dict[str, Any]
    parameterisation: dict[str, Any]
    sampler: dict[str, Any]
    probes: Path | None = None
    directions: Path | None = None
    likeness: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None
    affine: list[list[float]] | None = None
    sources: dict[str, Any] = field(default_factory=dict)

    @property
    def weights_hash(self) -> str:
        """The hash that frozen probes are tied to: of encoder and autoencoder, as evaluate.py writes it."""
        return hashlib.sha256(
            f"{self.networks['encoder'].sha256}{self.networks['autoencoder'].sha256}".encode()
        ).hexdigest()

    @classmethod
    def find(cls, path: Path | str, runs: Path | str = "runs", trust: Sequence[str] = ()) -> "Bundle":
        """The model at `path`: a bundle, a run's folder, or the name of a run below `runs`.

        Raises:
            UserError: there is none, or see `from_run` and `open`.
        """
        for place in (Path(path), Path(runs) / path):
            if (place / DESCRIPTION).is_file():
                return cls.open(place, trust)
            if (place / "aekl").is_dir():
                return cls.from_run(place)
        if Path(path).is_dir():
            return cls.from_run(path)  # which says what is missing
        known = ", ".join(sorted(found.parent.name for found in Path(runs).glob("*/repr"))) or "none"
        raise UserError(f"no run or bundle '{path}'; the runs in {runs} are: {known}")

    @classmethod
    def from_run(cls, root: Path | str) -> "Bundle":
        """The model of `runs/<name>`, each network with the config it was trained with.

        Raises:
            UserError: a stage is missing, or one stands on weights that have since been replaced.
        """
        space = Workspace(Path(root))
        runs = {name: space.predecessor(name) for name in ("aekl", "pretrain", "repr")}
        first, second, third = runs.values()
        if second.metadata["autoencoder_sha256"] != first.sha256("autoencoder"):
            raise UserError(
                f"{second.path} learned the latents of another autoencoder than {first.path}: train it again"
            )
        for stage, weights in third.metadata["stands_on"].items():
            if stage in runs and weights != runs[stage].metadata["weights"]:
                raise UserError(f"{third.path} stands on other weights than {runs[stage].path} holds: train it again")
        encoder = third.config.model.encoder
        configs = {
            "autoencoder": (first, first.config.model.autoencoder),
            "encoder": (third, encoder),
            "unet": (second, second.config.model.unet),
            "estimator": (third, estimator_node(second.config.model.unet, encoder.dim, third.config.model.estimator)),
        }
        networks = {
            name: StoredNetwork(to_container(node), run.weights_file(name), run.sha256(name))
            for name, (run, node) in configs.items()
        }
        probes, directions = space.evaluation / PROBES, space.evaluation / DIRECTIONS
        return cls(
            networks=networks,
            scale=[float(value) for value in second.metadata["scale"]],
            transform=to_container(first.config.data.transform),
            schedule=to_container(second.config.diffusion.schedule),
            parameterisation=to_container(second.config.diffusion.parameterisation),
            sampler=to_container(third.config.sampler),
            probes=probes if probes.is_file() else None,
            directions=directions if directions.is_file() else None,
            **_measured(space, first),
            sources=describe_provenance(space, runs),
        )

    @classmethod
    def open(cls, folder: Path | str, trust: Sequence[str] = ()) -> "Bundle":
        """A bundle folder, checked before anything is built.

        Args:
            trust: prefixes of further modules whose classes its configs may name, e.g. ("mylab.networks.",).

        Raises:
            UserError: it is no bundle, of another format, altered, or names what it may not.
        """
        folder = Path(folder)
        about = read_description(folder)
        for key in ("modules", *DESCRIBED):
            refuse_untrusted_targets(about[key], f"{folder / DESCRIPTION}: {key}", (*ALLOWED, *trust))
        for key in DESCRIBED:
            build_stored(about[key], f"{folder / DESCRIPTION}: {key}")
        networks = {
            name: StoredNetwork(
                about["modules"][name]["config"], described_file(folder, about["modules"][name]), entry["sha256"]
            )
            for name, entry in about["modules"].items()
        }
        files = {name: described_file(folder, about[name]) for name in ("probes", "directions") if about.get(name)}
        kept = {key: about[key] for key in (*DESCRIBED, "sources", "scale")}
        refuse_untrusted_targets(about.get("preprocess"), f"{folder / DESCRIPTION}: preprocess")
        return cls(networks=networks, **{key: about.get(key) for key in MEASURED}, **files, **kept)

    def save(self, folder: Path | str) -> Path:
        """Write the bundle; files that lie there already, as described, stay. Returns the folder."""
        folder = Path(folder)
        modules = {
            name: {"config": part.config, **_copy(part.file, folder / f"{name}.safetensors")}
            for name, part in self.networks.items()
        }
        for name, part in self.networks.items():
            if modules[name]["sha256"] != part.sha256:
                raise UserError(f"{part.file} has changed since it was published: train or export it again")
        about = {
            "format": FORMAT,
            "modules": modules,
            "scale": self.scale,
            "transform": self.transform,
            "schedule": self.schedule,
            "parameterisation": self.parameterisation,
            "sampler": self.sampler,
            "probes": _copy(self.probes, folder / PROBES) if self.probes else None,
            "directions": _copy(self.directions, folder / DIRECTIONS) if self.directions else None,
            **{key: getattr(self, key) for key in MEASURED},
            "sources": self.sources,
        }
        write_text(folder / CARD, render_model_card(about))
        write_json(folder / DESCRIPTION, about)
        return folder


def _measured(space: Workspace, autoencoder: Run) -> dict[str, Any]:
    """What encode_latents.py found about the training scans, if it was with this autoencoder."""
    path = space.latents / METADATA_FILE
    about = read_json(path) if path.is_file() else {}
    same = about.get("autoencoder_sha256") == autoencoder.sha256("autoencoder")
    return {key: about.get(key) for key in MEASURED} if same else {}


def _copy(source: Path, target: Path) -> dict[str, str]:
    if source.resolve() != target.resolve():
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    return {"file": target.name, "sha256": file_sha256(target)}
