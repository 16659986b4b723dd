"""The discriminator's parts against independent references, and that it learns."""

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn

from sitlib.train import discriminator
from sitlib.train.config import AdversarialConfig


def weighted_layers(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def singular_values(weight):
    return torch.linalg.svdvals(weight.detach().flatten(1))


def test_halving_is_the_binomial_filter_and_removes_what_would_alias():
    torch.manual_seed(0)
    halve = discriminator._Halve().double()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    filtered = halve(x)
    taps = np.array([1, 3, 3, 1]) / 8
    for image, result in zip(x.flatten(0, 1), filtered.flatten(0, 1), strict=True):
        padded = np.pad(image.numpy(), 1)
        expected = scipy.signal.convolve2d(padded, np.outer(taps, taps), mode="valid")
        np.testing.assert_allclose(result.numpy(), expected[::2, ::2], atol=1e-12)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8).double()  # as fine as can be
    assert halve(stripes)[..., 1:-1].abs().max() < 1e-12
    flat = halve(torch.ones_like(stripes))[..., 1:-1, 1:-1]
    torch.testing.assert_close(flat, torch.ones_like(flat))


def test_batch_deviation_is_the_mean_deviation_of_every_feature_and_smooth_for_equal_images():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 3)
    expected = np.mean([np.std(values) for values in x.flatten(1).T.numpy()])
    deviation = discriminator._batch_deviation(x)
    assert deviation.shape == (5, 1, 3, 3)
    np.testing.assert_allclose(deviation.numpy(), expected, rtol=1e-5)
    for dtype in (torch.float32, torch.float16):
        same = torch.ones(4, 2, 3, 3, dtype=dtype, requires_grad=True)
        deviation = discriminator._batch_deviation(same)
        deviation.sum().backward()
        assert deviation.dtype == dtype and same.grad.isfinite().all()
    torch.testing.assert_close(
        discriminator._batch_deviation(x[:1]), torch.full((1, 1, 3, 3), 1e-4)
    )


def test_spectral_norm_of_every_layer_is_1_at_first_and_comes_to_1_whatever_its_weights():
    torch.manual_seed(0)
    model = discriminator.Discriminator(32, 4)
    layers = weighted_layers(model)
    for layer in layers:
        values = singular_values(layer.weight)
        torch.testing.assert_close(values, torch.ones_like(values))  # at first
        original = layer.parametrizations.weight.original
        original.data = 3 * torch.randn_like(original)
        assert singular_values(original)[0] > 2
    for _ in range(60):
        model(torch.rand(2, 3, 32, 32))
    norms = torch.stack([singular_values(layer.weight)[0] for layer in layers])
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=0.02, rtol=0)


class Quadratic(nn.Module):
    """logit = w . x + |x|^2 / 2, with gradient w + x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, images):
        return (self.w * images).sum((1, 2, 3)) + images.square().sum((1, 2, 3)) / 2


def test_gradient_penalty_is_the_mean_squared_norm_and_can_be_backpropagated():
    torch.manual_seed(0)
    model, images = Quadratic(), torch.rand(5, 3, 4, 4)
    penalty = discriminator.gradient_penalty(model, images)
    torch.testing.assert_close(penalty, (model.w + images).flatten(1).norm(dim=1).square().mean())
    penalty.backward()
    torch.testing.assert_close(model.w.grad, 2 * (model.w + images.mean(0)).detach())
    assert images.grad is None and not images.requires_grad


def test_losses_are_the_logistic_ones():
    torch.manual_seed(0)
    real, fake = 3 * torch.randn(6, dtype=torch.float64), 3 * torch.randn(4, dtype=torch.float64)
    p_real, p_fake = (1 / (1 + np.exp(-x.numpy())) for x in (real, fake))
    expected = np.mean(-np.log(p_real)) + np.mean(-np.log(1 - p_fake))
    assert float(discriminator.discriminator_loss(real, fake)) == pytest.approx(expected)
    assert float(discriminator.generator_loss(fake)) == pytest.approx(np.mean(-np.log(p_fake)))


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 0), (14, 0), (15, 0), (16, 0.005), (25, 0.05), (35, 0.1), (10_000, 0.1)],
)
def test_weight_is_0_through_the_warmup_and_then_ramps_up(step, weight):
    config = AdversarialConfig(weight=0.1, start=10, warmup=5, ramp=20)
    assert discriminator.adversarial_weight(step, config) == pytest.approx(weight)
