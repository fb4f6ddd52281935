"""Class paths and constructor arguments that have been renamed, so that runs and bundles made earlier still load.

A stored config names classes by `_target_`. `with_present_names` replaces the former names when such a config is read.
`present_name` and `ARGUMENTS` are also used in error messages, to tell users the present name of what their own YAML
files or command lines name.
"""

from typing import Any

# Former module: present module. A class keeps its name unless it is in CLASSES.
MODULES = {
    "ldae.evaluation.editing": "ldae.editing.editor",
    "ldae.evaluation.directions": "ldae.editing.directions",
    "ldae.evaluation.probes": "ldae.evaluation.probes.targets",
    "ldae.evaluation.probing": "ldae.evaluation.probes.evaluator",
    "ldae.evaluation.cross_validation": "ldae.evaluation.probes.cross_validation",
    "ldae.evaluation.gap": "ldae.evaluation.images.posterior_gap",
    "ldae.evaluation.reconstruction": "ldae.evaluation.images.reconstruction",
    "ldae.evaluation.generation": "ldae.evaluation.images.generation",
    "ldae.evaluation.variation": "ldae.evaluation.images.variation",
    "ldae.evaluation.semantics": "ldae.evaluation.images.semantics",
    "ldae.evaluation.attention": "ldae.evaluation.images.attention",
    "ldae.evaluation.manipulation": "ldae.evaluation.edits.manipulation",
    "ldae.evaluation.selection": "ldae.evaluation.edits.selection",
    "ldae.evaluation.interpolation": "ldae.evaluation.edits.interpolation",
    "ldae.preprocessing.people": "ldae.preprocessing.participants",
    "ldae.preprocessing.pipeline": "ldae.preprocessing.steps",
}
# Former class, in its present module: present class.
CLASSES: dict[str, str] = {
    "ldae.evaluation.images.posterior_gap.Gap": "ldae.evaluation.images.posterior_gap.PosteriorMeanGap",
    "ldae.evaluation.probes.cross_validation.Folds": "ldae.evaluation.probes.cross_validation.PooledFolds",
    "ldae.evaluation.probes.evaluator.External": "ldae.evaluation.probes.evaluator.ExternalCohort",
}
# Present class: former argument: present argument.
ARGUMENTS: dict[str, dict[str, str]] = {
    "ldae.models.autoencoder.AutoencoderKL": {"reference": "mean_latent_for", "tile": "inference_planes"},
    "ldae.models.semantic_encoder.SemanticEncoder": {"reference": "mean_volume_shape", "gated": "position_gate"},
    "ldae.models.slice_cnn.SliceCNN": {"looks": "num_poolings"},
    "ldae.models.voxel_prior.VoxelPrior": {"nodes": "grid_size"},
    "ldae.evaluation.images.reconstruction.Reconstruction": {"reference": "reference_sampler"},
}


def present_name(target: str) -> str:
    """The present path of the class `target`, `module.Class`; `target` itself if it was not renamed."""
    module, _, name = target.rpartition(".")
    moved = f"{MODULES.get(module, module)}.{name}"
    return CLASSES.get(moved, moved) if module else target


def with_present_names(value: Any) -> Any:
    """A copy of a stored config, nested dicts and lists, in which every class and argument has its present name.

    A former argument is left as it is if the config also has the present one.
    """
    if isinstance(value, list):
        return [with_present_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    target = value.get("_target_")
    if not isinstance(target, str):
        return {key: with_present_names(item) for key, item in value.items()}
    target = present_name(target)
    renamed = {old: new for old, new in ARGUMENTS.get(target, {}).items() if new not in value}
    renewed = {renamed.get(key, key): with_present_names(item) for key, item in value.items()}
    return {**renewed, "_target_": target}
