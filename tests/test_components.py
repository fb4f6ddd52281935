"""Principal components read batch by batch equal exact ones, whatever the batch size and the number of processes; and
the components encoder: scale, rotation, 16-bit storage, and a residual that stays within its share."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ldae.data.components import OVERSAMPLING, ComponentsFit
from ldae.models.components_encoder import ComponentsEncoder
from ldae.models.fitted import copy_fitted
from ldae.models.rotation import spreading_rotation
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.slice_cnn import SliceCNN
from ldae.models.volume_cnn import VolumeCNN
from ldae.utils.errors import UserError

SHAPE = (3, 6, 8, 6)
DECAY = 0.93  # of the standard deviations of made-up components


def made_up(count: int, shape=SHAPE, seed: int = 0) -> torch.Tensor:
    """Volumes (N, C, X, Y, Z) around a mean of 5, whose variances decay by DECAY**2 from component to component."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    basis = np.linalg.qr(rng.normal(size=(size, min(size, 200))))[0]
    scores = rng.normal(size=(count, basis.shape[1])) * DECAY ** np.arange(basis.shape[1])
    return torch.from_numpy((5 + scores @ basis.T).astype(np.float32)).view(count, *shape)


def fit(x: torch.Tensor, count: int, **options):
    read = lambda rows: x[torch.as_tensor(np.array(rows))]  # noqa: E731
    return ComponentsFit(read, np.arange(len(x)), count, seed=0, progress=False, **options).run()


def exact(x: torch.Tensor, count: int):
    """Mean, directions and variances of numpy's SVD."""
    flat = x.flatten(1).double().numpy()
    values, directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[1:]
    return flat.mean(0), directions[:count], values[:count] ** 2 / len(x)


def captured(x: torch.Tensor, directions: torch.Tensor) -> float:
    """Variance along the directions, summed."""
    difference = (x - x.mean(0)).flatten(1)
    return float((difference @ directions.flatten(1).T).square().sum(1).mean())


def test_components_of_few_volumes_are_those_of_an_exact_svd():
    x = made_up(40)
    found = fit(x, 10)
    mean, directions, variances = exact(x, 10)
    assert found.mean.flatten().numpy() == pytest.approx(mean, abs=1e-5)
    assert found.variances.numpy() == pytest.approx(variances, rel=1e-4)
    cosines = (found.directions.flatten(1).double().numpy() * directions).sum(1)
    assert np.abs(cosines) == pytest.approx(np.ones(10), abs=1e-4)
    largest = found.directions.flatten(1).gather(1, found.directions.flatten(1).abs().argmax(1, keepdim=True))
    assert (largest > 0).all(), "signs are fixed"


def test_components_of_many_volumes_are_nearly_as_good_as_exact_ones():
    """More volumes than directions that are searched, with a spectrum that is known."""
    count = 8
    x = made_up(400)
    assert len(x) > 3 * (2 * count + OVERSAMPLING)
    found = fit(x, count)
    _, directions, variances = exact(x, count)
    best = captured(x, torch.from_numpy(directions).float())
    assert captured(x, found.directions) == pytest.approx(best, rel=1e-3)
    assert found.variances.numpy() == pytest.approx(variances, rel=0.01)
    assert found.variances.numpy() == pytest.approx(DECAY ** (2 * np.arange(count)), rel=0.3), "the known spectrum"
    gram = found.directions.flatten(1) @ found.directions.flatten(1).T
    torch.testing.assert_close(gram, torch.eye(count), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [60, 150])  # in memory, and read three times
def test_neither_the_batch_size_nor_a_second_run_changes_components(count):
    x = made_up(count)
    first, again, other = fit(x, 6, batch=8), fit(x, 6, batch=8), fit(x, 6, batch=37)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    for one, two in zip(first, other, strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [60, 150])
