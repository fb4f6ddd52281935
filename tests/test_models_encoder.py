"""Proves the semantic encoder and its ConvNeXt: order and plane of slices, weights read strictly, checkpointing."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldae.models.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldae.models.convnext import ConvNeXt
from ldae.models.semantic_encoder import SemanticEncoder, sinusoidal_positions
from ldae.models.slice_cnn import SliceCNN
from ldae.utils.errors import UserError

X = torch.rand(2, 1, 8, 16, 12)


def backbone(**options) -> ConvNeXt:
    return ConvNeXt(widths=(4, 8), depths=(1, 1), stem=2, layer_scale=1.0, init_std=None, **options)


def encoder(slices: int = 12, dim: int = 16, **options) -> SemanticEncoder:
    torch.manual_seed(0)
    return SemanticEncoder(backbone(), slices, dim, heads=2, dropout=0.0, **options).eval()


def test_y_and_attention_have_their_shapes():
    network = encoder()
    assert network(X).shape == (2, 16)
    weights = network.attention(X)
    assert weights.shape == (2, 12)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))


def test_the_order_of_slices_matters():
    network = encoder()
    assert not torch.allclose(network(X), network(X.flip(4)), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_slicing_another_axis_is_slicing_the_turned_volume(axis):
    network = encoder(slices=X.shape[2 + axis], axis=axis)
    axial = copy.deepcopy(network)
    axial.axis = 2
    torch.testing.assert_close(network(X), axial(X.movedim(2 + axis, 4)))


def test_another_number_of_slices_is_refused():
    with pytest.raises(UserError, match="12 slices along axis 2"):
        encoder()(X.movedim(4, 3))


def test_positions_are_sines_at_even_and_cosines_at_odd_indices():
    table = sinusoidal_positions(5, 6)[0]
    angle = torch.tensor(3.0) / 10_000 ** (2 / 6)
    torch.testing.assert_close(table[3, 2], angle.sin())
    torch.testing.assert_close(table[3, 3], angle.cos())


def test_no_projection_where_the_widths_agree():
    assert not list(encoder(dim=8).widen.parameters())
    assert encoder(dim=16).widen.weight.shape == (16, 8)


def test_checkpointing_changes_neither_outputs_nor_gradients():
    results = []
    for checkpointing in (False, True):
        network = encoder(checkpointing=checkpointing)
        y = network(X)
        (y * torch.arange(16)).sum().backward()
        results.append([y.detach(), *(p.grad for p in network.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blank_slices_are_read_once_where_no_gradient_is_asked_for(checkpointing):
    network, read = encoder(checkpointing=checkpointing), []
    network.backbone.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0])))
    x = X.clone()
    x[0, ..., [0, 1, 5]] = 0
    x[1, ..., 9:] = 0
    whole = network(x)
    assert sum(read) == 24
    read.clear()
    with torch.no_grad():
        torch.testing.assert_close(network(x), whole)
        assert sum(read) == (20 if checkpointing else 19)  # one blank slice a volume or a batch, 18 others
        torch.testing.assert_close(network(X), encoder()(X))


def test_slice_dropout_computes_fewer_slices_in_training_only():
    network = encoder(slice_dropout=0.5)
    counts = []
    network.backbone.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    network(X)
    network.train()(X)
    assert counts == [24, 12]


def test_a_kept_slice_keeps_its_position():
    network = encoder(slice_dropout=0.5).train()
    plain = encoder().train()
    torch.manual_seed(3)
    slices, kept = network._slices(X)
    tokens = network._tokens(network._read(slices), kept)
    everything = plain._tokens(plain._read(plain._slices(X)[0]), torch.arange(12).expand(2, 12))
    torch.testing.assert_close(tokens[1], everything[1, kept[1]])


def test_y_is_measured_from_the_reference_whatever_is_left_out():
    """Of the reference itself nothing is left but the LayerNorm's bias; a scan's y does not hang on the shared part."""
    network = encoder(reference=X.shape[2:], gated=True, slice_dropout=0.5)
    network.set_reference(X[:1], torch.tensor(0.3))
    nn.init.constant_(network.norm.bias, 3.0)
    for mode in (True, False):
        y = network.train(mode)(X)
        # How a product is rounded may hang on its size; the LayerNorm's epsilon lets little of it through.
        torch.testing.assert_close(y[0], torch.full_like(y[0], 3.0), atol=1e-3, rtol=0)
        assert 0.5 < (y[1] - 3).square().mean() < 1.1, "a scan that differs has a y"
    assert "reference" in network.state_dict()


def test_a_reference_of_another_size_is_refused():
    with pytest.raises(UserError, match="reference"):
        encoder(reference=(8, 16, 13))


def test_the_same_picture_at_another_height_gives_another_y_when_gated():
    single = torch.zeros(2, *X.shape[1:])
    single[0, ..., 2] = single[1, ..., 7] = X[0, ..., 5]
    ungated, gated = (encoder(reference=X.shape[2:], gated=gated) for gated in (False, True))
    assert float((gated(single)[0] - gated(single)[1]).norm()) > 2 * float(
        (ungated(single)[0] - ungated(single)[1]).norm()
    )


def test_the_slice_cnn_begins_as_a_global_average_and_learns_where_to_look():
    network = SliceCNN(size=(16, 32), widths=(4, 8), out_channels=6, looks=3)
    x = torch.zeros(2, 1, 16, 32)
    x[0, 0, 5, 5] = x[1, 0, 9, 21] = 4.0
    y = network(x)
    assert y.shape == (2, 6)
    assert torch.allclose(y[0], y[1], atol=1e-6)
    assert not torch.allclose(y[0], network(torch.zeros_like(x))[0], atol=1e-4)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        first, second = network(x)
        ((first - second).sum() - 1).square().backward()
        optimizer.step()
    first, second = network(x)
    assert float((first - second).sum()) == pytest.approx(1, abs=0.1)
    with pytest.raises(UserError, match="do not divide by 8"):
        SliceCNN(size=(40, 44), widths=(4, 8, 8))


def imagenet() -> dict[str, torch.Tensor]:
    """A made-up ImageNet file for `backbone()`: RGB stem, 1000 classes."""
    tensors = {name: torch.randn_like(t) for name, t in backbone().state_dict().items()}
    tensors["features.0.0.weight"] = torch.randn(4, 3, 2, 2)
    return {**tensors, "classifier.2.weight": torch.randn(10, 8), "classifier.2.bias": torch.randn(10)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_imagenet_file_loads_with_its_stem_summed(tmp_path, suffix):
    tensors, path = imagenet(), tmp_path / f"convnext{suffix}"
    (torch.save if suffix == ".pth" else save_file)(tensors, path)
    loaded = backbone(weights=str(path)).state_dict()
    torch.testing.assert_close(loaded["features.0.0.weight"], tensors["features.0.0.weight"].sum(1, keepdim=True))
    assert torch.equal(loaded["features.3.0.block.5.weight"], tensors["features.3.0.block.5.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.1.0.block.0.bias": None}, "'features.1.0.block.0.bias' is missing"),
        ({"features.1.0.block.0.bias": torch.zeros(5)}, "'features.1.0.block.0.bias' is"),
        ({"extra": torch.zeros(5)}, "unexpected tensor 'extra'"),
        ({"classifier.2.bias": None}, "'classifier.2.bias' is missing"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_tensor(tmp_path, change, message):
    tensors = {name: value for name, value in {**imagenet(), **change}.items() if value is not None}
    torch.save(tensors, tmp_path / "convnext.pth")
    with pytest.raises(UserError, match=message):
        backbone(weights=str(tmp_path / "convnext.pth"))


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot read weights"):
        backbone(weights=str(tmp_path / "evil.pth"))


def test_stochastic_depth_skips_whole_samples_and_only_in_training():
    network = backbone(stochastic_depth=0.999999)
    assert [b.drop for b in (network.features[1][0], network.features[3][0])] == pytest.approx([0, 1], abs=1e-5)
    last, x = network.features[3][0], torch.randn(3, 8, 2, 2)
    assert torch.equal(last.train()(x), x)
    assert not torch.equal(last.eval()(x), x)


def test_autoencoder_shapes_sizes_and_noise():
    network = AutoencoderKL(channels=(8, 8, 8), residual_blocks=1, groups=4).eval()
    mean, std = network.encode(X)
    assert mean.shape == std.shape == (2, 3, 2, 4, 3)
    assert network.strides == (4, 4, 4)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(network(X, noise)[0], network.decode(mean + std * noise))
    torch.testing.assert_close(network(X)[0], network.decode(mean))
    with pytest.raises(UserError, match="along x"):
        network.encode(torch.rand(1, 1, 6, 8, 8))


def test_identity_autoencoder_is_voxel_space():
    network = IdentityAutoencoder()
    mean, std = network.encode(X)
    assert torch.equal(network.decode(mean), X)
    assert not std.any()


def test_one_query_attends_as_multi_head_attention_over_keys_and_values_does():
    network = encoder(dim=16)
    for parameter in network.cross_attention.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(3, 12, 16)
    mean = (network.score(tokens).softmax(dim=1) * tokens).sum(dim=1, keepdim=True)
    expected, weights = network.cross_attention(network.query(mean), network.key(tokens), network.value(tokens))
    found, own = network._attend(tokens)
    torch.testing.assert_close(found, expected[:, 0])
    torch.testing.assert_close(own.mean(dim=1), weights[:, 0])


def test_every_parameter_gets_a_gradient():
    """Otherwise a step of several processes never ends."""
    network = encoder(reference=X.shape[2:], gated=True).train()
    network(X).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
