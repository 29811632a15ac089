"""The low-resolution picture of a super-resolution stage: enlarged as PyTorch does, at the level asked for."""

import jax
import numpy as np
import pytest
import torch

from dreambooth_jax.data.images import Examples
from dreambooth_jax.data.low_resolution import cut, shrink
from dreambooth_jax.diffusion.low_resolution import LowResolution, make_augment

PICTURE = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
LOW = LowResolution(4, True, np.array([0.0, 0.2, 0.6, 1.0]), 2)


def augmented(low, noise, level=None, picture=PICTURE, seed=0):
    side = picture.shape[1] * low.factor
    return make_augment(low, side, noise, level)({"low": picture.ravel(), "other": 1}, jax.random.key(seed))


def test_without_noise_it_is_the_picture_enlarged_as_pytorch_does():
    cond = augmented(LOW, "uniform", 0)
    given = torch.from_numpy(PICTURE).permute(0, 3, 1, 2).float() / 255
    wanted = torch.nn.functional.interpolate(given, (32, 32), mode="bilinear", align_corners=True)
    np.testing.assert_allclose(cond["low"] / 2 + 0.5, wanted[0].permute(1, 2, 0), atol=1e-5)
    assert cond["level"] == 0 and cond["other"] == 1


def test_a_picture_that_is_not_enlarged_keeps_its_size():
    cond = augmented(LOW._replace(enlarged=False), "uniform", 0)
    np.testing.assert_allclose(cond["low"], PICTURE[0] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("noise", "level", "variance"), [("0.3", None, 0.3), ("uniform", 2, 0.36)])
def test_variance_and_level_are_those_asked_for(noise, level, variance):
    grey, black = np.full((1, 32, 32, 3), 127, np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    cond = augmented(LOW, noise, level, grey)
    assert np.var(cond["low"]) == pytest.approx(variance, rel=0.05)
    assert np.mean(augmented(LOW, noise, level, black)["low"]) == pytest.approx(-np.sqrt(1 - variance), abs=0.02)
    assert cond["level"] == 2  # the level whose variance is nearest


def test_levels_that_training_does_not_know_are_refused():
    assert [LOW.levels("uniform"), LOW.levels("0.05")] == [range(4), range(1, 2)]
    assert [LOW.sampling_level("uniform"), LOW.sampling_level("0.05"), LOW.sampling_level("uniform", 3)] == [2, 1, 3]
    for noise, level, known in (("0.05", 2, "level 1 alone"), ("uniform", 4, "level 0 to 3")):
        with pytest.raises(ValueError, match=f"noise_level = {level}.*{known}"):
            LOW.sampling_level(noise, level)


def test_shrinking_keeps_shape_and_mean():
    wide = np.repeat(np.repeat(PICTURE[:, :4], 4, 1), 4, 2)
    small = shrink(wide, 4)
    assert small.shape == (1, 4, 8, 3)
    assert abs(small.astype(float).mean() - wide.mean()) < 2
    np.testing.assert_array_equal(shrink(np.full((2, 8, 12, 3), 77, np.uint8), 4), np.full((2, 2, 3, 3), 77))


def test_cuts_reach_every_edge_and_depend_on_seed_name_and_place():
    numbers = np.arange(6 * 9, dtype=np.uint8).reshape(1, 6, 9, 1).repeat(3, -1)
    sizes = np.zeros((1, 2), np.int32)
    place = {}
    for seed in range(60):
        (square,) = cut(Examples(numbers, ("",), ("a",), sizes, sizes), 5, seed).images
        top, left = divmod(int(square[0, 0, 0]), 9)
        np.testing.assert_array_equal(square, numbers[0, top : top + 5, left : left + 5])
        place[seed] = top, left
    assert set(place.values()) == {(top, left) for top in range(2) for left in range(5)}
    both = Examples(numbers.repeat(20, 0), ("",) * 20, ("a",) * 10 + ("b",) * 10, sizes.repeat(20, 0), sizes)
    first = [tuple(square[0, 0]) for square in cut(both, 5, 0).images]
    assert len(set(first[:10])) > 1 and first[:10] != first[10:]
    assert [tuple(square[0, 0]) for square in cut(both, 5, 0).images] == first
    with pytest.raises(ValueError, match="sr_crop = 7: the examples have 9 x 6 pixels"):
        cut(both, 7, 0)
