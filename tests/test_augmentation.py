"""Proves that augmentation depends on the sample alone, and is applied to a batch as to each scan, in voxels."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ldae.data.augmentation import Augmentation
from ldae.utils.seeding import make_generator

ALL = {"flip": 0.5, "rotation": 8, "scaling": 0.1, "translation": 2, "shift": 0.1, "contrast": 0.3}


def augment(change: Augmentation, x: Tensor, seed: int, keys) -> Tensor:
    return change.apply(x, change.draw(seed, keys, x.shape[2:]))


def plainly(change: Augmentation, x: Tensor, seed: int, keys) -> Tensor:
    """The same scan by scan, in float64 and with `affine_grid`."""
    result = []
    for volume, key in zip(x.double(), keys, strict=True):
        drawn = torch.rand(12, generator=make_generator(seed, "augmentation", key), dtype=torch.float64)
        even = (2 * drawn - 1).tolist()
        if drawn[0] < change.flip:
            volume = volume.flip(1)
        if change.rotation or change.scaling or change.translation:
            volume = moved(change, volume, even[1:4], even[4:7], even[7:10])
        if change.contrast:
            volume = volume.clamp(0, 1) ** ((1 + change.contrast) ** even[10])
        if change.shift:
            volume = (volume + change.shift * even[11]).clamp(0, 1)
        result.append(volume)
    return torch.stack(result).float()


def moved(change: Augmentation, volume: Tensor, angles: list, sizes: list, moves: list) -> Tensor:
    a, b, c = (math.radians(change.rotation) * angle for angle in angles)
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_y = np.array([[math.cos(b), 0, -math.sin(b)], [0, 1, 0], [math.sin(b), 0, math.cos(b)]])
    about_z = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    matrix = about_z @ about_y @ about_x @ np.diag(1 + change.scaling * np.array(sizes))
    half = np.array(volume.shape[1:]) / 2
    theta = np.zeros((3, 4))
    theta[:, :3] = (np.diag(1 / half) @ matrix @ np.diag(half))[::-1, ::-1]
    theta[:, 3] = (change.translation * np.array(moves) / half)[::-1]
    grid = functional.affine_grid(torch.from_numpy(theta)[None], [1, *volume.shape], align_corners=False)
    return functional.grid_sample(volume[None], grid, align_corners=False)[0]


@pytest.mark.parametrize("names", [*([name] for name in ALL), ["flip", "rotation"], list(ALL)], ids="-".join)
def test_a_batch_is_changed_like_its_scans_one_by_one(names: list[str]) -> None:
    x = torch.rand(6, 1, 10, 12, 8, generator=make_generator(0, "x"))
    change = Augmentation(**{name: ALL[name] for name in names})
    found = augment(change, x, 3, range(10, 16))
    torch.testing.assert_close(found, plainly(change, x, 3, range(10, 16)), atol=1e-5, rtol=0)
    assert not torch.equal(found, x)
    assert found.dtype == torch.float32


def test_only_what_is_switched_on_is_drawn() -> None:
    drawn = Augmentation(**ALL).draw(0, [4, 5, 6], (10, 12, 8))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in drawn.items()} == {
        "augment_flip": (torch.bool, (3,)),
        "augment_theta": (torch.float32, (3, 3, 4)),
        "augment_gamma": (torch.float32, (3,)),
        "augment_shift": (torch.float32, (3,)),
    }
    some = Augmentation(shift=0.1, scaling=0.1).draw(0, [4, 5, 6], (10, 12, 8))
    assert set(some) == {"augment_theta", "augment_shift"}
    assert torch.equal(some["augment_shift"], drawn["augment_shift"])  # one switched off leaves the others


def test_augmentation_is_off_by_default() -> None:
    x = torch.rand(2, 1, 6, 7, 8)
    assert Augmentation().is_off
    assert Augmentation().draw(0, [0, 1], x.shape[2:]) == {}
    assert Augmentation().apply(x, {"position": [0, 1], "x": x}) is x
    assert not Augmentation(shift=0.1).is_off


def test_augmentation_depends_on_the_sample_alone() -> None:
    """The same key gives the same change in any batch."""
    x = torch.rand(4, 1, 10, 12, 8)
    change = Augmentation(**ALL)
    found = augment(change, x, 3, [10, 11, 12, 13])
    assert found.shape == x.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(found, augment(change, x, 3, np.arange(10, 14)))
    torch.testing.assert_close(found[[2, 0]], augment(change, x[[2, 0]], 3, [12, 10]), atol=1e-6, rtol=0)
    alone = torch.cat([augment(change, x[i : i + 1], 3, [10 + i]) for i in range(4)])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    same = augment(change, x[:1].expand(4, -1, -1, -1, -1), 3, [10, 11, 12, 13])
    assert len({tuple(volume.flatten().tolist()) for volume in same}) == 4
    assert not torch.equal(found, augment(change, x, 4, [10, 11, 12, 13]))


def test_no_value_is_read_back_from_the_device() -> None:
    """On `meta` there are no values: reading one raises, and so does mixing with tensors on the CPU."""
    change, shape = Augmentation(**ALL), (128, 160, 128)
    drawn = {name: value.to("meta") for name, value in change.draw(0, [0, 1], shape).items()}
    found = change.apply(torch.empty(2, 1, *shape, device="meta"), drawn)
    assert (found.shape, found.dtype, found.device.type) == ((2, 1, *shape), torch.float32, "meta")


def test_autocast_does_not_round_the_coordinates() -> None:
    x = torch.rand(2, 1, 16, 20, 12)
    plain = augment(Augmentation(**ALL), x, 0, [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(Augmentation(**ALL), x, 0, [0, 1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_a_flip_reverses_x_and_a_tiny_rotation_changes_nothing() -> None:
    x = torch.rand(3, 1, 5, 6, 7)
    assert torch.equal(augment(Augmentation(flip=1.0), x, 0, range(3)), x.flip(2))
    tiny = augment(Augmentation(rotation=1e-7), x, 0, range(3))
    torch.testing.assert_close(tiny, x, atol=1e-5, rtol=0)


def along(volume: Tensor, axis: int) -> Tensor:
    """Sum over each plane perpendicular to `axis` of (1, 1, X, Y, Z)."""
    return volume.sum(tuple({0, 1, 2, 3, 4} - {axis + 2}))


def test_rotations_and_translations_are_in_voxels_for_any_shape() -> None:
    """A cube that is rotated about its centre remains a cube of the same size, although the axes differ in length."""
    x = torch.zeros(1, 1, 40, 60, 30)
    x[..., 15:25, 25:35, 10:20] = 1
    for key in range(5):
        turned = augment(Augmentation(rotation=45), x, 0, [key])
        assert turned.sum() == pytest.approx(1000, rel=0.02)
        spread = sum(
            ((torch.arange(n) - (n - 1) / 2) ** 2 * along(turned, axis)).sum() for axis, n in enumerate((40, 60, 30))
        )
        assert spread / turned.sum() == pytest.approx(3 * 8.25, rel=0.1)  # (10^2 - 1) / 12 an axis: no shear
        shifted = augment(Augmentation(translation=5), x, 0, [key])
        shifts = [float((torch.arange(n) * along(shifted, axis)).sum() / 1000) for axis, n in enumerate((40, 60, 30))]
        difference = np.array(shifts) - (19.5, 29.5, 14.5)
        assert 0.1 < np.abs(difference).max() <= 5
        assert shifted.sum() == pytest.approx(1000, rel=1e-3)
