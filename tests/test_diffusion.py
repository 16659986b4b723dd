"""The diffusion model: its loss and sampler against known answers."""

import pytest
import torch
import torch.nn.functional as F

from sitlib.files import load_model, save_model
from workbook.diffusion import DiffusionConfig, DiffusionModel, FlowConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiffusionModel(
        FlowConfig(DiffusionConfig(1, 16, 2, 2.0, 0.0, 0.1), 2, 4, 3, ["a", "b"])
    ).eval()


def test_the_loss_of_an_untrained_model_is_the_variance_of_the_velocity(model):
    vectors = F.normalize(torch.randn(256, 2, 4, 3), dim=-1)
    noise, time = torch.randn(256, 2, 4, 3), torch.rand(256)
    loss = model.loss(vectors, torch.zeros(256, dtype=torch.int64), noise, time)
    assert loss.mean().item() == pytest.approx(
        2.0, abs=0.15
    )  # it says 0; data and noise have variance 1 each


def test_a_constant_velocity_is_followed_to_its_end(model):
    """With velocity c everywhere, x(1) = x(0) + c, whatever the number of steps."""
    with torch.no_grad():
        model.to_velocity.bias.copy_(torch.tensor([3.0, -2.0, 1.0]))
    labels = torch.tensor([0, 1, 1])
    found = [model.sample(labels, steps=steps, guidance=2.0, seed=5) for steps in (1, 7)]
    start = torch.stack(
        [
            torch.randn(2, 4, 3, generator=torch.Generator().manual_seed((5 << 32) + i))
            for i in range(3)
        ]
    )
    expected = F.normalize(start + torch.tensor([3.0, -2.0, 1.0]), dim=-1)
    for drawn in found:
        assert torch.allclose(drawn, expected, atol=1e-5)


def test_samples_do_not_depend_on_their_batch_and_guidance_one_is_none(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    labels = torch.tensor([0, 1, 0, 1, 1])
    whole = model.sample(labels, steps=3, guidance=1.5, seed=1)
    assert torch.allclose(
        whole, model.sample(labels, steps=3, guidance=1.5, seed=1, batch_size=2), atol=1e-5
    )
    assert not torch.allclose(whole, model.sample(labels, steps=3, guidance=1.0, seed=1), atol=1e-3)
    assert torch.allclose(
        model.guided_velocity(whole, 0.5, labels, 1.0),
        model(whole, torch.full((5,), 0.5), labels),
    )


def test_it_learns_two_points_and_opens_from_its_file(model, tmp_path):
    points = F.normalize(
        torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(3)), dim=-1
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        labels = torch.randint(2, (64,), generator=generator)
        noise = torch.randn(64, 2, 4, 3, generator=generator)
        loss = model.loss(points[labels], labels, noise, torch.rand(64, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.tensor([0, 1] * 8)
    drawn = model.sample(labels, steps=20, guidance=1.0, seed=0)
    cosine = (drawn * points[labels]).sum(-1).mean()
    assert cosine > 0.9
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors", DiffusionModel)
    assert torch.equal(
        again.sample(labels, steps=2, guidance=1.0, seed=0),
        model.sample(labels, steps=2, guidance=1.0, seed=0),
    )
