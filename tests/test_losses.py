"""The losses have the values known on paper; the perceptual ones load their files, here random weights, strictly."""

import pytest
import torch

from ldae.diffusion.process import Epsilon, Velocity, add_noise
from ldae.diffusion.schedule import linear
from ldae.losses import autoencoder as losses
from ldae.losses.denoising import denoising_loss, gap_filling_loss
from ldae.losses.perceptual import MedicalNetDistance, SliceLpips, SqueezeLpips, plane_slices
from ldae.losses.structural import gaussian_mean, ssim_map, structural_dissimilarity
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal, make_generator


def draw(*shape, key=0):
    return torch.randn(*shape, generator=make_generator(0, key))


def test_kl_is_summed_over_the_latent_and_averaged_over_the_batch():
    mean, std = torch.full((2, 3, 4, 4, 4), 0.5), torch.full((2, 3, 4, 4, 4), 2.0)
    one = 0.5 * (0.25 + 4.0 - torch.log(torch.tensor(4.0)) - 1)
    torch.testing.assert_close(losses.kl_divergence(mean, std), one * 3 * 64)
    assert losses.kl_divergence(torch.zeros(1, 3, 2, 2, 2), torch.ones(1, 3, 2, 2, 2)) == 0


def test_least_squares_gan_losses_are_zero_at_their_target_scores():
    ones, zeros = torch.ones(2, 1, 3, 3, 3), torch.zeros(2, 1, 3, 3, 3)
    assert losses.generator_adversarial(ones) == 0
    assert losses.discriminator_adversarial(ones, zeros) == 0
    assert losses.discriminator_adversarial(zeros, ones) == 1


@pytest.mark.parametrize("parameterisation", [Epsilon(), Velocity()])
def test_denoising_loss_is_zero_for_the_target_and_one_for_a_zero_output(parameterisation):
    schedule, z0, noise = linear(), draw(4, 3, 8, 8, 8), draw(4, 3, 8, 8, 8, key=1)
    t = torch.tensor([0, 100, 500, 999])
    target = parameterisation.target(schedule, z0, noise, t)
    assert denoising_loss(parameterisation, schedule, target, z0, noise, t) == 0
    zero = denoising_loss(parameterisation, schedule, torch.zeros_like(z0), z0, noise, t)
    assert zero == pytest.approx(1.0, abs=0.05), "eps and v of unit-variance latents have unit variance"


