"""The model card of a bundle: training data, metrics, intended use and limitations."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldae.bundle.description import VIEW
from ldae.data.splits import read_split
from ldae.preprocessing.steps import PreprocessingSteps
from ldae.runs import Run, Workspace
from ldae.utils.metric_table import format_with_intervals, select_headline
from ldae.utils.results_record import read_metrics_of

CARD = "README.md"

INTENDED_USE = """\
Research on T1-weighted brain MRI: comparing scans by `y`, training probes on it, and showing what the model
associates with a label by editing scans along a direction. Scans must be preprocessed as the training scans were
(section Data). If the model has an out-of-distribution check, scans that fail it are preprocessed first, and refused if
they still fail.
"""

LIMITATIONS = """\
- This is not a medical device. Its output must not be used to make decisions about a person.
- An edit shows what the model has learned to associate with a label in its cohort, not what disease or time would do to
  this brain. Age, sex, head size and scanner are correlated with labels and may be visible in edits.
- Probes are valid for people like those that they were fitted on, and are not calibrated for others.
- Lesions, tumours, effects of surgery and children are out of distribution unless the cohort contained them; decoding
  may remove or invent such findings.
- Details finer than the voxel size above are not represented. If an edit is added to the original scan, all finer
  details come from the original.
"""
WITHOUT_OOD_CHECK = "- This model has no out-of-distribution check: scans unlike its training scans are not refused.\n"


def describe_provenance(space: Workspace, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Provenance of a run's model, as JSON values: cohort, split, steps and metrics. It has names but no paths.

    The metrics are those that were computed with the present weights of the runs.
    """
    config = runs["aekl"].config
    weights = {name: entry["sha256"] for run in runs.values() for name, entry in run.metadata["weights"].items()}
    metrics, evaluated = read_metrics_of(space.evaluation, weights)
    return {
        "run": space.root.name,
        "split_hash": runs["repr"].metadata["split_hash"],
        "data": {
            "table": str(config.data.table).replace("\\", "/").rsplit("/", 1)[-1],
            "phantoms": config.data.phantom is not None,
            "subjects": _count_subjects(space),
            "diagnoses": None if config.data.diagnoses is None else list(config.data.diagnoses),
            "shape": list(config.data.shape),
            "spacing_mm": config.data.spacing,
        },
        "steps": {name: run.metadata.get("step") for name, run in runs.items()},
        "metrics": metrics,
        "evaluated": {name: source.description for name, source in evaluated.items()},
    }


def _count_subjects(space: Workspace) -> dict[str, int]:
    """Number of subjects in each split."""
    if not space.split_file.is_file():
        return {}
    return dict(sorted(Counter(read_split(space.split_file).values()).items()))


def render_model_card(description: Mapping[str, Any]) -> str:
    """The model card in Markdown, from the content of bundle.json."""
    sources = description["sources"]
    name = sources.get("run", "imported checkpoints")
    sections = [
        f"# LDAE: {name}",
        "A Latent Diffusion Autoencoder of 3D brain MRI ([arXiv 2504.08635](https://arxiv.org/abs/2504.08635)): a scan "
        "becomes a vector `y`, learned without labels, and can be decoded, varied, interpolated and edited.",
        "```python\nfrom ldae import LDAE\n\nmodel = LDAE.load('this/folder')\ny = model.embed('scan.nii.gz')\n```",
        "## Data\n\n" + _render_data(description),
        "## Metrics\n\n" + _render_metrics(sources.get("metrics") or {}, sources.get("evaluated") or {}),
        "## Intended use\n\n" + INTENDED_USE,
        "## Limits\n\n" + LIMITATIONS + ("" if description["likeness"] else WITHOUT_OOD_CHECK),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _render_data(description: Mapping[str, Any]) -> str:
    sources, transform = description["sources"], description["transform"]
    data = sources.get("data")
    size = " x ".join(str(value) for value in transform["shape"])
    spacing = transform.get("spacing")
    voxels = f"voxels of {spacing} mm" if spacing else "voxels of the scan's own size"
    lines = [f"model space: {size} {voxels}, {transform.get('orientation', 'RAS')}"]
    if view := description.get(VIEW):
        grid = " x ".join(str(value) for value in view["shape"])
        maps = f"{view['channels']} maps of tissue" if view["channels"] > 1 else "the scan"
        lines.append(f"the semantic encoder sees {maps} of {grid} voxels of {view['spacing']} mm")
    if data:
        cohort = "synthetic brain phantoms, no person's scan" if data["phantoms"] else f"the scans of {data['table']}"
        counts = ", ".join(f"{count} {split}" for split, count in data["subjects"].items())
        lines += [f"cohort: {cohort}", f"subjects: {counts or 'unknown'} (split by subject)"]
        if data["diagnoses"]:
            lines.append(f"diagnoses: {', '.join(data['diagnoses'])}")
        if description.get("preprocess"):
            steps = PreprocessingSteps.from_parameters(description["preprocess"], files=True).summary
            lines.append(f"preprocessed by `ldae preprocess`: {steps}; raw scans go through the same steps")
    else:
        lines += [f"{role}: {value}" for role, value in sources.items()]
    if prior := description["modules"].get("prior"):
        columns = ", ".join(column["name"] for column in prior["config"]["columns"]) or "no column"
        kind = "diffusion model" if prior["config"].get("hidden") else "Gaussian"
        lines.append(f"synthetic scans: `y` is drawn from a {kind} of the training subjects' y, given {columns}")
    if sources.get("steps"):
        lines.append("training steps: " + ", ".join(f"{stage} {step}" for stage, step in sources["steps"].items()))
    return "\n".join(f"- {line}" for line in lines)


def _render_metrics(metrics: Mapping[str, float], evaluated: Mapping[str, str]) -> str:
    if not metrics:
        return (
            "No metrics were computed with these weights before the export: run `python evaluate.py` and export again."
        )
    rows = "\n".join(f"| {name} | {value} |" for name, value in format_with_intervals(select_headline(metrics)))
    sources = "\n".join(f"- {name}: {text}" for name, text in evaluated.items())
    text = (
        "In brackets: 95 % intervals over subjects. `external/` are metrics of other cohorts, `cv/transductive/` those "
        "of scans that the encoder saw without labels; all others are of held-out test subjects."
    )
    return "\n\n".join(part for part in (text, f"| name | value |\n|---|---|\n{rows}", sources) if part)
