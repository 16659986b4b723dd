"""Degraded copies of images."""

import pytest
import torch

from sitlib.data import degraded


@pytest.fixture
def images():
    torch.manual_seed(0)
    smooth = torch.rand(24, 3, 8, 8)
    return torch.nn.functional.interpolate(smooth, (32, 48), mode="bicubic").clamp(0, 1)


def test_every_copy_is_worse_but_still_like_its_original(images):
    worse = degraded(images, seed=3)
    assert worse.shape == images.shape and worse.dtype == torch.float32
    assert worse.min() >= 0 and worse.max() <= 1
    error = (worse - images).square().mean(dim=(1, 2, 3))
    assert (error > 1e-5).all()
    among = (worse[:, None] - images[None]).square().mean(dim=(2, 3, 4))
    assert torch.equal(among.argmin(1), torch.arange(len(images)))


def test_copies_follow_from_the_seed_and_their_place_alone(images):
    worse = degraded(images, seed=3)
    assert torch.equal(degraded(images, seed=3), worse)
    assert torch.equal(degraded(images[:5], seed=3), worse[:5])
    assert not torch.equal(degraded(images, seed=4), worse)
    same = degraded(images[:1].expand(8, -1, -1, -1), seed=0)
    assert len({tuple(x.flatten()[:50].tolist()) for x in same}) == 8  # each in its own way
