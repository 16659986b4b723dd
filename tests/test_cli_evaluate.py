"""`sit evaluate`: numbers of plain code, manifests that say what they are of."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, tokenizer_of
from torch.cuda import get_device_name

from sitlib.cli import main
from sitlib.data import held_out_positions, open_images
from sitlib.metrics import psnr_per_image
from sitlib.metrics.weights import WeightsError
from sitlib.model.transformer import best_device
from sitlib.sample.generate import generate
from workbook.paths import ROOT


@pytest.fixture(scope="module")
def home(tmp_path_factory, trained, weights_folder):
    """A folder with models, and eight photographs of three classes; LPIPS has its weights."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(trained)
    source = open_images(ROOT / "data/landscapes", "test")
    for number in range(8):
        folder = home / "photos/test" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = source[number].image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return home


@pytest.fixture
def run(home, monkeypatch):
    """Runs `sit` there; the content of the file that it writes."""
    monkeypatch.chdir(home)

    def run(*arguments):
        assert main(["evaluate", *arguments, "--overwrite"]) == 0
        model, data, *_ = arguments
        return json.loads(Path(f"evaluated/{model}-seed0-{data}.json").read_text())

    return run


def centers(size):
    """The middle squares of the photographs, by Pillow alone; uint8 [8, size, size, 3]."""
    images = [Image.open(path) for path in sorted(Path("photos/test").rglob("*.png"))]
    how = {"box": (128, 0, 384, 256), "reducing_gap": 1.5}
    squares = [image.resize((size, size), Image.Resampling.BICUBIC, **how) for image in images]
    return np.stack([np.asarray(image) for image in squares])


def test_a_tokenizer_is_judged_on_the_middle_of_every_image(run, capsys):
    result = run("sit5_sc", "photos")
    images = torch.from_numpy(centers(64)).permute(0, 3, 1, 2) / 255
    expected = psnr_per_image(tokenizer_of().reconstruct(images), images).mean()
    scores, manifest = result["scores"], result["manifest"]
    assert scores["psnr"] == pytest.approx(float(expected), abs=1e-4)
    assert {"lpips_alex", "lpips_vgg", "ssim", "fd_lite0", "kid", "border"} <= scores.keys()
    assert manifest["device"] == ("cpu" if best_device().type == "cpu" else get_device_name())
    assert manifest["task"] == "reconstructions" and manifest["protocol"]["images"] == 8
    assert manifest["reference"] | {"sha256": ""} == {
        **{"folder": "photos", "split": "test", "kind": "center", "size": 64, "views": 8},
        "resize": "bicubic, antialiased (Pillow, reducing_gap=1.5)",
        **{"photographs": 8, "seed": 0, "sha256": ""},
    }
    table = capsys.readouterr().out
    assert f"{scores['psnr']:.2f}" in table and "evaluated/sit5_sc-seed0-photos.json" in table
    small = run("sit5_sc", "photos", "--size", "32")
    assert small["manifest"]["reference"]["size"] == 32 and "lpips_vgg" not in small["scores"]
    assert small["manifest"]["reference"]["resize"].endswith(", averaged down")


def test_where_nothing_names_splits_all_images_are_judged_unless_one_is_chosen(run, tmp_path):
    for path in Path("photos").rglob("*.png"):
        shutil.copy(path, tmp_path)
    for options, split, count in (([], "all", 8), (["--split", "train"], "train", 7)):
        target = f"{tmp_path.name}.json"
        assert main(["evaluate", "sit4", str(tmp_path), *options, "-o", target, "--overwrite"]) == 0
        reference = json.loads(Path(target).read_text())["manifest"]["reference"]
        assert (reference["split"], reference["photographs"]) == (split, count)


def test_the_hash_is_of_the_pixels_that_were_judged(run):
    first = run("sit5_sc", "photos")["manifest"]["reference"]["sha256"]
    positions = held_out_positions(open_images("photos", "test"), 8, 0)
    pixels = torch.from_numpy(centers(64))[positions].permute(0, 3, 1, 2).contiguous()
    assert first == hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    assert first != run("sit5_sc", "photos", "--kind", "wide")["manifest"]["reference"]["sha256"]


def test_what_was_judged_before_is_kept(run, capsys):
    run("sit4", "photos")
    assert main(["evaluate", "sit4", "photos"]) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["LPIPS", "Inception"])
def test_networks_that_are_missing_are_told_before_anything_is_computed(
    run, monkeypatch, capsys, tmp_path, lacking
):
    def inception():
        raise WeightsError("FID and Inception score need torch-fidelity.")

    monkeypatch.setattr("sitlib.cli.evaluate.generate", None)
    monkeypatch.setattr("sitlib.cli.evaluate.InceptionMetrics", inception)
    arguments, said = ["ar_sit5_sc", "photos", "--inception"], "need torch-fidelity"
    if lacking == "LPIPS":
        monkeypatch.setattr("sitlib.cli.evaluate.open_images", None)
        monkeypatch.setenv("SITLIB_WEIGHTS", str(tmp_path))
        arguments, said = ["sit5_sc", "photos"], "run `sit doctor --fetch`"
    assert main(["evaluate", *arguments, "-o", "missing.json"]) == 1
    assert said in capsys.readouterr().err


def test_a_generator_is_judged_by_samples_of_the_classes_of_the_views(run, monkeypatch):
    drawn = []

    def spy(model, asked, *rest, **options):
        drawn.append((asked, generate(model, asked, *rest, **options)))
        return drawn[-1][1]

    monkeypatch.setattr("sitlib.cli.evaluate.generate", spy)
    result = run("ar_sit5_sc", "photos", "--seed", "3")
    (asked, codes), scores = drawn[0], result["scores"]
    assert sorted(asked.tolist()) == sorted(number % 3 for number in range(8))
    assert len(codes) == 8 and result["manifest"]["protocol"]["sampler"]["seed"] == 3
    assert {"fd_lite0", "kid", "precision", "recall", "to_reconstructions"} <= scores.keys()
    assert scores["to_reconstructions"]["fd_lite0"] != scores["fd_lite0"]


def test_a_photograph_has_one_center_and_only_those_with_a_class_count(run, tmp_path, capsys):
    shutil.copytree("photos", tmp_path / "some")
    loose = tmp_path / "some/test/loose.png"
    shutil.copy(next(Path("photos").rglob("0.png")), loose)
    arguments = [
        "evaluate",
        "ar_sit5_sc",
        str(tmp_path / "some"),
        "-o",
        str(tmp_path / "scores.json"),
    ]
    assert main(arguments) == 0
    reference = json.loads((tmp_path / "scores.json").read_text())["manifest"]["reference"]
    assert (reference["views"], reference["photographs"]) == (8, 8)
    assert main([*arguments, "--views", "9", "--overwrite"]) == 1
    assert "8 of these images can be judged, and each has one center" in capsys.readouterr().err
    assert main([*arguments, "--views", "9", "--kind", "wide", "--overwrite"]) == 0


def test_other_classes_are_refused(run, capsys):
    assert main(["evaluate", "ar_sit5_sc", str(ROOT / "data/landscapes")]) == 1
    assert "It knows mountain, water, city." in capsys.readouterr().err
