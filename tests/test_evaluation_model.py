"""Tests the evaluations of images and the report on a model for which every result is known.

A scan is a bright cube with a dark ball at its centre, and y is the radius of the ball. The denoiser is perfect for the
y that it is given; without y it predicts the scan of the mean radius.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ldae.diffusion.samplers import DDIM, Exact, Multistep
from ldae.diffusion.schedule import linear
from ldae.evaluation import figures, run
from ldae.evaluation import html_report as page
from ldae.evaluation.context import Context
from ldae.evaluation.images import generation
from ldae.evaluation.images.attention import Attention
from ldae.evaluation.images.feature_distances import weighted_cubic_mmd
from ldae.evaluation.images.memorisation import measure_memorisation
from ldae.evaluation.images.posterior_gap import PosteriorMeanGap
from ldae.evaluation.images.random_features import RandomFeatures
from ldae.evaluation.images.reconstruction import Reconstruction
from ldae.evaluation.images.semantics import (
    Semantics,
    measure_z0_errors,
    measure_z0_errors_of_scan,
    pair_with_other_subjects,
)
from ldae.evaluation.probes.targets import Classification
from ldae.prior.columns import encode_table, find_columns
from ldae.prior.semantic_prior import SemanticPrior
from ldae.utils.metric_table import format_console_table

SIZE = 16


def ball(radius):
    """Smooth fraction of each voxel that the ball covers, (B, X, Y, Z)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 3, indexing="ij"))
    return torch.sigmoid(2 * (radius.view(-1, 1, 1, 1).float() - grid.norm(dim=0)))


def scan(radius):
    """Scans with balls of these radii (B,): (B, 1, X, Y, Z) in [0, 1]."""
    brain = torch.zeros(SIZE, SIZE, SIZE)
    brain[1:-1, 1:-1, 1:-1] = 1
    return (brain * (0.7 - 0.5 * ball(radius)))[:, None]


