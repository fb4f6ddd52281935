"""The semantic encoder and its backbones: order and axis of slices, slice dropout, mean volume, ImageNet weights; and
shapes and sizes of the autoencoders."""

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
def test_slicing_another_axis_equals_slicing_the_rotated_volume(axis):
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


def test_features_are_projected_only_if_their_width_differs_from_that_of_y():
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


def test_slice_dropout_computes_fewer_slices_in_training_only():
    network = encoder(slice_dropout=0.5)
    counts = []
    network.backbone.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    network(X)
    network.train()(X)
    assert counts == [24, 12]


def test_slices_keep_their_positions_under_slice_dropout():
    network = encoder(slice_dropout=0.5).train()
    plain = encoder().train()
    torch.manual_seed(3)
    slices, chosen = network.cut_slices(X)
    tokens = network.tokens(network.features(slices), chosen)
    whole, everything = plain.cut_slices(X)
    expected = plain.tokens(plain.features(whole), everything)
    torch.testing.assert_close(tokens[1], expected[1, chosen[1]])


def test_y_of_the_mean_volume_is_the_bias_of_the_norm_with_and_without_slice_dropout():
    """y depends only on the difference from the mean volume, which is 0 for the first scan and not for the second."""
    network = encoder(mean_volume_shape=X.shape[2:], position_gate=True, slice_dropout=0.5)
    network.set_mean_volume(X[:1], torch.tensor(0.3))
    nn.init.constant_(network.norm.bias, 3.0)
    for mode in (True, False):
        y = network.train(mode)(X)
        # The two products may be rounded differently, and the LayerNorm scales the difference up.
        torch.testing.assert_close(y[0], torch.full_like(y[0], 3.0), atol=1e-3, rtol=0)
        assert 0.5 < (y[1] - 3).square().mean() < 1.1


def test_the_mean_volume_is_stored_under_its_published_name():
    stored = encoder(mean_volume_shape=X.shape[2:]).state_dict()
    assert {"reference", "spread"} <= stored.keys()
    assert not {"reference", "spread"} & encoder().state_dict().keys()


def test_a_mean_volume_of_another_size_is_refused():
    with pytest.raises(UserError, match="mean_volume_shape"):
        encoder(mean_volume_shape=(8, 16, 13))


def test_a_position_gate_makes_y_depend_more_on_the_position_of_a_slice():
    single = torch.zeros(2, *X.shape[1:])
    single[0, ..., 2] = single[1, ..., 7] = X[0, ..., 5]
    ungated, gated = (encoder(mean_volume_shape=X.shape[2:], position_gate=gated) for gated in (False, True))
    assert float((gated(single)[0] - gated(single)[1]).norm()) > 2 * float(
        (ungated(single)[0] - ungated(single)[1]).norm()
    )


def test_the_slice_cnn_starts_as_a_global_average_and_learns_where_to_average():
    network = SliceCNN(size=(16, 32), widths=(4, 8), out_channels=6, num_poolings=3)
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
    """Tensors of an ImageNet file for `backbone()`: an RGB stem and a classifier of 10 classes."""
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
def test_a_file_that_does_not_fit_is_refused_with_the_name_of_the_tensor(tmp_path, change, message):
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
    assert [b.drop_rate for b in (network.features[1][0], network.features[3][0])] == pytest.approx([0, 1], abs=1e-5)
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


def test_every_parameter_gets_a_gradient():
    """Otherwise a training step in several processes never ends, because each waits for the gradients of the others."""
    network = encoder(mean_volume_shape=X.shape[2:], position_gate=True).train()
    network(X).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
