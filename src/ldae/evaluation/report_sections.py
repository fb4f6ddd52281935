"""What each section of report.html is about: its question, its figures, and its metrics in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        title, text: heading, and the question that the section answers.
        groups: what the names of its metrics begin with.
        prefixes, suffixes: what the names of its figures begin or end with.
        terms: parts of its metrics' names, with their meaning. In a part, <...> stands for any name.
    """

    title: str
    text: str
    groups: Sequence[str]
    prefixes: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    terms: Mapping[str, str] = field(default_factory=dict)

    def has_metric(self, name: str) -> bool:
        """Whether a metric belongs to this section."""
        return any(name.startswith(f"{group}/") for group in self.groups)

    def terms_in(self, names: Sequence[str]) -> dict[str, str]:
        """The terms that occur in these names of metrics."""
        return {term: text for term, text in self.terms.items() if any(_occurs(term, name) for name in names)}


def _occurs(term: str, name: str) -> bool:
    pattern = "".join("*" if index % 2 else part for index, part in enumerate(term.replace("<", ">").split(">")))
    return fnmatchcase(f"/{name}/", f"*/{pattern}/*")


PREDICTION = {
    "probe": "predictions from y by a linear probe",
    "baseline": "the same protocol with other features",
    "mean": "no features: always the mean, or the majority class",
    "age_sex": "age and sex",
    "pca_view": "principal components of what the encoder sees of a scan (data.view)",
    "pca_images": "principal components of the scans at 4 mm",
    "images": "principal components of the scans at 4 mm",
    "pca": "principal components of the autoencoder's latents",
    "pca_view_and_y": "principal components of what the encoder sees, and y beside them",
    "components": "the part of y that is principal components, without the learned residual",
    "residual": "the learned residual of y alone",
    "untrained": "y of the same encoder before training, mean over draws of its initial weights",
    "volumes": "volumes of brain regions, relative to the head where its volume is known",
    "volumes_head": "volumes of brain regions and the size of the head",
    "auc": "area under the ROC curve (0.5 = chance, 1 = perfect)",
    "auc_age_adjusted": "the same among pairs of scans of about the same age",
    "pr_auc": "area under the precision-recall curve",
    "accuracy": "share of scans classified correctly at a threshold of 0.5",
    "balanced_accuracy": "mean of sensitivity and specificity",
    "sensitivity": "share of the positive class that is found",
    "specificity": "share of the negative class that is found",
    "f1": "harmonic mean of sensitivity and precision",
    "mcc": "Matthews correlation coefficient (0 = chance, 1 = perfect)",
    "brier": "mean squared error of the predicted probability (lower is better)",
    "calibration_error": "difference between predicted and observed frequency (lower is better)",
    "tp": "true positives, scans; likewise tn, fp and fn",
    "mae": "mean absolute error, in the unit of the label (years for age)",
    "rmse": "root mean squared error, in the same unit",
    "r2": "share of the label's variance that is explained",
    "pearson": "Pearson's correlation of predicted and true values",
    "unbiased_mae": "mean absolute error once the regression to the mean is corrected",
    "gap_pearson": "correlation of the error (predicted minus true) with the true value",
    "unbiased_gap_pearson": "the same once the regression to the mean is corrected",
    "mae_share_to_volumes": "position of the error of y between always-the-mean (0) and region volumes (1)",
    "<metric>_spread": "standard deviation over the draws of the initial weights",
    "ood": "the out-of-distribution check: how many scans were checked and how many failed it",
    "<metric>_difference": "embedding minus baseline on the same resamples; positive = the embedding is better",
    "<metric>_gain": "components and y together minus the components alone; positive = y tells more than they do",
    "repeats": "how often the folds were drawn anew",
}
IMAGES = {
    "ssim": "structural similarity over the whole volume (1 = identical); background raises it",
    "ssim_mask": "structural similarity inside the brain",
    "ssim_published": "structural similarity with the window of the LDAE paper",
    "ms_ssim": "multi-scale structural similarity",
    "psnr": "peak signal-to-noise ratio, dB; psnr_mask inside the brain",
    "mse": "mean squared error; mse_mask inside the brain",
    "lpips": "perceptual distance (lower is better)",
}