@pytest.mark.parametrize("parameterisation", [Epsilon(), Velocity()])
def test_gap_filling_loss_is_zero_for_the_exact_gradient_and_weighted_mse_for_none(parameterisation):
    schedule, z0, noise = linear(), draw(3, 3, 4, 4, 4).double(), draw(3, 3, 4, 4, 4, key=1).double()
    t = torch.tensor([1, 300, 999])
    output = draw(3, 3, 4, 4, 4, key=2).double()
    target = parameterisation.target(schedule, z0, noise, t)
    coefficient = parameterisation.gap_coefficient(schedule, t).view(-1, 1, 1, 1, 1)
    filled = gap_filling_loss(parameterisation, schedule, output, (target - output) / coefficient, z0, noise, t)
    empty = gap_filling_loss(parameterisation, schedule, output, torch.zeros_like(output), z0, noise, t)
    assert filled < 1e-10
    assert empty > 1e-3
    weighted = parameterisation.gap_weight(schedule, t) * (target - output).square().flatten(1).mean(1)
    assert float(empty) == pytest.approx(float(weighted.mean()), rel=1e-5)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = draw_normal((3, 2), 7, [4, 5, 6], "noise")
    torch.testing.assert_close(whole[1:], draw_normal((3, 2), 7, [5, 6], "noise"), rtol=0, atol=0)
    assert not torch.equal(whole, draw_normal((3, 2), 7, [4, 5, 6], "other"))
    z_t = add_noise(linear(), torch.zeros(3, 3, 2), whole, torch.tensor([999, 999, 999]))
    assert z_t.std() > 0.5


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Files with the names of torchvision's SqueezeNet 1.1 and LPIPS's heads, and random weights."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    network = SqueezeLpips()
    backbone = {f"features.{n}": t for n, t in network.features.state_dict().items()}
    backbone |= {"classifier.1.weight": torch.zeros(1000, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    heads = {f"lin{n.split('.')[0]}.model.1.weight": t.abs() for n, t in network.heads.state_dict().items()}
    torch.save(backbone, folder / "squeezenet.pth")
    torch.save(heads, folder / "squeeze.pth")
    return folder


def test_lpips_is_zero_for_equal_volumes_and_repeats_under_the_same_generator(lpips_files):
    files = {"backbone": str(lpips_files / "squeezenet.pth"), "heads": str(lpips_files / "squeeze.pth")}
    lpips = SliceLpips(**files)
    assert sum(p.numel() for p in lpips.network.features.parameters()) == 722_496, "SqueezeNet 1.1 without classifier"
    a, b = torch.rand(1, 1, 36, 40, 36), torch.rand(1, 1, 36, 40, 36)
    first, again, other = (lpips.draw((36, 40, 36), make_generator(seed)) for seed in (1, 1, 2))
    assert [len(keep) for keep in first.values()] == [18, 20, 18]
    assert lpips(a, a, first) == 0
    assert lpips(a, b, first) == lpips(a, b, again) > 0
    assert lpips(a, b, first) != lpips(a, b, other), "a different half of the slices"
    published = SliceLpips(**files, share=1.0, total=3.0, signed=False)
    mean = SliceLpips(**files, share=1.0, total=1.0, signed=False)
    torch.testing.assert_close(published(a, b), 3 * mean(a, b))


def test_lpips_refuses_files_that_do_not_fit(lpips_files, tmp_path):
    backbone, heads = lpips_files / "squeezenet.pth", lpips_files / "squeeze.pth"
    tensors = torch.load(backbone, weights_only=True)
    tensors.pop("features.3.squeeze.weight")
    torch.save(tensors, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"3\.squeeze\.weight"):
        SliceLpips(str(tmp_path / "cut.pth"), str(heads))
    with pytest.raises(UserError, match="no such file"):
        SliceLpips(str(tmp_path / "absent.pth"), str(heads))
    (tmp_path / "hostile.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="cannot read weights"):
        SliceLpips(str(tmp_path / "hostile.pth"), str(heads))


def test_plane_slices_are_cut_along_the_given_axis():
    x = torch.arange(2 * 3 * 4.0).reshape(1, 1, 2, 3, 4)
    assert plane_slices(x, 0).shape == (2, 1, 3, 4)
    torch.testing.assert_close(plane_slices(x, 2)[1, 0], x[0, 0, :, :, 1])
    torch.testing.assert_close(plane_slices(x, 2, torch.tensor([1, 3]))[1, 0], x[0, 0, :, :, 3])


def test_medicalnet_loads_its_file_strictly_and_passes_gradients(tmp_path):
    from monai.networks.nets import resnet10

    torch.manual_seed(0)
    network = resnet10(
        pretrained=False, spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B",
        bias_downsample=False,
    )  # fmt: skip
    tensors = {f"module.{n}": t for n, t in network.state_dict().items()}
    torch.save({"state_dict": tensors}, tmp_path / "resnet_10.pth")
    distance = MedicalNetDistance(str(tmp_path / "resnet_10.pth"))
    a, b = torch.rand(1, 1, 24, 24, 24), torch.rand(1, 1, 24, 24, 24)
    assert distance(a, a) == 0
    assert distance(a, b) > 0
    b.requires_grad_()
    distance(a, b).backward()
    assert b.grad.abs().sum() > 0, "the gradient reaches the reconstruction"
    tensors.pop("module.layer2.0.conv1.weight")
    torch.save({"state_dict": tensors}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"layer2\.0\.conv1\.weight"):
        MedicalNetDistance(str(tmp_path / "cut.pth"))


def test_structural_dissimilarity_is_one_minus_ssim_and_its_gradient_sharpens_a_blurred_volume():
    """It is 0 for equal volumes, and minimising it makes a blurred volume similar to the sharp one again."""
    x = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    assert float(structural_dissimilarity(x, x)) == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool3d(x, 3, 1, 1).requires_grad_(True)
    start = structural_dissimilarity(blurred, x)
    assert start.item() == pytest.approx(1 - float(ssim_map(blurred.detach(), x).mean()), abs=1e-6)
    optimizer = torch.optim.Adam([blurred], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        structural_dissimilarity(blurred, x).backward()
        optimizer.step()
    assert float(structural_dissimilarity(blurred, x).detach()) < 0.1 * float(start.detach())


def test_the_gaussian_mean_replicates_borders():
    """A constant volume stays; an impulse in the corner also gets the weights that fall beyond the border."""
    flat = torch.full((1, 1, 5, 5, 5), 0.3)
    torch.testing.assert_close(gaussian_mean(flat, 3), flat)
    impulse = torch.zeros(1, 1, 5, 5, 5)
    impulse[0, 0, 0, 0, 0] = 1.0
    side = torch.exp(torch.tensor(-1 / 4.5))
    weight = (1 + side) / (1 + 2 * side)
    torch.testing.assert_close(gaussian_mean(impulse, 3)[0, 0, 0, 0, 0], weight**3)
