"""The files written for one scan: images, transforms, label map, sidecars, picture for quality control, record."""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ldae.data.nifti import BadScan
from ldae.preprocessing.bids_names import NATIVE_SPACE, BidsNames
from ldae.preprocessing.mosaic import write_mosaic
from ldae.preprocessing.regions import Regions
from ldae.preprocessing.registration import read_affine
from ldae.preprocessing.steps import PreprocessedScan, PreprocessingSteps, is_installed
from ldae.preprocessing.volume import Volume
from ldae.utils.files import read_json, replacing, write_json

PACKAGES = ("ldae", "antspyx", "deepbet", "nilearn", "nibabel", "numpy", "scipy")  # versions are kept in the sidecar

Record = dict[str, Any]  # status ("done" or "rejected"), reason, source, key, files, measures, regions, notes, reading


@dataclass(frozen=True)
class Outputs:
    """The files of one scan.

    Attributes:
        folder: output folder of the cohort.
        names: names of the files in it.
    """

    folder: Path
    names: BidsNames

    def read_record(self) -> Record | None:
        """The record of an earlier run, or None if there is none or it is damaged."""
        try:
            return read_json(self.folder / self.names.record)
        except (OSError, ValueError):
            return None

    def are_complete(self, record: Record) -> bool:
        """Whether all files of a record exist."""
        return all((self.folder / file).is_file() for file in record.get("files", {}).values())

    def write_record(self, record: Record) -> None:
        """Write the record, which marks the scan as finished."""
        write_json(self.folder / self.names.record, record)

    def remove(self) -> None:
        """Remove the files of an earlier run, the record first."""
        record = self.read_record()
        if record is None:
            return
        (self.folder / self.names.record).unlink(missing_ok=True)
        for file in record.get("files", {}).values():
            (self.folder / file).unlink(missing_ok=True)
            (self.folder / _sidecar(file)).unlink(missing_ok=True)

    def write_images(self, result: PreprocessedScan, template: np.ndarray | None) -> dict[str, Path]:
        """Write scan, masks and picture; `template` is the brain of the template on the scan's grid, or None."""
        names = self.names
        files = {"scan": names.scan, "figure": names.figure}
        result.scan.write(self.folder / names.scan)
        if result.mask is not None:
            result.scan.with_data(result.mask).write(self.folder / names.mask, "uint8")
            result.native.with_data(result.native_mask).write(self.folder / names.native_mask, "uint8")
            files |= {"mask": names.mask, "native_mask": names.native_mask}
        head = result.unmasked
        write_mosaic(self.folder / names.figure, head.data, head.affine, result.mask, template)
        return files

    def write_transforms(self, result: PreprocessedScan) -> dict[str, Path]:
        """Write `forward_0`, ... in ANTs' order and `inverse_0`, ...; an affine is one file for both directions."""
        written: dict[str, Path] = {}
        if result.transforms is None:
            return written
        for way, files in (("forward", result.transforms.forward), ("inverse", result.transforms.inverse)):
            for index, file in enumerate(files):
                is_affine = file.suffix == ".mat"
                target = self.names.transform(is_affine or way == "forward", "".join(file.suffixes))
                if target not in written.values():
                    with replacing(self.folder / target) as temporary:
                        shutil.copyfile(file, temporary)
                written[f"{way}_{index}"] = target
        return written

    def write_labels(
        self, labels: Path, regions: Regions | None, result: PreprocessedScan, orientation: str | None = None
    ) -> dict[str, float]:
        """Write the label map in the template's space, and return the volumes measured in its own space."""
        native = Volume.read_labels(labels, orientation)
        if result.transforms is None:
            raise BadScan("a label map needs a registration", labels)
        moved = result.transforms.labels_to_template(native, result.scan)
        moved.write(self.folder / self.names.labels, "uint16")
        return regions.volumes(native) if regions else {}

    def write_sidecars(self, steps: PreprocessingSteps, result: PreprocessedScan, record: Record) -> None:
        """Write the JSON files beside scan and masks."""
        files, parameters = record["files"], steps.parameters()
        sidecar = {
            "Sources": [record["source"]],
            "SkullStripped": result.mask is not None,
            "SpatialReference": steps.space or NATIVE_SPACE,
            "Resolution": " x ".join(f"{size:.4g}" for size in result.scan.spacing) + " mm",
            "Software": {name: version(name) for name in PACKAGES if is_installed(name)},
            "Parameters": parameters,
            "Measures": result.measures,
            "Notes": record["notes"],
            "Transforms": {name: path for name, path in files.items() if name.startswith(("forward", "inverse"))},
        }
        affines = [path for path in (result.transforms.forward if result.transforms else ()) if path.suffix == ".mat"]
        if affines:
            sidecar["TemplateToNative"] = read_affine(affines[0]).tolist()  # mm, RAS; without the warp of SyN
        write_json(self.folder / _sidecar(files["scan"]), sidecar)
        mask_sidecar = {"Type": "Brain", "Sources": sidecar["Sources"], "Parameters": parameters["brain"]}
        for name in ("mask", "native_mask"):
            if name in files:
                write_json(self.folder / _sidecar(files[name]), mask_sidecar)


def _sidecar(image: str) -> str:
    return image.replace(".nii.gz", ".json")