SECTIONS = (
    Section(
        "Another cohort",
        "How well do the frozen encoder, probes and baselines do on another cohort? Nothing was fitted on these scans.",
        ("external",),
        ("external_",),
        terms=PREDICTION,
    ),
    Section(
        "What the embedding predicts",
        "Which labels can be read from y? Linear probes on held-out test subjects, compared with baselines.",
        ("probe", "baseline"),
        suffixes=("_roc", "_confusion", "_scatter"),
        terms=PREDICTION,
    ),
    Section(
        "Cross-validation, inductive",
        "Probes and baselines in folds of scans that the encoder did not see during training.",
        ("cv/inductive",),
        ("cv_inductive",),
        terms=PREDICTION,
    ),
    Section(
        "Cross-validation, transductive",
        "Probes and baselines in folds of scans that the encoder saw, without labels, during training.",
        ("cv/transductive",),
        ("cv_transductive",),
        terms=PREDICTION,
    ),
    Section(
        "Several seeds",
        "What do runs with different seeds say together? The mean over the runs, with its interval over subjects.",
        ("seeds",),
        terms={
            **PREDICTION,
            "runs": "number of runs",
            "<metric>_lowest": "of the run with the lowest value",
            "<metric>_highest": "of the run with the highest value",
        },
    ),
    Section(
        "Does the decoder use the embedding?",
        "A probe cannot tell: y may predict a diagnosis although the decoder ignores it. Here the same noisy latents "
        "are denoised with the scan's own y, with another subject's y and without y, and scans are decoded from y "
        "alone.",
        ("semantics", "gap"),
        ("semantics", "gap"),
        terms={
            "z0_error": "mean squared error of the denoised latent, in units of the latent's variance",
            "own": "with the scan's own y, at t >= 0.8 T",
            "other": "with another subject's y, at t >= 0.8 T",
            "none": "without y, at t >= 0.8 T",
            "<y>_t<start>": "the same in the band of timesteps t that begins there (of 1000)",
            "z0_error_ratio": "error with another subject's y over that with the own y (1 = y is ignored)",
            "z0_error_ratio_none": "error without y over that with the own y",
            **IMAGES,
            "<metric>_autoencoder": "against the autoencoder's reconstruction instead of the scan",
            "<structure>_r": "correlation of a structure's volume in the decoded with that in the true scan",
            "<structure>_r_control": "the same with another subject's decoded scan, expected near 0",
            "gap": "root mean squared error of the denoising step's mean (posterior-mean gap)",
            "unfilled": "without y",
            "filled": "with y",
            "filled_share": "share of the squared gap that y removes",
        },
    ),
    Section(
        "Attention of the encoder",
        "From which slices was y computed? Attention shows which slices contribute to y, not what in them matters.",
        ("attention",),
        ("attention",),
        terms={
            "entropy_share": "entropy of the attention weights over that of equal weights (1 = equal weights)",
            "peak_mm": "position of the slice with the largest weight, mm from the middle of the volume",
            "own_share": "share of the weights' deviation from equal weights that differs between scans",
        },
    ),
    Section(
        "Reconstruction",
        "How well are test scans restored, by sampler and number of steps? The autoencoder's own reconstruction is the "
        "best possible.",
        ("reconstruction",),
        ("reconstruction",),
        terms={
            "autoencoder": "autoencoder alone, without diffusion",
            "encoded": "decoded from the scan's own code z_T and y",
            "semantic": "decoded from random noise and y",
            "code": "the code z_T compared with standard normal noise",
            **IMAGES,
            "ssim_drop": "structural similarity below the autoencoder's",
            "latent_error": "root mean squared error of the latent, in units of its standard deviation",
            "error": "root mean squared difference from a sampler of many steps, in the same unit",
            "evaluations": "evaluations of the network per scan",
            "seconds": "seconds per scan",
            "kurtosis": "excess kurtosis of the code (0 for noise)",
            "norm_ratio": "mean squared length of the code over its expectation (1 for noise)",
            "norm_ks": "Kolmogorov-Smirnov distance of the squared lengths from their distribution for noise",
        },
    ),
    Section(
        "Variation",
        "What does y leave open? Each scan's y is decoded with different random codes.",
        ("variation",),
        ("variation",),
        terms={
            "std_mask": "standard deviation of a voxel between variants, inside the brain (intensity range = 1)",
            "std_ratio": "the same over the deviation between different scans (1 = y determines nothing)",
            "<probe>_r": "correlation of the probe's output for a scan with the mean output for its variants",
            "<probe>_within": "share of the variance of the probe's output that is within scans",
            "<probe>_agreement": "share of variants that the probe classifies as it does the scan",
            "<structure>_cv": "coefficient of variation of a structure's volume between variants",
        },
    ),
    Section(
        "Manipulation",
        "Does an edit along a label's direction change a scan as the label changes a brain? alpha is the length of the "
        "edit: 1 is the mean distance between the two classes in the training scans, or one standard deviation of a "
        "number, unless the figure says otherwise; alpha > 0 goes towards the positive class or larger number. "
        "Difference maps: red = brighter, blue = darker, as a fraction of the intensity range. An edit shows what the "
        "model associates with the label, not what would happen to a person.",
        ("manipulation",),
        ("manipulation",),
        terms={
            "<structure>_spearman_share": "share of scans whose volume follows alpha (Spearman >= 0.9, right sign)",
            "<structure>_spearman_median": "median Spearman correlation of volume and alpha",
            "<structure>_slope": "change of the volume per unit of alpha, mm3",
            "<structure>_slope_percent": "the same as a percentage of the volume",
            "<structure>_slope_per_10_years": "the same for ten years along the direction of age, mm3",
            "<structure>_slope_cohort": "slope of the training scans' own volumes on the label, per unit of alpha, mm3",
            "<structure>_slope_true": "the same of the true counterfactuals (synthetic cohort)",
            "<structure>_slope_seen": "what the measurement of the edits sees of the true counterfactuals",
            "<structure>_slope_ratio": "slope of the edits over that of the true counterfactuals (1 = right)",
            "<structure>_right": "share of scans whose volume changes with the right sign",
            "<structure>_moves": "1: the direction moves the structure as it should; 0: it cannot move it",
            "identity_ssim_mask": "structural similarity of the edited with the unedited scan, inside the brain",
            "reversibility_ssim_mask": "the same once the edited scan is embedded anew and edited back",
            "outside_share": "share of the change that is outside ventricles and hippocampi",
            "outside_share_true": "the same for the true change (synthetic cohort)",
            "independent_slope": "change in the output of a probe fitted on other subjects, per unit of alpha",
            "independent_right": "share of scans for which that output rises with alpha",
            "difference_r": "correlation of the decoded with the true difference map (synthetic cohort)",
            "difference_r_ceiling": "the same for the true change as the autoencoder reconstructs it",
            "ventricle_error": "error of the change in ventricle volume, mm3 (synthetic cohort)",
            "ventricle_error_unedited": "the same if the scan is left unchanged",
            "ventricle_change_r": "correlation over scans of decoded and true change of the ventricles",
            "factor_per_alpha": "true change (severity, or years) that grows the ventricles as alpha = 1 does",
            "factor_per_alpha_expected": "true change (severity, or years) that alpha = 1 is by its unit",
        },
    ),
    Section(
        "Choice of direction and editor",
        "Which direction estimator and which editor settings change scans most like the true counterfactual, on "
        "validation subjects of a synthetic cohort?",
        ("selection",),
        ("selection",),
        terms={
            "best_<setting>": "of the best combination of estimator and settings",
            "best_monotone": "share of scans whose ventricles grow from -alpha to 0 and from 0 to alpha",
            "best_identity": "structural similarity with the unedited scan, inside the brain",
            "best_effect_percent": "change of the ventricle volume from -alpha to alpha, %",
            "best_depth": "share of the noise schedule over which the scan is inverted",
            "best_renoise": "share of the inversion that is replaced by noise",
            "best_strength": "strength of the guidance by y",
            "difference_r": "correlation of the decoded with the true difference map",
        },
    ),
    Section(
        "Interpolation through time",
        "Can the visit between two visits be predicted from them, by their position in time?",
        ("interpolation",),
        ("interpolation",),
        terms={
            "ldae": "y on a straight line, codes z_T on an arc, decoded",
            "latent": "latents of the autoencoder on a straight line",
            "voxel": "scans averaged voxel by voxel",
            "nearest": "the visit nearer in time",
            "real": "compared with the real visit",
            "autoencoded": "compared with the real visit as the autoencoder reconstructs it",
            "noise_free": "compared with the true anatomy without scanner noise (synthetic cohort)",
            "gain": "improvement over another method, paired; positive = LDAE is better",
            **IMAGES,
            "ventricle_error": "absolute error of the ventricle volume, mm3",
            "<metric>_gap<months>": "for visits that many months apart",
        },
    ),
    Section(
        "Generation",
        "How close are unconditional samples to real scans, and how different from each other?",
        ("generation",),
        ("generation",),
        terms={
            "own_encoder": "in the feature space of the model's own encoder, which was trained on this cohort",
            "fid": "Frechet distance between samples and test scans (lower is better)",
            "mmd": "maximum mean discrepancy between samples and test scans (lower is better)",
            "ms_ssim": "multi-scale structural similarity between samples (lower is more diverse)",
            "<metric>_real": "the same for real training scans against test scans, or between real scans",
        },
    ),
)
OTHER = Section("Further metrics", "", ())
