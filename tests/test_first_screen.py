"""Tests what a reader of report.html sees first: headline numbers, one edit, what not to trust, and the command."""

import io
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ldae.evaluation.first_screen.cautions import Evidence, find_cautions
from ldae.evaluation.first_screen.counterfactual import find_counterfactual
from ldae.evaluation.first_screen.facts import TrainingFacts
from ldae.evaluation.first_screen.headlines import choose_headlines
from ldae.evaluation.first_screen.pictures import draw_pictures
from ldae.evaluation.first_screen.screen import shorten_paths
from ldae.evaluation.html_report import write_report
from ldae.evaluation.metric_words import describe_metric
from ldae.runs import Workspace
from ldae.utils.entrypoint import describe_command
from ldae.utils.html_viewer import read_viewer, write_viewer
from ldae.utils.results_record import Results, Source

FACTS = TrainingFacts("scans.csv", False, {"train": 500, "val": 50, "test": 100}, (128, 160, 128), 1.5)


def interval(name, value, low, high):
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def beside(label, metric, ours, others, prefix=""):
    """Metrics of a probe and of baselines: others = {name: (value, difference, low, high)}."""
    metrics = {f"{prefix}probe/{label}/{metric}": ours, f"{prefix}probe/{label}/subjects": 100.0}
    for name, (value, *difference) in others.items():
        stem = f"{prefix}baseline/{name}/{label}/{metric}"
        metrics |= {stem: value} | interval(f"{stem}_difference", *difference)
    return metrics