class Denoiser:
    """Predicts the eps of z_0 = latent(y), or without y of the z_0 of a radius of 3."""

    def __init__(self, uses_y=True):
        self.schedule, self.uses_y = linear(), uses_y

    def _eps(self, z_t, t, z0):
        alpha, sigma = (f(t).to(z_t).view(-1, 1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        return (z_t - alpha * z0) / sigma.clamp(min=1e-3)

    def eps(self, z_t, t):
        return self._eps(z_t, t, Model.latent(torch.tensor([3.0])))

    def guided_eps(self, y):
        y = y if self.uses_y else torch.full_like(y, 3.0)
        return lambda z_t, t: self._eps(z_t, t, Model.latent(y[:, 0]))


@dataclass
class Model:
    """The methods of LDAE that the evaluations use."""

    denoiser: Denoiser
    sampler: object
    prior: object = None
    device = torch.device("cpu")

    @staticmethod
    def latent(radius):
        return (scan(radius) - 0.5) / 0.25

    def compress(self, x):
        return (x - 0.5) / 0.25

    def decompress(self, z):
        return z * 0.25 + 0.5

    def embed(self, x):
        return x.flatten(1)[:, :5]

    def invert(self, z, y, sampler=None):
        return (sampler or self.sampler).invert(self.denoiser.guided_eps(y), z, self.denoiser.schedule)

    def generate(self, code, y, sampler=None):
        return (sampler or self.sampler).sample(self.denoiser.guided_eps(y), code, self.denoiser.schedule)

    def decode(self, code, y):
        return self.decompress(self.generate(code, y))


def context(out: Path, uses_y=True, subjects=40) -> Context:
    radius = torch.linspace(2, 5, subjects)[torch.randperm(subjects, generator=torch.Generator().manual_seed(0))]
    table = pd.DataFrame({
        "subject": [f"s{i:02d}" for i in range(subjects)], "session": "ses-M000",
        "split": ["train" if i < subjects // 2 else "test" for i in range(subjects)],
    })  # fmt: skip
    return Context(
        model=Model(Denoiser(uses_y), Multistep(steps=5)), table=table, volumes=lambda rows: scan(radius[rows]),
        posterior=None, embeddings=radius[:, None].numpy(), untrained=None, out=out, spacing=(2.0, 2.0, 2.0), seed=1,
        regions=lambda rows, labels: ball(radius[rows]).numpy() * (51 in labels),
    )  # fmt: skip


def test_the_gap_is_filled_by_y_alone(tmp_path):
    """A denoiser that is perfect given y fills the whole gap; one that ignores y fills none of it."""
    found = dict(PosteriorMeanGap(scans=8, points=5)(context(tmp_path)))
    assert found["gap/filled_share"] > 0.999
    assert found["gap/filled"] < 0.03 * found["gap/unfilled"]
    assert (tmp_path / "gap.png").exists()
    ignored = dict(PosteriorMeanGap(scans=8, points=5)(context(tmp_path, uses_y=False)))
    assert ignored["gap/filled_share"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_is_reported_at_its_position(tmp_path, axis):
    """All scans attend to slice 12 of 16, with slices of 2 mm; then to all slices equally."""
    weights = torch.full((SIZE,), 0.01)
    weights[12] = 1 - 0.15
    given = context(tmp_path, subjects=8)
    given.model = SimpleNamespace(
        encoder=SimpleNamespace(axis=axis), attention_of_views=lambda x: weights.expand(len(x), -1),
        view=None,
    )  # fmt: skip
    found = dict(Attention(resamples=20)(given))
    assert found["attention/peak_mm"] == found["attention/peak_mm_low"] == (12 - 7.5) * 2
    assert found["attention/own_share"] == pytest.approx(0, abs=1e-9)
    assert found["attention/entropy_share"] < 0.4
    assert pd.read_csv(tmp_path / "attention.csv").iloc[0, 2:].astype(float).idxmax() == "slice012"
    assert (tmp_path / "attention.png").exists()
    weights = torch.full((SIZE,), 1 / SIZE)
    assert dict(Attention(resamples=20)(given))["attention/entropy_share"] == pytest.approx(1)


def test_z0_errors_by_hand():
    """The own y leaves no error; another subject's y leaves the distance between the two latents."""
    z, other = Model.latent(torch.tensor([2.5, 4.0])), Model.latent(torch.tensor([4.0, 2.5]))
    y = torch.tensor([[2.5], [4.0]])
    table = measure_z0_errors(Denoiser(), z, y, y.flip(0), seed=0, keys=[1, 2])
    for band in ("t000", "t400", "t800"):
        assert float(table[f"own_{band}"].max()) < 1e-4
        torch.testing.assert_close(
            table[f"other_{band}"], (z - other).square().flatten(1).mean(1), rtol=1e-2, atol=1e-4
        )
    alone = measure_z0_errors_of_scan(Denoiser(), z[:1], y[:1], y[1:], seed=0, key=1)
    assert {(type(value), value.ndim) for value in alone.values()} == {(torch.Tensor, 0)}
    assert float(alone["z0_error/other_t800"]) == pytest.approx(float(table["other_t800"][0]), rel=1e-5)
    assert set(alone) == {
        f"z0_error/{k}_t{b}" for k in ("own", "other", "none") for b in ("000", "200", "400", "600", "800")
    }


def test_z0_errors_do_not_read_values_back():
    """The meta device has no values: reading one, or using a tensor of another device, raises."""
    denoiser = SimpleNamespace(
        schedule=linear(),
        eps=lambda z_t, t: 0.5 * z_t,
        guided_eps=lambda y: lambda z_t, t: z_t * y[:, :1, None, None, None],
    )
    z, y = torch.empty(1, 2, 4, 4, 4, device="meta"), torch.empty(1, 3, device="meta")
    found = measure_z0_errors_of_scan(denoiser, z, y, y, seed=0, key=1)
    assert len(found) == 15
    assert {(value.device.type, value.shape) for value in found.values()} == {("meta", ())}


def test_a_model_that_uses_y_is_told_from_one_that_does_not(tmp_path):
    metrics = dict(Semantics(resamples=100)(context(tmp_path)))
    assert metrics["semantics/z0_error_ratio"] > 10
    assert metrics["semantics/ssim_mask"] > 0.99
    assert metrics["semantics/ventricle_r"] > 0.99
    assert metrics["semantics/ventricle_r_low"] <= metrics["semantics/ventricle_r"]
    assert abs(metrics["semantics/ventricle_r_control"]) < 0.5
    ignored = dict(Semantics(resamples=100)(context(tmp_path, uses_y=False)))
    assert ignored["semantics/z0_error_ratio"] == pytest.approx(1, abs=1e-6)
    assert abs(ignored.get("semantics/ventricle_r", 0.0)) < 0.5
    assert ignored["semantics/ssim_mask"] < metrics["semantics/ssim_mask"]


def test_without_label_maps_the_rest_is_still_measured(tmp_path, caplog):
    cohort = context(tmp_path)
    cohort.regions = None
    metrics = dict(Semantics(scans=4, resamples=20)(cohort))
    assert metrics["semantics/scans"] == 4
    assert "semantics/ventricle_r" not in metrics
    assert "labels_path" in caplog.text


def test_partners_are_of_other_subjects_and_each_is_used_once():
    for subjects in (["a", "b"], ["a", "a", "b", "b", "c"], ["b", "a", "c", "a", "b", "c", "d"]):
        partner = pair_with_other_subjects(subjects)
        assert sorted(partner) == list(range(len(subjects)))
        assert all(subjects[i] != subjects[j] for i, j in enumerate(partner))
    assert pair_with_other_subjects(["a", "a", "a", "b"]) is None
    assert pair_with_other_subjects(["a"]) is None


def test_reconstruction_yields_its_metrics_and_files(tmp_path):
    samplers = {"ddim": DDIM(), "exact": Exact()}
    metrics = dict(Reconstruction(samplers, [5, 10], 4, DDIM(steps=50), 2, 8, 50)(context(tmp_path)))
    assert metrics["reconstruction/autoencoder/ssim_mask"] == pytest.approx(1, abs=1e-5)
    assert metrics["reconstruction/autoencoder/scans"] == 20
    for name in ("ddim_5", "ddim_10", "exact_5", "exact_10"):
        stem = f"reconstruction/{name}"
        assert metrics[f"{stem}/semantic/ssim_mask"] > 0.95
        assert metrics[f"{stem}/encoded/evaluations"] == 2 * metrics[f"{stem}/semantic/evaluations"]
        assert metrics[f"{stem}/encoded/seconds"] > 0
        for key in ("code/std", "code/kurtosis", "code/norm_ks", "code/error", "semantic/error", "encoded/ssim_drop"):
            assert np.isfinite(metrics[f"{stem}/{key}"])
    assert metrics["reconstruction/exact_5/encoded/latent_error"] < 1e-3
    table = pd.read_csv(tmp_path / "reconstruction.csv")
    assert len(table) == 1 + 3 * 4
    assert (tmp_path / "reconstruction.png").exists()
    assert (tmp_path / "reconstruction_scan.png").exists()


def test_generation_measures_distance_and_diversity(tmp_path):
    """All samples of this model are the mean scan, less diverse than real scans."""
    cohort = context(tmp_path)
    cohort.embeddings = cohort.volumes(np.arange(40)).flatten(1)[:, :5].numpy()
    metrics = dict(generation.Generation(samples=5, pairs=10)(cohort))
    assert metrics["generation/ms_ssim"] > 0.97
    assert metrics["generation/ms_ssim_real"] < metrics["generation/ms_ssim"] - 0.01
    assert {"generation/own_encoder/fid", "generation/own_encoder/mmd_real"} <= set(metrics)


def test_samples_with_a_prior_are_nearer_to_real_scans_than_those_of_the_unet_alone(tmp_path):
    """Without y, all samples have the mean radius; the prior knows the distribution of radii, given a diagnosis."""
    cohort = context(tmp_path)
    cohort.table["diagnosis"] = np.where(cohort.embeddings[:, 0] > 3.5, "AD", "CN")
    train = cohort.rows("train")
    columns = find_columns(cohort.table.iloc[train], ["diagnosis"])
    prior = SemanticPrior(1, [column.to_dict() for column in columns], components=1)
    labels, weights = encode_table(columns, cohort.table.iloc[train]), torch.full((len(train),), 1 / len(train))
    prior.fit(torch.from_numpy(cohort.embeddings[train]), labels, weights, len(train))
    cohort.model.prior = prior
    cohort.model.embed = lambda x: x[:, 0].mean((1, 2, 3))[:, None] * 100
    cohort.embeddings = cohort.model.embed(cohort.volumes(np.arange(40))).numpy()
    evaluation = generation.Generation(
        samples=12, pairs=10, seeds=2, resamples=20, more_features=[RandomFeatures((4, 8))],
        probes={"diagnosis": Classification("diagnosis", "AD", "CN")},
    )  # fmt: skip
    metrics = dict(evaluation(cohort))
    for space in ("own_encoder", "random"):
        for metric in ("fid", "mmd"):
            stem = f"generation/gaussian/{space}/{metric}"
            assert metrics[stem] < metrics[f"generation/{space}/{metric}"]
            assert metrics[f"{stem}_below_unet_seeds"] == 2
            below = metrics[f"generation/{space}/{metric}"] - metrics[stem]
            assert metrics[f"{stem}_below_unet"] == pytest.approx(below)
            assert metrics[f"{stem}_below_unet_low"] > 0
    assert metrics["generation/gaussian/ms_ssim"] < metrics["generation/ms_ssim"]
    volumes = [metrics[f"generation{source}/ventricle_wasserstein"] for source in ("/gaussian", "")]
    assert volumes[0] < 0.7 * volumes[1]
    assert metrics["generation/gaussian/probe/diagnosis/auc"] > 0.95
    assert metrics["generation/gaussian/probe/diagnosis/auc_real"] > 0.95
    assert "generation/prior/own_encoder/fid" not in metrics  # it is the Gaussian


def test_copies_of_training_scans_are_found():
    rng = np.random.default_rng(0)
    train, test, new = (rng.standard_normal((count, 30)) for count in (60, 30, 50))
    copies = train[rng.integers(60, size=50)] + 0.1 * rng.standard_normal((50, 30))
    found, honest = (dict(measure_memorisation(samples, train, test, 0)) for samples in (copies, new))
    assert found["share_nearer"] == 1
    assert found["distance"] < 0.3
    assert found["distance_ratio"] < 0.9
    assert honest["share_nearer"] < 0.3
    assert honest["distance"] == pytest.approx(1, abs=0.1)
    assert honest["distance_ratio_low"] < 1 < honest["distance_ratio_high"]


def test_weights_of_scans_count_as_copies_of_them():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 4)), rng.standard_normal((3, 4))
    found = weighted_cubic_mmd(a, b, np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
    assert found[0] == pytest.approx(generation.cubic_mmd(a, b[:2]))
    assert generation.frechet_distance(a, b) == pytest.approx(generation.frechet_distance(b, a))


def test_feature_distances_by_hand():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 3))
    b = 2 * rng.standard_normal((4000, 3)) + np.array([1.0, 0, 0])
    # |mean|^2 + sum (s_a - s_b)^2 for Gaussians with diagonal covariances
    assert generation.frechet_distance(a, b) == pytest.approx(1 + 3, rel=0.1)
    assert generation.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert abs(generation.cubic_mmd(a[:500], a[500:1000])) < 0.05
    assert generation.cubic_mmd(a[:500], b[:500]) > 0.5


def test_a_failing_evaluator_leaves_a_report_of_what_was_computed(tmp_path, monkeypatch):
    """One report in all: with the first evaluator's metrics and figure, and not those of the failed one."""

    def succeed(context):
        figures.draw_curves(context.out / "gap.png", {"a": ([0, 1], [0, 1])}, "x", "y")
        yield "gap/filled_share", 0.25

    def fail(context):
        yield "generation/samples", 4.0
        raise RuntimeError("no memory")

    reports, write = [], run.write_report
    monkeypatch.setattr(run, "write_report", lambda *given: reports.append(given) or write(*given))
    with pytest.raises(RuntimeError, match="no memory"):
        run.run_in_context(context(tmp_path), {"gap": succeed, "generation": fail, "never": fail}, "smoke")
    assert len(reports) == 1
    text = (tmp_path / "report.html").read_text()
    assert "gap/filled_share" in text
    assert "data:image/png" in text
    assert "generation/samples" not in text
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"gap/filled_share": 0.25}
    metrics = run.run_in_context(context(tmp_path), {"gap": succeed, "again": succeed}, "smoke")
    assert metrics == {"gap/filled_share": 0.25}
    assert len(reports) == 2


