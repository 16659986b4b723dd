"""The discriminator's parts against independent references, its spectral norm, and that it learns."""

import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch import nn

from sitlib.train.config import AdversarialConfig
from sitlib.train.discriminator import (
    Discriminator,
    _batch_deviation,
    _Halve,
    adversarial_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)

CONFIG = AdversarialConfig(
    weight=0.1, start=10, warmup=5, ramp=20, channels=4, learning_rate=1e-3, r1=0.5, r1_every=16
)


def weighted_layers(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def singular_values(weight):
    return torch.linalg.svdvals(weight.detach().flatten(1))


# -- architecture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "last_side"), [(8, 4), (16, 4), (24, 6), (40, 5), (64, 4), (96, 6), (128, 4)]
)
def test_any_multiple_of_8_gives_one_logit_per_image(size, last_side):
    torch.manual_seed(0)
    model = Discriminator(size, 2)
    assert size // 2 ** len(model.blocks) == last_side
    for batch in (1, 3):
        for mode in (True, False):
            logits = model.train(mode)(torch.rand(batch, 3, size, size))
            assert logits.shape == (batch,) and logits.isfinite().all()


@pytest.mark.parametrize("size", [0, 4, 12, 50])
def test_sizes_that_cannot_be_halved_are_refused(size):
    with pytest.raises(ValueError, match=f"multiple of 8, not {size}"):
        Discriminator(size, 4)


def test_images_of_another_shape_are_refused():
    model = Discriminator(16, 2)
    for shape in ((2, 3, 16, 8), (2, 1, 16, 16), (3, 16, 16), (2, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"takes images \[B, 3, 16, 16\]"):
            model(torch.rand(shape))


def test_halving_is_the_binomial_filter_and_removes_what_would_alias():
    torch.manual_seed(0)
    halve = _Halve().double()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    filtered = halve(x)
    taps = np.array([1, 3, 3, 1]) / 8
    for image, result in zip(x.flatten(0, 1), filtered.flatten(0, 1), strict=True):
        expected = scipy.signal.convolve2d(
            np.pad(image.numpy(), 1), np.outer(taps, taps), mode="valid"
        )
        np.testing.assert_allclose(result.numpy(), expected[::2, ::2], atol=1e-12)
    stripes = (
        torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8).double()
    )  # the highest frequency
    assert halve(stripes)[..., 1:-1].abs().max() < 1e-12
    torch.testing.assert_close(
        halve(torch.ones_like(stripes))[..., 1:-1, 1:-1], torch.ones_like(stripes[..., :2, :2])
    )


def test_batch_deviation_is_the_mean_deviation_of_every_feature_and_smooth_for_equal_images():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 3)
    expected = np.mean(
        [np.std(x[:, c, i, j].numpy()) for c in range(2) for i in range(3) for j in range(3)]
    )
    deviation = _batch_deviation(x)
    assert deviation.shape == (5, 1, 3, 3)
    np.testing.assert_allclose(deviation.numpy(), expected, rtol=1e-5)
    same = torch.ones(4, 2, 3, 3, requires_grad=True)
    _batch_deviation(same).sum().backward()
    assert same.grad.isfinite().all()
    torch.testing.assert_close(_batch_deviation(x[:1]), torch.full((1, 1, 3, 3), 1e-4))


# -- spectral norm ---------------------------------------------------------------------------------


def test_every_layer_starts_with_equal_singular_values_of_1():
    torch.manual_seed(0)
    for layer in weighted_layers(Discriminator(32, 4)):
        values = singular_values(layer.weight)
        torch.testing.assert_close(values, torch.ones_like(values))


def test_spectral_norm_of_every_layer_comes_to_1_whatever_its_weights():
    torch.manual_seed(0)
    model = Discriminator(32, 4)
    layers = weighted_layers(model)
    for layer in layers:
        original = layer.parametrizations.weight.original
        original.data = 3 * torch.randn_like(original)
        assert singular_values(original)[0] > 2
    for _ in range(60):
        model(torch.rand(2, 3, 32, 32))
    norms = torch.stack([singular_values(layer.weight)[0] for layer in layers])
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=0.02, rtol=0)


# -- gradient penalty ------------------------------------------------------------------------------


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
    penalty = gradient_penalty(model, images)
    torch.testing.assert_close(penalty, (model.w + images).flatten(1).norm(dim=1).square().mean())
    penalty.backward()
    torch.testing.assert_close(model.w.grad, 2 * (model.w + images.mean(0)).detach())
    assert images.grad is None and not images.requires_grad