AUC = beside("diagnosis", "auc", 0.9, {
    "pca_images": (0.91, -0.01, -0.03, 0.01), "volumes": (0.94, -0.04, -0.06, -0.02), "age_sex": (0.7, 0.2, 0.1, 0.3),
    "pca_view_and_y": (0.99, -0.09, -0.1, -0.08), "mean": (0.5, 0.4, 0.3, 0.5),
})  # fmt: skip
MAE = beside("age", "mae", 5.0, {"pca_images": (5.5, 0.5, 0.1, 0.9), "volumes": (6.0, 1.0, 0.5, 1.5)})
EDITS = {
    "manipulation/diagnosis/scans": 40.0, "manipulation/diagnosis/ventricle_moves": 1.0,
    "manipulation/diagnosis/hippocampus_moves": 0.0, "manipulation/diagnosis/hippocampus_slope_ratio": 0.1,
    "manipulation/diagnosis/ventricle_slope_ratio": 0.4, "manipulation/diagnosis/outside_share": 0.6,
    "manipulation/diagnosis/outside_share_true": 0.4, "manipulation/diagnosis/independent_right_low": 0.4,
}  # fmt: skip
RULES = {
    "synthetic": ({}, {}, "The training scans are synthetic"),
    "unused y": ({"semantics/z0_error_ratio_low": 1.05}, {"semantics/z0_error_ratio_low": 1.2}, "hardly uses y"),
    "worse": (AUC, MAE, "y is worse than region volumes"),
    "within": (AUC, MAE, "not shown to be better than PCA of scans."),
    "few tested": ({**MAE, "probe/age/subjects": 49.0}, MAE, "Few people, on test subjects (age 49)"),
    "seen": (beside("age", "mae", 5.0, {}, "cv/transductive/"), MAE, "called transductive"),
    "unlike": (
        {"external/ood/failed": 3.0, "external/ood/scans": 20.0},
        {"external/ood/failed": 1.0, "external/ood/scans": 20.0}, "15% of the scans of external",
    ),
    "blur": (
        {"reconstruction/autoencoder/ssim_mask": 0.89}, {"reconstruction/autoencoder/ssim_mask": 0.91}, "blurs",
    ),
    "still": (EDITS, {"manipulation/diagnosis/hippocampus_moves": 1.0}, "do not move the hippocampi as they should"),
    "size": (EDITS, {"manipulation/diagnosis/ventricle_slope_ratio": 0.8}, "the ventricles 0.40 times"),
    "outside": (
        EDITS, {**EDITS, "manipulation/diagnosis/outside_share": 0.45}, "60% of what edits along diagnosis change",
    ),
    "independent": (EDITS, {"manipulation/diagnosis/independent_right_low": 0.6}, "not read as edited"),
    "few edited": ({"manipulation/age/scans": 6.0}, EDITS, "measured on 6 scans only"),
    "interpolation": (
        interval("interpolation/gain/real/ssim_mask_over_nearest", -0.1, -0.2, -0.05),
        interval("interpolation/gain/real/ssim_mask_over_nearest", 0.1, 0.05, 0.2), "worse than by the nearest visit",
    ),
    "one person": ({"interpolation/subjects": 1.0}, {"interpolation/subjects": 5.0}, "predicted for 1 person only"),
    "missing": (MAE, {**MAE, **EDITS, "semantics/scans": 1.0}, "Not measured: whether the decoder uses y and edits"),
    "one seed": (MAE, {**MAE, "seeds/runs": 3.0}, "One training run"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_speaks_when_it_should_and_only_then(rule):
    metrics, harmless, said = RULES[rule]
    facts = TrainingFacts("scans.csv", rule == "synthetic", FACTS.people, FACTS.shape, FACTS.spacing_mm)
    assert any(said in sentence for sentence in find_cautions(Evidence(metrics, facts)))
    assert not any(said in sentence for sentence in find_cautions(Evidence(harmless, FACTS)))


def test_few_people_and_large_voxels_are_said():
    small = TrainingFacts("scans.csv", False, {"train": 137}, (32, 40, 32), 4.75)
    said = " ".join(find_cautions(Evidence({}, small)))
    assert "Trained on 137 people only" in said
    assert "Voxels of 4.75 mm" in said
    assert not any("people only" in one or "Voxels" in one for one in find_cautions(Evidence({}, FACTS)))


def test_edits_of_a_cohort_without_test_subjects_are_called_not_held_out():
    for people, expected in (({"train": 500, "val": 12}, True), (FACTS.people, False)):
        facts = TrainingFacts("scans.csv", False, people, FACTS.shape, FACTS.spacing_mm)
        assert any("No test subjects" in one for one in find_cautions(Evidence(EDITS, facts))) == expected


def test_a_structure_that_does_not_move_is_not_also_called_too_small():
    said = " ".join(find_cautions(Evidence(EDITS, FACTS)))
    assert "hippocampi 0.10 times" not in said


def test_headlines_compare_with_the_best_real_baseline_by_the_metrics_direction():
    diagnosis, age = choose_headlines({**AUC, **MAE})
    assert (diagnosis.other.label, diagnosis.other.value) == ("region volumes", 0.94)
    assert diagnosis.verdict == "y is worse by 0.04 [0.02, 0.06]"
    assert (age.other.label, age.verdict) == ("PCA of scans", "y is better by 0.5 [0.1, 0.9]")


def test_the_most_telling_way_of_testing_is_chosen():
    regimes = {prefix: beside("sex", "auc", value, {}, prefix) for prefix, value in (
        ("external/", 0.6), ("cv/transductive/", 0.7), ("cv/inductive/", 0.8), ("", 0.9),
    )}  # fmt: skip
    metrics = {name: value for found in regimes.values() for name, value in found.items()}
    for prefix, value in (("", 0.9), ("cv/inductive/", 0.8), ("cv/transductive/", 0.7), ("external/", 0.6)):
        (headline,) = choose_headlines(metrics)
        assert headline.ours.value == value
        metrics = {name: found for name, found in metrics.items() if name not in regimes[prefix]}
    assert "on another cohort (external)" in headline.title


def test_probes_of_generated_scans_are_no_probes_of_y():
    assert choose_headlines(beside("diagnosis", "auc", 0.9, {}, "generation/prior/")) == []


def test_there_are_at_most_six_headlines_and_none_of_one_person():
    many = {name: value for label in "abcdefgh" for name, value in beside(label, "mae", 1.0, {}).items()}
    assert len(choose_headlines(many)) == 6
    visits = {"interpolation/ldae/real/ssim_mask": 0.9, "interpolation/nearest/real/ssim_mask": 0.8}
    (headline,) = choose_headlines({**visits, "interpolation/subjects": 30.0})
    assert headline.other.label == "nearest visit"
    assert choose_headlines({**visits, "interpolation/subjects": 1.0}) == []


ALPHAS = (-1.0, 0.0, 1.0)


def write_edit(folder, title="s1 ses-M000: edited along diagnosis"):
    """An edit of a cube whose bright core grows with alpha, with the volumes of two scans."""
    frames = {}
    for alpha in ALPHAS:
        volume = np.full((12, 12, 12), 0.4, np.float32)
        volume[4:8, 4:8, 4:8] += 0.3 * alpha
        frames[f"alpha = {alpha:+.2f}"] = volume
    write_viewer(folder / "manipulation_diagnosis_1.html", title, frames, "alpha = +0.00", (2.0, 2.0, 2.0))
    rows = [
        {"subject": subject, "session": "ses-M000", "alpha": alpha, "ventricle_mm3": size * (1 + 0.2 * alpha)}
        for subject, size in (("s0", 99.0), ("s1", 30000.0)) for alpha in ALPHAS
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "manipulation_diagnosis.csv", index=False)
    scans = pd.DataFrame([{"subject": "s1", "session": "ses-M000", "true_ventricle": 4500.0}])
    scans.to_csv(folder / "manipulation_diagnosis_scans.csv", index=False)
    direction = {"alpha": {"length": 1.0, "meaning": "the distance"}, "calibration": {"classes": ["CN", "AD"]}}
    (folder / "directions.json").write_text(json.dumps({"directions": {"diagnosis": direction}}))
    return sorted(path.name for path in folder.iterdir())


def test_a_stored_viewer_is_read_as_it_was_written(tmp_path):
    frames = {name: np.random.default_rng(i).random((3, 4, 5)).astype(np.float32) for i, name in enumerate("ab<")}
    found = read_viewer(write_viewer(tmp_path / "x.html", "a & b", frames, "b", (1.0, 1.0, 1.0)))
    assert (found.title, found.reference, list(found.frames)) == ("a & b", "b", ["a", "b", "<"])
    for name, frame in frames.items():
        np.testing.assert_allclose(found.frames[name], frame, atol=0.5 / 255 + 1e-6)
    (tmp_path / "other.html").write_text("<p>another page</p>")
    assert read_viewer(tmp_path / "other.html") is None


def test_the_edit_has_the_volumes_of_its_own_scan(tmp_path):
    files = write_edit(tmp_path)
    edit = find_counterfactual(tmp_path, files, {"manipulation/diagnosis/factor_per_alpha_expected": 2.0})
    assert (edit.scan, edit.towards, edit.meaning, list(edit.alphas)) == (
        "s1 ses-M000", ("CN", "AD"), "the distance", list(ALPHAS),
    )  # fmt: skip
    (ventricles,) = edit.structures
    assert ventricles.volumes == [24000.0, 30000.0, 36000.0]
    assert ventricles.changes(edit.unedited) == pytest.approx([-20, 0, 20])
    assert ventricles.true_changes == pytest.approx([-30, 0, 30])
    assert find_counterfactual(tmp_path, [], {}) is None
    files.remove("manipulation_diagnosis.csv")
    assert find_counterfactual(tmp_path, files, {}).structures == []


def test_pictures_show_the_change_in_colour():
    volume = np.full((8, 8, 8), 0.5, np.float32)
    brighter = volume.copy()
    brighter[3:5, 3:5, 3:5] += 0.2
    pictures, limit = draw_pictures([volume, brighter, 2 * volume - brighter], 0)
    images = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).astype(int) for one in pictures]
    assert limit == pytest.approx(20, abs=0.1)
    assert len({image.shape for image in images}) == 1
    excess = [image[..., 0] - image[..., 2] for image in images]  # red over blue
    assert np.abs(excess[0]).max() <= 2
    assert excess[1].max() > 100
    assert excess[2].min() < -100
    assert np.abs(excess[1][: len(excess[1]) // 2 - 8]).max() <= 8, "the scan itself is grey"


def test_the_first_screen_is_whole_and_works_offline(tmp_path):
    write_edit(tmp_path)
    command = "python evaluate.py name=mine data.table=/home/me/secret/scans.csv"
    record = {"manipulation": Results(Source(), [], sorted(p.name for p in tmp_path.iterdir()), [], command)}
    metrics = {**AUC, **MAE, **EDITS}
    text = write_report(tmp_path, "mine: evaluation", metrics, record, FACTS).read_text()
    assert text.index("What not to trust") < text.index("<nav>")
    first = text[: text.index("<nav>")]
    for said in (
        "Trained without labels on 500 people", "voxels of 1.5 mm (128 × 160 × 128)", "100 for tests",
        "+20.0 %", "36.0", "Move from CN to AD", "python evaluate.py name=mine data.table=…/scans.csv",
    ):  # fmt: skip
        assert said in first
    assert "secret" not in text
    assert not re.search(r"https?:|@import|url\(|<link", text)
    frames = re.findall(r'<img class="frame" alt="([^"]+)" src="data:image/png[^>]+?"( hidden)?>', first)
    assert [alt.split(":")[0] for alt, _ in frames] == [
        "alpha −1, towards CN",
        "alpha 0, unedited",
        "alpha +1, towards AD",
    ]
    assert [bool(hidden) for _, hidden in frames] == [True, True, False]
    assert '<label for="edit-alpha">' in first
    assert re.search(r'<input id="edit-alpha" type="range" min="0" max="2" step="1" value="2"', first)
    assert first.count('role="img" aria-label="') == 4
    assert text.count("<script>") == 1


@pytest.mark.parametrize("metrics", [{}, {"gap/filled_share": 0.5}, beside("age", "mae", 7.0, {}, "external/")])
def test_a_run_without_edits_or_probes_has_a_first_screen(tmp_path, metrics):
    text = write_report(tmp_path, "x", metrics).read_text()
    first = text[: text.index("<nav>")]
    assert "<script" not in text
    assert "edit-alpha" not in first
    assert "Not measured" in first
    assert ("No headline number was measured" in first) == (not any("probe" in name for name in metrics))


def test_the_facts_of_a_run_are_those_it_was_trained_with(run):
    facts = TrainingFacts.of(Workspace(run))
    assert (facts.is_synthetic, facts.shape, facts.spacing_mm) == (True, (8, 8, 8), 9.0)
    assert "synthetic subjects (phantoms), in voxels of 9 mm (8 × 8 × 8)" in facts.sentences()[0]


def test_metrics_are_explained_in_words():
    terms = {"probe": "from y", "auc": "area under the curve", "<metric>_difference": "y minus baseline"}
    assert describe_metric("probe/diagnosis/auc", terms) == "from y; diagnosis; area under the curve"
    assert describe_metric("baseline/x_y/auc_difference", terms) == (
        "baseline; x y; area under the curve: y minus baseline"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/a/b/evaluate.py", "name=x", "evaluation=[probes]"], "python evaluate.py name=x 'evaluation=[probes]'"),
        (["/a/.venv/bin/ldae", "cohort", "my scans"], "ldae cohort 'my scans'"),
        (["/usr/bin/pytest", "-q"], ""),
    ],
)
def test_the_command_is_that_of_a_script_or_of_the_console_tool(monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", arguments)
    assert describe_command() == expected


def test_folders_of_absolute_paths_are_left_out():
    assert (
        shorten_paths("x data.table=/a/b/c.csv runs/a/b ~/q/r '/a b/c'")
        == "x data.table=…/c.csv runs/a/b ~/q/r '/a b/c'"
    )
