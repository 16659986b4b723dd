"""The command `sit`: exact codes, folders with broken files, nothing lost or overwritten."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import SAMPLING, TOKENIZERS, model_of, save_generator, tokenizer_of

from sitlib.cli import images, main
from sitlib.cli.images import codes_digest
from sitlib.data import decode_image
from sitlib.files import read_metadata, save_model
from sitlib.metrics import lpips_per_image, networks
from sitlib.metrics.networks import cached_lpips
from sitlib.model.tiling import decode_codes, encode_image, pad
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.applications import edit, upsample
from sitlib.sample.generate import generate
from sitlib.train.codebooks import take_over_codes
from workbook.profile import load_profile


def pixels(path):
    return np.asarray(Image.open(path))


def assert_shows(path, image):
    """A file holds an image [3, H, W] in [0, 1], but for rounding to 8 bits."""
    expected = image.permute(1, 2, 0).numpy() * 255
    assert pixels(path).shape == expected.shape and np.abs(pixels(path) - expected).max() < 0.51


def files_below(folder):
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


# -- codes of images ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant, scales", [("sit5_sc", [1, 3, 5]), ("sit4", [4])])
def test_decoded_codes_are_the_reconstruction_to_the_bit(photos, variant, scales):
    tokenizer, listed = tokenizer_of(variant), ",".join(map(str, scales))
    assert main(["encode", "photos", "-o", "codes", "--tokenizer", variant]) == 0
    assert files_below("codes") == ["a.safetensors", "below/b.safetensors"]
    assert main(["decode", "codes", "--scales", listed]) == 0  # by the tokenizer that codes name
    assert main(["reconstruct", "photos", "--tokenizer", variant, "--scales", listed]) == 0
    names = files_below("decoded")
    assert names == files_below("reconstructed") and len(names) == 2 * len(scales)
    for name in names:
        assert (pixels(f"decoded/{name}") == pixels(f"reconstructed/{name}")).all()
    codes = encode_image(tokenizer, decode_image("photos/a.png")[None] / 255)
    for name, number in zip(names, scales, strict=False):
        assert_shows(f"decoded/{name}", decode_codes(tokenizer, codes, number)[0])
    metadata = read_metadata("codes/a.safetensors")
    name = f"tokenizer/{variant}-seed0"
    assert metadata["tokenizer"] == {"name": name, "codes": codes_digest(tokenizer)}
    assert (metadata["class"], metadata["size"]) == ("Codes", [70, 150])
    assert Path("codes/a.safetensors").stat().st_size < 2 * 5 * 8 * 12 + 800  # two bytes a code


def test_the_table_of_reconstructions_and_the_images_side_by_side(photos, capsys):
    assert main(["reconstruct", "photos/a.png", "--scales", "2,5", "--compare"]) == 0
    header, small, large, beside = capsys.readouterr().out.splitlines()
    assert beside == "side by side: reconstructed/a-compare.png"
    assert header.split() == ["size", "scales", "codes", "bits/px", "PSNR,", "dB", "file"]
    size, scales, codes, bits, psnr, file = large.split()
    assert (size, scales, codes, file) == ("150x70", "5", "480", "reconstructed/a-scales5.png")
    # Six squares of 16 tokens in scales of 64, 32, 64, 16 and 4 codes.
    assert float(bits) == pytest.approx(6 * 16 * (6 + 5 + 6 + 4 + 2) / (70 * 150), abs=1e-3)
    error = (pixels(file) / 255.0 - pixels("photos/a.png") / 255.0) ** 2
    assert float(psnr) == pytest.approx(-10 * np.log10(error.mean()), abs=0.05)
    size, _, _, _, psnr, file = small.split()
    averaged = F.avg_pool2d(pad(decode_image("photos/a.png")[None] / 255, 64), 8)
    error = (pixels(file) / 255.0 - averaged[0, :, :9, :19].permute(1, 2, 0).numpy()) ** 2
    assert size == "19x9" and float(psnr) == pytest.approx(-10 * np.log10(error.mean()), abs=0.05)
    row = pixels("reconstructed/a-compare.png")
    assert row.shape == (210, 3 * 450 + 2 * 8, 3)
    assert (row[1::3, 1:450:3] == pixels("photos/a.png")).all()
    assert (row[1::3, 917::3] == pixels("reconstructed/a-scales5.png")).all()
    assert main(["reconstruct", "photos/a.png", "--scales", "all", "-o", "all"]) == 0
    assert files_below("all") == [f"a-scales{scales}.png" for scales in range(1, 6)]


def test_lpips_is_shown_where_its_weights_are(weights_folder, photos, monkeypatch, capsys):
    monkeypatch.setattr(networks, "cached_lpips", cached_lpips)
    assert main(["reconstruct", "photos/a.png"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    pair = (decode_image(f"{folder}/a.png")[None] / 255 for folder in ("reconstructed", "photos"))
    assert header.split()[-2] == "LPIPS"
    assert row.split()[-2] == f"{lpips_per_image(*pair).item():.3f}"
    monkeypatch.setattr(images, "LARGEST_LPIPS", 150 * 70 - 1)
    assert main(["reconstruct", "photos/a.png", "--overwrite"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2] == "-"


def test_a_second_decoder_reads_the_codes_of_the_first(photos):
    main(["encode", "photos/a.png", "-o", "a.safetensors"])
    second = SpectralTokenizer(load_profile("smoke").tokenizer_variant("sit5_sc_second"))
    take_over_codes(second, tokenizer_of("sit5_sc"))
    save_model("second.safetensors", second)
    assert main(["decode", "a.safetensors", "--tokenizer", "second.safetensors"]) == 0


# -- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, count, columns", [("class", 8, 4), ("text", 5, 3)])
def test_samples_are_those_of_generate(home, kind, count, columns, monkeypatch):
    monkeypatch.setattr("sitlib.cli.sample.BATCH", 2)
    prompt, stem = {"class": ("water", "water"), "text": ("A red bird!", "a-red-bird")}[kind]
    options = shlex.split("--seed 3 --guidance 2.5 --temperature 0.8 --top-p 0.9 --grid")
    assert main(["sample", f"--{kind}", prompt, "--count", str(count), *options]) == 0
    names = [f"{stem}-seed3-{index}.png" for index in range(count)]
    assert files_below("samples") == [*names, f"{stem}-seed3-grid.png"]
    variant = TOKENIZERS[kind]
    sampling = replace(SAMPLING[kind], seed=3, guidance=2.5, temperature=0.8, top_p=0.9)
    prompts = torch.full((count,), 1) if kind == "class" else [prompt] * count
    drawn = tokenizer_of(variant).decode(generate(model_of(kind, variant), prompts, sampling))
    for name, image in zip(names, drawn, strict=True):
        assert_shows(f"samples/{name}", image)
    grid = pixels(f"samples/{stem}-seed3-grid.png")
    assert grid.shape == (130, 66 * columns - 2, 3)
    assert (grid[66:, :64] == pixels(f"samples/{names[columns]}")).all()
    assert (grid[66:, -64:] == 255).all() == (count < 2 * columns)


def test_a_masked_model_takes_a_number_of_passes(home):
    save_generator(home / "masked.safetensors", "class", "sit5_sc", masked=True)
    options = ["--model", "masked.safetensors", "--steps-per-scale", "2", "-o", "x.png"]
    assert main(["sample", "--class", "water", *options]) == 0
    sampling = replace(SAMPLING["class"], steps_per_scale=2)
    codes = generate(model_of("class", masked=True), torch.tensor([1]), sampling)
    assert_shows("x.png", tokenizer_of().decode(codes)[0])


def test_a_preview_is_small_and_the_checkpoint_says_how_to_sample(home):
    assert main(["sample", "--class", "water", "--scales", "2", "-o", "small.png"]) == 0
    codes = generate(model_of("class"), torch.tensor([1]), SAMPLING["class"])
    assert_shows("small.png", tokenizer_of("sit5_sc").decode(codes, 2)[0])


def test_upsampling_and_editing_are_those_of_the_library(photos, capsys):
    sampling, pair = replace(SAMPLING["class"], seed=4), (model_of("class"), tokenizer_of())
    small, large = (decode_image(f"{size}.png")[None] / 255 for size in (8, 64))
    cities = torch.full((2,), 2)
    expected = {
        "upsampled/8": upsample(*pair, small.expand(2, -1, -1, -1), cities, sampling).images,
        "edited/64": edit(*pair, large.expand(2, -1, -1, -1), cities, 3, sampling).images,
    }
    shared = ["--class", "city", "--count", "2", "--seed", "4"]
    assert main(["upsample", "8.png", *shared]) == 0
    assert main(["edit", "64.png", "--keep", "3", *shared]) == 0
    for name, drawn in expected.items():
        assert not torch.equal(*drawn)
        for index, image in enumerate(drawn):
            assert_shows(f"{name}-{index}.png", image)
    assert main(["edit", "64.png", "--keep", "5", "-o", "same.png"]) == 0  # nothing is drawn
    assert main(["reconstruct", "64.png", "-o", "whole.png"]) == 0
    assert (pixels("same.png") == pixels("whole.png")).all()
    capsys.readouterr()  # of other sizes the center is taken; as 8 px it is the file of 8 px
    assert main(["edit", "photos/a.png", "--text", "a red bird", "-o", "square.png"]) == 0
    assert pixels("square.png").shape == (64, 64, 3)
    assert "square.png: 150x70 -> 64x64 -> 64x64" in capsys.readouterr().out
    assert main(["upsample", "64.png", "--size", "8", "-o", "x.png"]) == 0
    assert main(["upsample", "8.png", "-o", "y.png"]) == 0
    assert np.abs(pixels("x.png").astype(int) - pixels("y.png")).mean() < 8


# -- refusals ----------------------------------------------------------------------------------

REFUSED = {
    "sample --class water --temperature 0": (2, "temperature must be greater than 0"),
    "sample --class water --temperature 1e-40": (2, "temperature must be greater than 0"),
    "sample --class water --steps-per-scale 2": (2, "ar_sit5_sc draws code after code"),
    "sample --class water --count 2 -o x.png": (2, "several will be written"),
    "reconstruct photos -o x.png": (2, "names one file, but there are 2 inputs"),
    "upsample photos/a.png --size 100": (2, "is none of [4, 8, 16, 32]"),
    "reconstruct photos/a.png -o x.hdf": (2, "-o x.hdf: HDF5 save handler not installed"),
    "reconstruct photos/a.png -o x.ico": (2, "-o x.ico: give a file such as name.png"),
    "encode photos/a.png -o x.png": (2, "give a file such as name.safetensors, or x.png/"),
    "decode codes.safetensors -o -": (2, "give a file such as name.png"),
    "encode photos --tokenizer sit44": (1, "did you mean 'sit4'?"),
    "encode photos --tokenizer ../models/autoregressive/ar_sit5_sc-seed0": (1, "not Spectral"),
    "sample --class water --tokenizer sit4": (1, "the codes of another tokenizer"),
    "sample --class watr": (1, "it knows mountain, water, city (did you mean 'water'?)"),
    "sample --class x --model ar_captioned_sit4_sc": (1, "draws texts, not classes"),
    "sample --text ' '": (1, "is empty"),
    "reconstruct photos/a.png --scales 6": (1, "it has 5 scales, not 6"),
    "reconstruct photos/a.png --tokenizer sit4 --scales 2": (1, "cannot be decoded alone"),
    "upsample 8.png --model ar_sit4.safetensors": (1, "of one size only"),
    "encode loop.png": (1, "loop.png: there is no such file"),
    "encode ~no-one/a.png": (1, "~no-one/a.png: there is no such file"),
    "encode photos -o ''": (2, "argument -o/--output: is empty"),
    "encode torn.safetensors -o torn.safetensors": (1, "sit: torn.safetensors is no image"),
    "sample --class water --guidance 1e38": (2, "guidance must be less than"),
    "encode nothing.png": (1, "nothing.png: there is no such file"),
    "encode empty": (1, "In empty no file's name ends in"),
    "reconstruct photos -o photos --overwrite": (1, "would replace an input"),
    "decode ../models/tokenizer/sit4-seed0/model.safetensors": (1, "it holds SpectralTokenizer"),
    "decode torn.safetensors": (1, "sit: torn.safetensors is not a whole safetensors file"),
    "encode torn.safetensors": (1, "torn.safetensors: it cannot be decoded (cannot identify image"),
    "encode photos --tokenizer photos": (1, "sit: photos holds no model.safetensors."),
    "describe empty": (1, "holds no model.safetensors, only model.bin: safetensors alone are"),
    "decode codes.safetensors --tokenizer sit4": (1, "tokenizer/sit4-seed0 has other weights"),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_refused_is_told_in_a_sentence_and_nothing_is_written(photos, capsys, arguments):
    code, sentence = REFUSED[arguments]
    (photos.parent / "empty").mkdir()
    Path("empty/model.bin").touch()
    Path("loop.png").symlink_to("loop.png")
    Path("torn.safetensors").write_bytes(b"no tensors")
    if "codes." in arguments:
        main(["encode", "8.png", "-o", "codes.safetensors"])
    if "ar_sit4" in arguments:
        save_generator(Path("ar_sit4.safetensors").absolute(), "class", "sit4")
    before = files_below(photos.parent)
    assert main(shlex.split(arguments)) == code
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said and "Traceback" not in said, said
    assert files_below(photos.parent) == before


def test_without_models_it_is_told_how_to_train_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["encode", "photo.png"]) == main(["sample", "--class", "x", "--model", "ar_sit4"]) == 1
    )
    assert capsys.readouterr().err.count("make repro trains the workbook's") >= 1


def test_a_checkpoint_is_described(home, capsys):
    assert main(["describe", "sit5_sc"]) == main(["describe", "ar_captioned_sit4_sc"]) == 0
    said = capsys.readouterr().out
    assert "5 scales of 16, 80 in all" in said
    assert "sizes       4, 8, 16, 32, 64 px; others in tiles" in said
    assert "draws       texts" in said and "top_p=0.9" in said
    assert main(["describe", "paper"]) == 1
    assert "there is captioned_sit4_sc, sit4, sit5_sc" in capsys.readouterr().err