def test_the_report_explains_the_metrics_that_it_shows(tmp_path):
    metrics = {"gap/filled_share": 0.5, "probe/age/mae": 3.0, "baseline/mean/age/mae_difference": 1.0}
    text = page.write_report(tmp_path, "smoke", metrics).read_text()
    for words, name in (
        ("share of the squared gap that y removes", "gap/filled_share"),
        ("predictions from y by a linear probe; age; mean absolute error", "probe/age/mae"),
        ("embedding minus baseline on the same resamples", "baseline/mean/age/mae_difference"),
    ):
        (row,) = [row for row in text.split("<tr>") if f"<code>{name}</code></td>" in row]
        assert words in row


def test_the_report_is_one_escaped_file(tmp_path):
    figures.draw_scatter(tmp_path / "age_scatter.png", "age", "years", np.arange(5.0), np.arange(5.0) + 1)
    (tmp_path / "manipulation_age_1.html").write_text("<p>viewer</p><script>draw()</script>")
    metrics = {"probe/age/mae": 1.5, "probe/age/mae_low": 1.0, "probe/age/mae_high": 2.0, "x/<b>": 1.0}
    text = page.write_report(tmp_path, "a <script>", metrics).read_text()
    assert "<script>" not in text
    assert "&lt;b&gt;" in text
    assert "1.5 [1, 2]" in text
    sections = dict(part.split("</h2>", 1) for part in text.split("<nav>")[1].split("<h2 ")[1:])
    assert [name.split(">")[1] for name in sections] == [
        "What the embedding predicts",
        "Manipulation",
        "Further metrics",
    ]
    predicts, manipulation, further = sections.values()
    assert "data:image/png;base64," in predicts
    assert "1.5 [1, 2]" in predicts
    assert "&lt;script&gt;draw()" in manipulation
    assert "&lt;b&gt;" in further
    assert "http" not in text
    assert "probe/age/mae  1.5 [1, 2]" in format_console_table(metrics)
