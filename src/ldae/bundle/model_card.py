"""The model card of a bundle: what the model was made of and measured to be, what it is for, and where it ends."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldae.runs import Run, Workspace
from ldae.utils.files import read_json
from ldae.utils.metric_table import format_with_intervals, select_headline

CARD = "README.md"

INTENDED = """\
Research on T1-weighted brain MRI: comparing scans by `y`, training probes on it, and showing what the model
associates with a label by editing scans along a direction. Scans must be made as the training scans were (section
Data). Where the model knows what these look like, raw scans are made alike first, and what cannot be is refused.
"""

LIMITS = """\
- Not a medical device. Nothing that it says about a person may inform a decision about that person.
- An edit shows what the model learned to associate with a label in its cohort, not what disease or time would do to
  this brain. Age, sex, head size and scanner go along with labels and may show up in edits.
- Probes speak for people like those that they were fitted on, and are not calibrated elsewhere.
- Lesions, tumours, surgery and children were not seen unless the cohort held them; decoding may remove or invent such
  findings.
- Detail finer than the voxel size below is not represented. Where an edit is added to the original scan, all finer
  detail is the original's own.
"""


def describe_provenance(space: Workspace, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Where a run's model came from, as JSON values: cohort, split, steps, numbers. No path is kept, only names."""
    config = runs["aekl"].config
    metrics = space.evaluation / "metrics.json"
    return {
        "run": space.root.name,
        "split_hash": runs["repr"].metadata["split_hash"],
        "data": {
            "table": str(config.data.table).replace("\\", "/").rsplit("/", 1)[-1],
            "phantoms": config.data.phantom is not None,
            "subjects": _subjects(space),
            "diagnoses": None if config.data.diagnoses is None else list(config.data.diagnoses),
            "shape": list(config.data.shape),
            "spacing_mm": config.data.spacing,
        },
        "steps": {name: run.metadata.get("step") for name, run in runs.items()},
        "metrics": read_json(metrics) if metrics.is_file() else {},
    }


def _subjects(space: Workspace) -> dict[str, int]:
    from ldae.data.splits import read_split

    if not space.split_file.is_file():
        return {}
    return dict(sorted(Counter(read_split(space.split_file).values()).items()))


def render_model_card(about: Mapping[str, Any]) -> str:
    """Markdown from what bundle.json holds."""
    sources = about["sources"]
    name = sources.get("run", "imported checkpoints")
    parts = [
        f"# LDAE: {name}",
        "A Latent Diffusion Autoencoder of 3D brain MRI ([arXiv 2504.08635](https://arxiv.org/abs/2504.08635)): a scan "
        "becomes a vector `y`, learned without labels, and can be decoded, varied, interpolated and edited.",
        "```python\nfrom ldae import LDAE\n\nmodel = LDAE.load('this/folder')\ny = model.embed('scan.nii.gz')\n```",
        "## Data\n\n" + _data(about),
        "## Metrics\n\n" + _metrics(sources.get("metrics") or {}),
        "## Intended use\n\n" + INTENDED,
        "## Limits\n\n" + LIMITS + ("" if about["likeness"] else _UNCHECKED),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


_UNCHECKED = "- This model does not know what its training scans look like: unlike scans are not refused.\n"


def _data(about: Mapping[str, Any]) -> str:
    sources, transform = about["sources"], about["transform"]
    data = sources.get("data")
    size = " x ".join(str(value) for value in transform["shape"])
    spacing = transform.get("spacing")
    voxels = f"voxels of {spacing} mm" if spacing else "voxels of the scan's own size"
    lines = [f"- model space: {size} {voxels}, {transform.get('orientation', 'RAS')}"]
    if data:
        kind = "synthetic brain phantoms, no person's scan" if data["phantoms"] else f"the scans of {data['table']}"
        counts = ", ".join(f"{count} {split}" for split, count in data["subjects"].items())
        lines += [f"- cohort: {kind}", f"- subjects: {counts or 'unknown'} (split by subject)"]
        lines += [f"- diagnoses: {', '.join(data['diagnoses'])}"] if data["diagnoses"] else []
        lines += [f"- made by `ldae preprocess`: {_steps(about)}; raw scans go through the same"] * bool(_steps(about))
    else:
        lines += [f"- {role}: {value}" for role, value in sources.items()]
    if sources.get("steps"):
        lines.append("- training steps: " + ", ".join(f"{stage} {step}" for stage, step in sources["steps"].items()))
    return "\n".join(lines)


def _steps(about: Mapping[str, Any]) -> str:
    """How the training scans were preprocessed, "" where nobody knows."""
    from ldae.preprocessing.steps import PreprocessingSteps

    return (
        PreprocessingSteps.from_parameters(about["preprocess"], files=True).summary if about.get("preprocess") else ""
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "None were measured before the export: run `python evaluate.py` and export again."
    rows = "\n".join(f"| {name} | {value} |" for name, value in format_with_intervals(select_headline(metrics)))
    return (
        f"On held-out test subjects; in brackets 95 % intervals over subjects.\n\n| name | value |\n|---|---|\n{rows}"
    )
