"""A trained model as a description: the config and weights of each network, and what the numbers mean.

It is read from a run, `runs/<name>`, or from a bundle, a folder that can be moved and shared:

    bundle.json              format, config and weights' hash of each network, latent scale, transform, diffusion,
                             sampler, provenance; written last, so that an incomplete folder is not taken for a bundle
    <network>.safetensors    autoencoder, encoder, unet, estimator, and optionally prior
    probes.json              optional: frozen probes of y (ldae.editing.frozen_probes)
    directions.json          optional: directions of edits and their settings (ldae.editing.readouts)
    forecast.safetensors     optional: how y moves over the years (ldae.editing.forecast_file)
    README.md                the model card (ldae.bundle.model_card)

A bundle may come from anyone; ldae.bundle.allowlist lists what is checked before it is used.
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import nn

from ldae.bundle.allowlist import check_bundle
from ldae.bundle.description import (
    BUILT,
    DESCRIPTION,
    DIRECTIONS,
    FORECAST,
    FORMAT,
    MEASURED,
    OPTIONAL_FILES,
    PROBES,
    VIEW,
    read_description,
)
from ldae.bundle.model_card import CARD, describe_provenance, render_model_card
from ldae.data.latents import METADATA_FILE
from ldae.runs import Run, Workspace, build_stored, estimator_node, load_module, prior_node, to_container
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, replacing, write_json, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredNetwork:
    """One network: its config with `_target_`, its safetensors file, and the SHA-256 of that file."""

    config: dict[str, Any]
    file: Path
    sha256: str

    def build(self) -> nn.Module:
        """The network with its weights, on the CPU, frozen, in eval mode."""
        return load_module(self.config, self.file, self.file)


@dataclass(frozen=True)
class Bundle:
    """Everything that `LDAE` is built from.

    Attributes:
        networks: the four networks by name, and the semantic prior if there is one.
        scale: 1 / standard deviation of each latent channel.
        transform, schedule, parameterisation, sampler: configs with `_target_`; the sampler includes the guidance.
        probes: file of frozen probes, or None.
        directions: file of directions found by evaluation=manipulation, or None.
        forecast: file of the forecaster fitted by evaluation=forecast, or None.
        ood_check: the out-of-distribution check of the training scans (ldae.scans.ood_check), or None.
        preprocess: parameters of the training scans' preprocessing (ldae.preprocessing.steps), or None.
        affine: voxel to mm, 4x4, of model space if all training scans share one grid, or None.
        sources: provenance, for the model card.
        view: config of what the semantic encoder sees of a scan (ldae.data.view); None: the volumes.
    """

    networks: dict[str, StoredNetwork]
    scale: list[float]
    transform: dict[str, Any]
    schedule: dict[str, Any]
    parameterisation: dict[str, Any]
    sampler: dict[str, Any]
    probes: Path | None = None
    directions: Path | None = None
    ood_check: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None
    affine: list[list[float]] | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    view: dict[str, Any] | None = None
    forecast: Path | None = None

    @property
    def weights_hash(self) -> str:
        """Hash of encoder and autoencoder, by which probes and directions name the model that they were fitted on."""
        hashes = f"{self.networks['encoder'].sha256}{self.networks['autoencoder'].sha256}"
        return hashlib.sha256(hashes.encode()).hexdigest()

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
            return cls.from_run(path)  # raises the error that names what is missing
        known = ", ".join(sorted(found.parent.name for found in Path(runs).glob("*/repr"))) or "none"
        raise UserError(f"no run or bundle '{path}'; the runs in {runs} are: {known}")

    @classmethod
    def from_run(cls, root: Path | str) -> "Bundle":
        """The model of `runs/<name>`, each network with the config that it was trained with.

        Raises:
            UserError: a stage is missing, or was trained on weights of an earlier stage that have since been replaced.
        """
        space = Workspace(Path(root))
        runs = {name: space.predecessor(name) for name in ("aekl", "pretrain", "repr")}
        _check_stages(runs)
        first, second, third = runs.values()
        encoder = third.config.model.encoder
        estimator = estimator_node(second.config.model.unet, encoder.dim, third.config.model.estimator)
        configs = {
            "autoencoder": (first, first.config.model.autoencoder),
            "encoder": (third, encoder),
            "unet": (second, second.config.model.unet),
            "estimator": (third, estimator),
        }
        networks = {
            name: StoredNetwork(to_container(node), run.weights_file(name), run.sha256(name))
            for name, (run, node) in configs.items()
        } | _read_prior(space, third)
        probes, directions, forecast = (space.evaluation / name for name in (PROBES, DIRECTIONS, FORECAST))
        return cls(
            networks=networks,
            scale=[float(value) for value in second.metadata["scale"]],
            transform=to_container(first.config.data.transform),
            schedule=to_container(second.config.diffusion.schedule),
            parameterisation=to_container(second.config.diffusion.parameterisation),
            sampler=to_container(third.config.sampler),
            probes=probes if probes.is_file() else None,
            directions=directions if directions.is_file() else None,
            forecast=forecast if forecast.is_file() else None,
            **_read_measured(space, first),
            sources=describe_provenance(space, runs),
            view=_read_view(third),
        )

    @classmethod
    def open(cls, folder: Path | str, trust: Sequence[str] = ()) -> "Bundle":
        """Open a bundle's folder.

        Args:
            trust: prefixes of further modules whose classes its configs may name, e.g. ("mylab.networks.",).

        Raises:
            UserError: it is not a bundle, is of another format or damaged, or is refused (see ldae.bundle.allowlist).
        """
        folder = Path(folder)
        description = read_description(folder)
        files = check_bundle(folder, description, trust)
        for key in (*BUILT, *([VIEW] if description.get(VIEW) else [])):
            build_stored(description[key], f"{folder / DESCRIPTION}: {key}")
        networks = {
            name: StoredNetwork(entry["config"], files[name], entry["sha256"])
            for name, entry in description["modules"].items()
        }
        return cls(
            networks=networks,
            **{name: files.get(name) for name in OPTIONAL_FILES},
            **{attribute: description.get(key) for attribute, key in MEASURED.items()},
            **{key: description[key] for key in (*BUILT, "sources", "scale")},
            view=description.get(VIEW),
        )

    def save(self, folder: Path | str) -> Path:
        """Write the bundle and return its folder.

        Raises:
            UserError: a file of weights has changed since it was published.
        """
        folder = Path(folder)
        modules = {
            name: {"config": network.config, **_copy(network.file, folder / f"{name}.safetensors")}
            for name, network in self.networks.items()
        }
        for name, network in self.networks.items():
            if modules[name]["sha256"] != network.sha256:
                raise UserError(f"{network.file} has changed since it was published: train or export it again")
        description = {
            "format": FORMAT,
            "modules": modules,
            "probes": _copy(self.probes, folder / PROBES) if self.probes else None,
            "directions": _copy(self.directions, folder / DIRECTIONS) if self.directions else None,
            **{key: getattr(self, attribute) for attribute, key in MEASURED.items()},
            **{key: getattr(self, key) for key in (*BUILT, "sources", "scale")},
            **({VIEW: self.view} if self.view else {}),
            **({"forecast": _copy(self.forecast, folder / FORECAST)} if self.forecast else {}),
        }
        write_text(folder / CARD, render_model_card(description))
        write_json(folder / DESCRIPTION, description)
        return folder


def _check_stages(runs: dict[str, Run]) -> None:
    """Refuse stages that do not belong together."""
    first, second, third = runs.values()
    if second.metadata["autoencoder_sha256"] != first.sha256("autoencoder"):
        raise UserError(f"{second.path} learned the latents of another autoencoder than {first.path}: train it again")
    for stage, weights in third.metadata["stands_on"].items():
        if stage in runs and weights != runs[stage].metadata["weights"]:
            raise UserError(
                f"{third.path} was trained on other weights than {runs[stage].path} has now: train it again"
            )


def _read_prior(space: Workspace, third: Run) -> dict[str, StoredNetwork]:
    """The semantic prior of a run by its name; none if it was not trained, or on y of another encoder."""
    if not space.has("prior"):
        return {}
    run = space.predecessor("prior")
    if run.metadata["encoder_sha256"] != third.sha256("encoder"):
        log.warning("%s is left out: it was trained with another encoder than %s; train it again", run.path, third.path)
        return {}
    node = prior_node(run.config.model.prior, third.config.model.encoder.dim, run.metadata["columns"])
    return {"prior": StoredNetwork(node, run.weights_file("prior"), run.sha256("prior"))}


def _read_view(run: Run) -> dict[str, Any] | None:
    """Config of the view that a run of stage 3 was trained with; None if it is that of the volumes."""
    data = run.config.data
    node = data.get("view")
    if node is None or instantiate(node).is_volume(instantiate(data.transform)):
        return None
    return to_container(node)


def _read_measured(space: Workspace, autoencoder: Run) -> dict[str, Any]:
    """What encode_latents.py measured on the training scans, if it used this autoencoder."""
    path = space.latents / METADATA_FILE
    metadata = read_json(path) if path.is_file() else {}
    if metadata.get("autoencoder_sha256") != autoencoder.sha256("autoencoder"):
        return {}
    return {attribute: metadata.get(key) for attribute, key in MEASURED.items()}


def _copy(source: Path, target: Path) -> dict[str, str]:
    """Copy a file, unless it is there already; its entry in the description."""
    if source.resolve() != target.resolve():
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    return {"file": target.name, "sha256": file_sha256(target)}