def test_processes_that_share_the_volumes_get_the_components_of_one(count):
    x, barrier, sums = made_up(count), threading.Barrier(2), [None, None]
    found = [None, None]

    def add_up(process):
        def add(tensor):
            sums[process] = tensor
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

        return add

    def run(process):
        found[process] = fit(x, 6, process=process, processes=2, add_up=add_up(process))

    threads = [threading.Thread(target=run, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = fit(x, 6)
    for one, two, three in zip(*found, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, atol=2e-4, rtol=1e-4)


def test_components_that_do_not_exist_are_zero():
    found = fit(made_up(5), 10)
    assert (found.variances[:4] > 0).all()
    assert not found.variances[4:].any()
    assert not found.directions[4:].any()
    repeated = fit(made_up(5)[[0, 1, 2, 2, 2, 4]], 5)
    assert (repeated.variances > 0).tolist() == [True, True, True, False, False], "a scan that is listed three times"


@pytest.mark.parametrize("dim", [768, 16, 15, 50])
def test_the_rotation_is_orthonormal_and_spreads_its_first_columns_evenly(dim):
    matrix = spreading_rotation(dim, dim)
    assert torch.equal(spreading_rotation(dim, 5), matrix[:, :5])
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(dim), atol=1e-5, rtol=0)
    even = matrix[:, : dim & -dim].abs()
    torch.testing.assert_close(even, torch.full_like(even, dim**-0.5), atol=1e-6, rtol=0)


def fitted(x: torch.Tensor, components: int = 6, dim: int = 48, **options) -> ComponentsEncoder:
    torch.manual_seed(0)
    encoder = ComponentsEncoder(x.shape[1:], components, dim, **options)
    encoder.set_components(*fit(encoder.pool(x), components))
    return encoder


def test_y_has_mean_square_one_and_the_relative_sizes_of_the_components():
    x = made_up(60)
    encoder = fitted(x)
    y = encoder(x)
    assert y.shape == (60, 48)
    features = y.square().mean(0)
    torch.testing.assert_close(features.mean(), torch.ones(()), atol=1e-3, rtol=0)
    assert 0.2 < float(features.min()) < float(features.max()) < 2.5
    spectrum = np.linalg.svd((y - y.mean(0)).numpy(), compute_uv=False)[:6] ** 2
    variances = exact(x, 6)[2]
    assert spectrum / spectrum.sum() == pytest.approx(variances / variances.sum(), rel=2e-3)
    assert not list(encoder.parameters())


def test_scores_from_components_in_16_bits_are_exact_to_a_thousandth():
    x = made_up(60)
    encoder = fitted(x)
    mean, directions, variances = exact(x, 6)
    scores = (x.flatten(1).double().numpy() - mean) @ directions.T
    scores *= np.sign((scores * encoder.scores(x).double().numpy()).sum(0))
    found = encoder.scores(x).double().numpy() / float(encoder.scale)
    assert np.abs(found - scores).max(0) / np.sqrt(variances) == pytest.approx(np.zeros(6), abs=1e-3)


def test_components_are_those_of_the_view_averaged_to_their_resolution():
    x = made_up(30, (1, 9, 8, 6))
    encoder = fitted(x, spacing=[1.5, 2.0, 4.0])
    assert encoder.mean.shape == (1, 3, 4, 6)
    first = encoder.pool(x)[0, 0, 1, 1, 2]
    torch.testing.assert_close(first, x[0, 0, 3:6, 2:4, 2].mean())
    assert ComponentsEncoder((1, 8, 8, 8), 2, 8, spacing=4.75).mean.shape == (1, 8, 8, 8)
    edge = ComponentsEncoder((1, 4, 4, 4), 2, 8, spacing=1.5).pool(torch.ones(1, 1, 4, 4, 4))
    torch.testing.assert_close(edge, torch.ones(1, 1, 2, 2, 2))


def residual_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "volume_cnn":
        return VolumeCNN(SHAPE, widths=(4, 8), dim=20)
    backbone = SliceCNN(size=(6, 8), widths=(4,), out_channels=8, num_poolings=2, channels=3)
    return SemanticEncoder(backbone, slices=6, dim=20, heads=2, dropout=0.0, channels=3)


@pytest.mark.parametrize("kind", ["volume_cnn", "slices"])
def test_a_residual_stays_within_its_share_and_can_be_told_apart_in_y(kind):
    x = made_up(20)
    alone = fitted(x)(x)
    encoder = fitted(x, residual=residual_of(kind), residual_share=0.25)
    for parameter in encoder.residual.parameters():
        nn.init.normal_(parameter, std=3.0)
    y = encoder(x).detach()
    parts = encoder.parts(y)
    assert list(parts) == ["components", "residual", "both"]
    torch.testing.assert_close(parts["components"], 0.75**0.5 * alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts["components"] + parts["residual"], y, atol=1e-4, rtol=1e-4)
    share = float(parts["residual"].square().sum() / y.square().sum())
    assert 0.05 < share <= 0.25
    assert torch.equal(parts["both"], y)
    assert list(fitted(x).parts(alone)) == ["components"]


def test_a_volume_cnn_starts_at_zero_learns_and_gives_every_parameter_a_gradient():
    x = made_up(20)
    encoder = fitted(x, residual=residual_of("volume_cnn"), residual_share=0.25)
    encoder.residual.set_mean_volume(x.mean(0, keepdim=True), torch.tensor(0.1))
    torch.testing.assert_close(encoder(x), 0.75**0.5 * fitted(x)(x))
    wanted, optimizer = torch.randn(20, 48), torch.optim.Adam(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (encoder(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert not encoder.residual(encoder.residual.mean_volume).any()


def test_checkpointing_of_the_residual_changes_no_gradient():
    x = made_up(4)
    gradients = []
    for checkpointing in (False, True):
        encoder = fitted(x, residual=residual_of("volume_cnn"), residual_share=0.25)
        nn.init.normal_(encoder.residual.reading.weight)
        encoder.checkpointing = checkpointing
        assert encoder.residual.checkpointing == checkpointing
        (encoder(x) * torch.arange(48)).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_fit_of_another_encoder_is_copied_without_its_weights():
    x = made_up(12)
    trained = fitted(x, residual=residual_of("volume_cnn"), residual_share=0.25)
    trained.residual.set_mean_volume(x.mean(0, keepdim=True), torch.tensor(0.1))
    nn.init.normal_(trained.residual.reading.weight)
    start = ComponentsEncoder(SHAPE, 6, 48, residual=residual_of("volume_cnn"), residual_share=0.25)
    weights = copy.deepcopy(dict(start.named_parameters()))
    copy_fitted(trained, start)
    assert all(torch.equal(one, two) for one, two in zip(start.buffers(), trained.buffers(), strict=True))
    assert all(torch.equal(weights[name], parameter) for name, parameter in start.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 20, "dim": 16}, "between 1 and model.encoder.dim=16"),
        ({"residual": VolumeCNN((1, 8, 8, 8), (4,), 13), "residual_share": 0.2}, "residual.dim=13 is more than the 12"),
        ({"residual": VolumeCNN((1, 8, 8, 8), (4,), 4)}, "residual_share=0.0 needs a value above 0"),
        ({"residual_share": 0.2}, "residual_share=0.2 needs model.encoder.residual"),
        ({"residual_share": 1.0}, "below 1"),
        ({"shape": (8, 8, 8)}, "four numbers"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ComponentsEncoder(**{"shape": (1, 8, 8, 8), "components": 4, "dim": 16, **options})


def test_another_shape_and_attention_are_refused():
    encoder = ComponentsEncoder((3, 4, 4, 4), 2, 8)
    with pytest.raises(UserError, match="for which the encoder was built"):
        encoder(torch.zeros(1, 1, 4, 4, 4))
    with pytest.raises(UserError, match="no attention"):
        encoder.attention(torch.zeros(1, 3, 4, 4, 4))
