"""LPIPS as a loss: distances of photographs, gradients, frozen parameters, bad input."""

import warnings

import lpips
import pytest
import torch
from skimage import data

from sitlib.metrics.perceptual import load_lpips
from sitlib.metrics.weights import ALEXNET, load_weights


@pytest.fixture(scope="module")
def alex(weights_folder):
    return load_lpips("alex", weights_folder)


@pytest.fixture(scope="module")
def photo():
    """Chelsea the cat, `[1, 3, 64, 64]` in [0, 1]."""
    image = torch.from_numpy(data.chelsea()[100:228, 120:248]).permute(2, 0, 1)[None] / 255
    return torch.nn.functional.avg_pool2d(image, 2)


def test_equals_the_lpips_package_with_the_trunk_copied_in(weights_folder, alex, photo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision: `pretrained` is deprecated
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = load_weights(ALEXNET, weights_folder)
    convolutions = [
        module for module in reference.net.modules() if isinstance(module, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        for index, convolution in zip((0, 3, 6, 8, 10), convolutions, strict=True):
            convolution.weight.copy_(trunk[f"features.{index}.weight"])
            convolution.bias.copy_(trunk[f"features.{index}.bias"])
        expected = reference(2 * photo - 1, 2 * photo.flip(-1) - 1).flatten()
        torch.testing.assert_close(alex(photo, photo.flip(-1)), expected)


def test_orders_distortions_as_eyes_do(alex, photo):
    """Brightening counts less than blur of the same mean squared error; more noise counts more."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(photo.shape, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(photo, 5, 1, 2, count_include_pad=False)
    brighter = photo + (blurred - photo).square().mean().sqrt()
    distances = alex(torch.cat([photo, brighter, blurred]), photo.expand(3, -1, -1, -1))
    assert distances[0] == 0
    assert 5 * distances[1] < distances[2]
    noisy = torch.cat([photo + sigma * noise for sigma in (0.02, 0.05, 0.1, 0.2)])
    assert (alex(noisy, photo.expand(4, -1, -1, -1)).diff() > 0).all()


def test_one_distance_for_each_pair(alex, photo):
    batch = torch.cat([photo, photo.flip(-1), photo.flip(-2)])
    distances = alex(batch, photo.expand(3, -1, -1, -1))
    assert distances.shape == (3,)
    single = torch.cat([alex(image[None], photo) for image in batch])
    torch.testing.assert_close(distances, single, atol=1e-6, rtol=1e-4)


def test_gradient_reaches_the_image_only_and_lowers_the_distance(alex, photo):
    image = (0.5 * photo + 0.25).requires_grad_()
    target = photo.clone().requires_grad_()
    distance = alex(image, target).sum()
    distance.backward()
    assert target.grad is None
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in alex.parameters()
    )
    step = 1e-2 * image.grad / image.grad.norm()
    assert alex(image - step, photo).item() < distance.item()


def test_stays_in_evaluation_mode_inside_a_training_module(alex, photo):
    model = torch.nn.ModuleDict({"perceptual": alex}).train()
    assert not any(module.training for module in alex.modules())
    first, second = (model["perceptual"](photo, photo.flip(-1)) for _ in range(2))
    assert first == second > 0


def test_loading_is_silent_and_draws_no_random_numbers(weights_folder, capfd, recwarn):
    state = torch.get_rng_state()
    load_lpips("vgg", weights_folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    "shape, other, message",
    [
        ((1, 3, 64, 64), (1, 3, 64, 32), "one shape"),
        ((1, 1, 64, 64), (1, 1, 64, 64), "RGB"),
        ((3, 64, 64), (3, 64, 64), "RGB"),
        ((1, 3, 30, 64), (1, 3, 30, 64), "at least 31 px"),
    ],
)
def test_bad_input(alex, shape, other, message):
    with pytest.raises(ValueError, match=message):
        alex(torch.rand(shape), torch.rand(other))


@pytest.mark.parametrize("net, size", [("alex", 31), ("vgg", 16)])
def test_smallest_accepted_size_works(weights_folder, net, size):
    network = load_lpips(net, weights_folder)
    distance = network(torch.zeros(1, 3, size, size), torch.ones(1, 3, size, size))
    assert distance.isfinite() and distance > 0


def test_unknown_network_and_missing_weights(weights_folder, tmp_path):
    with pytest.raises(ValueError, match="alex"):
        load_lpips("resnet", weights_folder)
    with pytest.raises(FileNotFoundError, match=r"python -m sitlib\.weights"):
        load_lpips("alex", tmp_path)