def test_gradient_penalty_through_spectral_norm_agrees_with_finite_differences():
    torch.manual_seed(0)
    model, images = Discriminator(8, 2).double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for layer in weighted_layers(model):
        layer.parametrizations.weight.original.data.normal_()
    for _ in range(5):
        model(images)
    model.eval()  # the vectors of the power iteration rest: they are constants to the gradient
    step, squares = 1e-6, 0.0
    with torch.no_grad():
        for index in range(images.numel()):
            shift = torch.zeros(images.numel(), dtype=torch.float64)
            shift[index] = step
            up, down = (model(images + sign * shift.view_as(images)).sum() for sign in (1, -1))
            squares += float((up - down) / (2 * step)) ** 2
    penalty = gradient_penalty(model, images)
    assert penalty.item() == pytest.approx(squares / len(images), rel=1e-5)

    penalty.backward()
    for layer in weighted_layers(model):
        weight = layer.parametrizations.weight.original
        direction = torch.randn_like(weight)
        slope, start, values = float((weight.grad * direction).sum()), weight.data.clone(), []
        for sign in (1, -1):
            weight.data = start + sign * step * direction
            values.append(gradient_penalty(model, images).item())
        weight.data = start
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_gradient_penalty_trains_every_weight_in_training_mode_and_under_autocast():
    torch.manual_seed(0)
    model, images = Discriminator(16, 4), torch.rand(3, 3, 16, 16)
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = discriminator_loss(model(images), model(images)) + gradient_penalty(
                model, images
            )
        loss.backward()
        for layer in weighted_layers(model):
            gradient = layer.parametrizations.weight.original.grad
            assert gradient.isfinite().all() and gradient.abs().sum() > 0


# -- losses and schedule ---------------------------------------------------------------------------


def test_losses_are_the_logistic_ones():
    torch.manual_seed(0)
    real, fake = 3 * torch.randn(6, dtype=torch.float64), 3 * torch.randn(4, dtype=torch.float64)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = np.mean([-math.log(sigmoid(x)) for x in real]) + np.mean(
        [-math.log(1 - sigmoid(x)) for x in fake]
    )
    assert float(discriminator_loss(real, fake)) == pytest.approx(expected)
    assert float(generator_loss(fake)) == pytest.approx(
        np.mean([-math.log(sigmoid(x)) for x in fake])
    )


def test_pixels_that_overshoot_have_a_gradient():
    torch.manual_seed(0)
    images = (3 * torch.rand(2, 3, 16, 16) - 1).requires_grad_()
    generator_loss(Discriminator(16, 4)(images)).backward()
    assert (images.grad[(images < 0) | (images > 1)] != 0).all()


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 0), (10, 0), (14, 0), (15, 0), (16, 0.005), (25, 0.05), (35, 0.1), (10_000, 0.1)],
)
def test_weight_is_0_through_the_warmup_and_then_ramps_up(step, weight):
    assert adversarial_weight(step, CONFIG) == pytest.approx(weight)


def test_it_learns_to_tell_sharp_images_from_blurred_ones():
    torch.manual_seed(0)

    def batch():
        sharp = F.interpolate(torch.rand(16, 3, 8, 8), 16)  # blocks with hard edges
        return sharp, F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="reflect"), 3, stride=1)

    model = Discriminator(16, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.0, 0.99), weight_decay=0.0)
    for _ in range(60):
        real, fake = batch()
        optimizer.zero_grad()
        discriminator_loss(model(real), model(fake)).backward()
        optimizer.step()
    real, fake = batch()
    with torch.no_grad():
        real, fake = model.eval()(real), model(fake)
    assert (real > 0).float().mean() > 0.9 and (fake < 0).float().mean() > 0.9


def test_without_spectral_norm_weights_are_plain_and_may_have_any_size():
    torch.manual_seed(0)
    model = Discriminator(16, 2, normalized=False)
    assert not any("parametrizations" in name for name in model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    before = model(images)
    with torch.no_grad():
        model.logit.weight.mul_(10)
        model.logit.bias.zero_()
    assert torch.allclose(model(images), 10 * before, rtol=1e-4)  # the norm would have undone it


def test_images_that_are_alike_have_finite_gradients_in_half_precision_too():
    x = torch.ones(4, 2, 3, 3, dtype=torch.float16, requires_grad=True)
    deviation = _batch_deviation(x)
    deviation.sum().backward()
    assert deviation.dtype == torch.float16 and torch.isfinite(x.grad).all()
