"""The diffusion model: its loss and sampler against known answers."""

import pytest
import torch
import torch.nn.functional as F
from tiny import fresh_generator

from sitlib.files import load_model, save_model
from workbook.diffusion import DiffusionConfig, DiffusionModel

LABELS = torch.tensor([0, 1, 0, 1, 1])


@pytest.fixture
def model():
    shape = fresh_generator(layers=1).config.transformer
    torch.manual_seed(0)
    return DiffusionModel(DiffusionConfig(shape, 2, 4, 3, ["a", "b"])).eval()


def test_the_loss_of_an_untrained_model_is_the_variance_of_the_velocity(model):
    vectors = F.normalize(torch.randn(256, 2, 4, 3), dim=-1)
    noise, time = torch.randn(256, 2, 4, 3), torch.rand(256)
    loss = model.loss(vectors, torch.zeros(256).long(), noise, time)
    assert loss.mean().item() == pytest.approx(2.0, abs=0.15)  # of data and noise 1 each


@pytest.mark.parametrize("steps", [1, 7])
def test_a_constant_velocity_is_followed_to_its_end(model, steps):
    velocity = torch.tensor([3.0, -2.0, 1.0])
    model.to_velocity.bias.data.copy_(velocity)
    drawn = model.sample(LABELS[:3], steps=steps, guidance=2.0, seed=5)
    seeds = [torch.Generator().manual_seed((5 << 32) + i) for i in range(3)]
    start = torch.stack([torch.randn(2, 4, 3, generator=seed) for seed in seeds])
    torch.testing.assert_close(drawn, F.normalize(start + velocity, dim=-1), atol=1e-5, rtol=0)


def test_samples_do_not_depend_on_their_batch_and_guidance_one_is_none(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole = model.sample(LABELS, steps=3, guidance=1.5, seed=1)
    parts = model.sample(LABELS, steps=3, guidance=1.5, seed=1, batch_size=2)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, model.sample(LABELS, 3, 1.0, 1), atol=1e-3)
    alone = model(whole, torch.full((5,), 0.5), LABELS)
    torch.testing.assert_close(model.guided_velocity(whole, 0.5, LABELS, 1.0), alone)


def test_it_learns_two_points_and_loads_from_its_file(model, tmp_path):
    rng = torch.Generator().manual_seed(3)
    points = F.normalize(torch.randn(2, 2, 4, 3, generator=rng), dim=-1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        labels = torch.randint(2, (64,), generator=rng)
        noise, time = torch.randn(64, 2, 4, 3, generator=rng), torch.rand(64, generator=rng)
        optimizer.zero_grad()
        model.loss(points[labels], labels, noise, time).mean().backward()
        optimizer.step()
    labels = torch.tensor([0, 1] * 8)
    drawn = model.sample(labels, steps=20, guidance=1.0, seed=0)
    assert (drawn * points[labels]).sum(-1).mean() > 0.9  # cosine
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors", DiffusionModel)
    assert torch.equal(again.sample(labels, 20, 1.0, 0), drawn)
