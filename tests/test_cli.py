"""The command `sit`: codes that come back to the bit, folders with broken files, nothing lost or overwritten, refusals in a sentence."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_applications import model_of, photographs, tokenizer_of

from sitlib.cli import build_parser, main, models
from sitlib.cli.codes import codes_digest, decode_codes, encode_image
from sitlib.cli.files import find_sources, plan, write_file
from sitlib.cli.options import UsageError
from sitlib.data import decode_image, open_images
from sitlib.files import read_metadata, save_model
from sitlib.metrics.codebook import bits_per_pixel
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tiling import pad, unpad
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.applications import edit, upsample
from sitlib.sample.generate import generate
from workbook.paths import ROOT
from workbook.profile import load_profile

GENERATORS = {
    "ar_sit5_sc": ("class", "sit5_sc"),
    "ar_captioned_sit4_sc": ("text", "captioned_sit4_sc"),
}


def retold(kind, variant):
    """A tiny model that says of which tokenizer its codes are, as trained ones do."""
    model = model_of(kind, variant)
    config = replace(model.config, transformer=replace(model.config.transformer, tokenizer=variant))
    told = AutoregressiveModel(config)
    told.load_state_dict(model.state_dict())
    return told


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project with tiny untrained models in place of the pipeline's."""
    root = tmp_path_factory.mktemp("project")
    for variant in ("sit5_sc", "sit4", "captioned_sit4_sc"):
        name = f"tokenizer/{variant}-seed0"
        tokenizer_of(variant).save(
            root / f"models/{name}/model.safetensors", name=name, run=variant
        )
    for name, (kind, variant) in GENERATORS.items():
        run = f"autoregressive/{name}-seed0"
        save_model(
            root / f"models/{run}/model.safetensors", retold(kind, variant), name=run, run=name
        )
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("quick", "smoke"))
    return root


@pytest.fixture
def home(root, tmp_path, monkeypatch):
    """An empty working directory, with that project's models, without LPIPS weights."""
    monkeypatch.setattr(models, "resolve", lambda path: root / path)
    monkeypatch.setattr("sitlib.metrics.networks.cached_lpips", missing_weights)
    models.pipeline_profile.cache_clear()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    models.pipeline_profile.cache_clear()


def missing_weights(net):
    raise FileNotFoundError(net)


@pytest.fixture
def photos(home):
    """A folder with two photographs of sides that no tokenizer takes, one of them in a folder below."""
    (home / "photos/below").mkdir(parents=True)
    source = open_images("data/extra", "test")
    for name, box in (("a.png", (0, 0, 150, 70)), ("below/b.png", (30, 40, 100, 105))):
        pixels = source[0].image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).crop(box).save(home / "photos" / name)
    return home / "photos"


def pixels(path):
    return np.asarray(Image.open(path))


def files_below(folder):
    return sorted(
        str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()
    )


# -- codes of images -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["sit5_sc", "sit4"])
def test_decoded_codes_are_the_reconstruction_to_the_bit(photos, tokenizer):
    assert main(["encode", "photos", "-o", "codes", "--tokenizer", tokenizer]) == 0
    assert files_below("codes") == ["a.safetensors", "below/b.safetensors"]
    assert main(["decode", "codes"]) == 0  # with the tokenizer that the codes name
    assert main(["reconstruct", "photos", "--tokenizer", tokenizer]) == 0
    for name in ("a.png", "below/b.png"):
        assert (pixels(f"decoded/{name}") == pixels(f"reconstructed/{name}")).all()
    # ... which is that of the README, written to 8 bits.
    padded, size = pad(decode_image("photos/a.png")[None] / 255, 64)
    expected = unpad(tokenizer_of(tokenizer).reconstruct(padded), size)[0].permute(1, 2, 0) * 255
    assert pixels("decoded/a.png").shape == (70, 150, 3)
    assert np.abs(pixels("decoded/a.png") - expected.numpy()).max() < 0.51


def test_a_codes_file_says_what_it_is(photos):
    main(["encode", "photos/a.png", "-o", "a.safetensors"])
    about = read_metadata(Path("a.safetensors").absolute())
    digest = codes_digest(tokenizer_of("sit5_sc"))
    assert about["tokenizer"] == {
        "name": "tokenizer/sit5_sc-seed0",
        "run": "sit5_sc",
        "codes": digest,
    }
    assert (about["class"], about["size"], about["token_grid"]) == ("Codes", [70, 150], [8, 12])
    assert Path("a.safetensors").stat().st_size < 2 * 5 * 8 * 12 + 800  # two bytes a code


@pytest.mark.parametrize("scales", [1, 3, 4])
def test_few_scales_give_the_small_image(photos, scales):
    main(["encode", "photos/a.png", "-o", "codes"])
    assert main(["decode", "codes/a.safetensors", "--scales", str(scales)]) == 0
    small = pixels("decoded/a.png")
    factor = 2 ** (5 - scales)
    assert small.shape[:2] == (-(-70 // factor), -(-150 // factor))
    padded, _ = pad(decode_image("photos/a.png")[None] / 255, 64)
    expected = tokenizer_of("sit5_sc").reconstruct(padded, scales)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(small - expected[: small.shape[0], : small.shape[1]]).max() < 0.51


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (16, 9), (64, 64), (65, 20)])
def test_images_of_any_size_have_codes_of_the_smallest_square_that_holds_them(size):
    image = torch.rand(1, 3, *size, generator=torch.manual_seed(0))
    tokenizer = tokenizer_of("sit5_sc")
    coded = encode_image(tokenizer, image)
    assert decode_codes(tokenizer, coded).shape == image.shape
    side = next((side for side in (4, 8, 16, 32, 64) if side >= max(size)), 64)
    assert len(coded.codes) == (4, 8, 16, 32, 64).index(side) + 1
    assert torch.equal(coded.codes[None], tokenizer.encode(pad(image, side)[0]))


def test_more_squares_than_a_batch_holds_are_put_together_again(monkeypatch):
    tokenizer = tokenizer_of("sit5_sc")
    image = (
        torch.cat([photographs(4), photographs(4).flip(3)]).transpose(0, 1).reshape(1, 3, 128, 256)
    )
    whole = encode_image(tokenizer, image)
    monkeypatch.setattr("sitlib.cli.codes.BATCH", 3)
    parts = encode_image(tokenizer, image)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(
        whole.codes[None], tokenizer.encode(image)
    )
    found = decode_codes(tokenizer, parts)
    torch.testing.assert_close(found, tokenizer.reconstruct(image), atol=1e-5, rtol=0)


def test_the_table_of_reconstructions_and_the_images_side_by_side(photos, capsys):
    assert main(["reconstruct", "photos/a.png", "--scales", "2,5", "--compare"]) == 0
    header, small, large, beside = capsys.readouterr().out.splitlines()
    assert beside == "side by side: reconstructed/a-compare.png"
    assert header.split() == ["size", "scales", "codes", "bits/px", "PSNR,", "dB", "file"]
    size, scales, codes, bits, psnr, file = large.split()
    assert (size, scales, codes, file) == ("150x70", "5", "480", "reconstructed/a-scales5.png")
    assert float(bits) == pytest.approx(bits_per_pixel(480, 64, (70, 150)), abs=1e-3)
    error = (pixels(file) / 255.0 - pixels("photos/a.png") / 255.0) ** 2
    assert float(psnr) == pytest.approx(-10 * np.log10(error.mean()), abs=0.05)
    size, _, _, _, psnr, file = small.split()
    averaged = F.avg_pool2d(pad(decode_image("photos/a.png")[None] / 255, 64)[0], 8)[0, :, :9, :19]
    error = (pixels(file) / 255.0 - averaged.permute(1, 2, 0).numpy()) ** 2
    assert size == "19x9" and float(psnr) == pytest.approx(-10 * np.log10(error.mean()), abs=0.05)
    side_by_side = pixels("reconstructed/a-compare.png")
    assert side_by_side.shape == (210, 3 * 450 + 2 * 8, 3)
    assert (side_by_side[1::3, 1:450:3] == pixels("photos/a.png")).all()
    assert (side_by_side[1::3, 917::3] == pixels("reconstructed/a-scales5.png")).all()


def test_lpips_is_shown_where_its_weights_are(photos, monkeypatch, capsys):
    import sitlib.metrics
    import sitlib.metrics.networks

    monkeypatch.setattr(sitlib.metrics.networks, "cached_lpips", lambda net: net)
    monkeypatch.setattr(sitlib.metrics, "lpips_per_image", lambda x, y: (x - x + 0.25).mean())
    assert main(["reconstruct", "photos/a.png"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[-2] == "LPIPS" and row.split()[-2] == "0.250"
    monkeypatch.setattr("sitlib.cli.images.LARGEST_LPIPS", 150 * 70 - 1)
    assert main(["reconstruct", "photos/a.png", "--overwrite"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2] == "-"


# -- what is refused -------------------------------------------------------------------------------------------------------------------


def refused(capsys, code, sentence, *arguments):
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == code
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said, said


def test_codes_of_another_tokenizer_are_refused(photos, root, capsys):
    main(["encode", "photos/a.png", "-o", "a.safetensors"])
    sentence = "its codes are of tokenizer/sit5_sc-seed0, which tokenizer/sit4-seed0 cannot decode"
    refused(capsys, 1, sentence, "decode", "a.safetensors", "--tokenizer", "sit4")
    torch.manual_seed(9)
    other = SpectralTokenizer(tokenizer_of("sit5_sc").config)  # of one name and shape, trained anew
    save_model(
        photos.parent / "other.safetensors", other, name="tokenizer/sit5_sc-seed0", run="sit5_sc"
    )
    refused(
        capsys,
        1,
        "before it was trained anew",
        "decode",
        "a.safetensors",
        "--tokenizer",
        "other.safetensors",
    )
    assert not Path("decoded").exists()


def test_a_second_decoder_reads_the_codes_of_the_first(photos):
    main(["encode", "photos/a.png", "-o", "a.safetensors"])
    profile = load_profile("smoke")
    second = SpectralTokenizer(profile.tokenizer_variant("sit5_sc_second"))
    second.freeze_encoder_from(tokenizer_of("sit5_sc"))
    save_model(photos.parent / "second.safetensors", second, name="tokenizer/sit5_sc_second-seed0")
    assert main(["decode", "a.safetensors", "--tokenizer", "second.safetensors"]) == 0


def test_what_is_no_codes_file_is_refused(home, root, capsys):
    model = root / "models/tokenizer/sit4-seed0/model.safetensors"
    refused(capsys, 1, "it holds SpectralTokenizer, not codes", "decode", model)
    Path("torn.safetensors").write_bytes(model.read_bytes()[:100])
    refused(capsys, 1, "not a complete safetensors file", "decode", "torn.safetensors")
    refused(capsys, 1, "there is no such file", "decode", "nothing.safetensors")


def test_missing_models_say_how_to_get_one(photos, root, monkeypatch, capsys):
    refused(capsys, 1, "did you mean 'sit4'?", "encode", "photos", "--tokenizer", "sit44")
    refused(
        capsys,
        1,
        "There is no checkpoint no/such/model",
        "encode",
        "photos",
        "--tokenizer",
        "no/such/model",
    )
    refused(
        capsys,
        1,
        "another file is needed",
        "encode",
        "photos",
        "--tokenizer",
        root / "models/autoregressive/ar_sit5_sc-seed0",
    )
    monkeypatch.setattr(
        models,
        "resolve",
        lambda path: ROOT / path if path == "params.yaml" else Path("empty") / path,
    )
    models.pipeline_profile.cache_clear()
    refused(
        capsys, 1, "none is trained yet: make tokenizer trains the default one", "encode", "photos"
    )
    refused(capsys, 1, "make repro", "sample", "--class", "mountain")
    monkeypatch.setattr(models, "resolve", lambda path: Path("empty") / path)
    models.pipeline_profile.cache_clear()
    refused(capsys, 1, "pip install -e .", "encode", "photos")
    assert main(["sample", "--help"]) == 0 and "(default: the profile's)" in capsys.readouterr().out


def test_numbers_of_scales_that_an_image_does_not_have_are_refused(photos, capsys):
    refused(capsys, 1, "it has 5 scales, not 6", "reconstruct", "photos/a.png", "--scales", "6")
    refused(
        capsys,
        1,
        "decodes all 4 scales together",
        "reconstruct",
        "photos/a.png",
        "--tokenizer",
        "sit4",
        "--scales",
        "2",
    )
    refused(
        capsys, 2, "is not a number of scales", "reconstruct", "photos/a.png", "--scales", "1,0"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["encode"],
        ["sample"],
        ["sample", "--class", "a", "--text", "b"],
        ["sample", "--class", "mountain", "--count", "0"],
        ["sample", "--class", "mountain", "--temperature", "0"],
        ["sample", "--class", "mountain", "--top-p", "1.5"],
        ["sample", "--class", "mountain", "--count", "2", "-o", "x.png"],
        ["edit", "photos", "--keep", "-1"],
        ["reconstruct", "photos", "-o", "x.png"],
        ["encode", "photos/a.png", "-o", "x.png"],
        ["reconstruct", "photos/a.png", "--device", "abacus"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told(photos, capsys, arguments):
    refused(capsys, 2, "", *arguments)
    assert files_below(photos.parent) == ["photos/a.png", "photos/below/b.png"]


# -- files -----------------------------------------------------------------------------------------------------------------------------


def test_a_broken_file_is_named_and_the_others_are_done(photos, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photograph")
    (photos / "notes.txt").write_text("not looked at")
    (photos / ".hidden.png").write_bytes(b"not looked at")
    refused(capsys, 1, f"{Path('photos/broken.jpg')}: it cannot be decoded", "encode", "photos")
    assert files_below("codes") == ["a.safetensors", "below/b.safetensors"]
    refused(
        capsys,
        1,
        "nothing.png: there is no such file",
        "encode",
        "photos/a.png",
        "nothing.png",
        "-o",
        "two",
    )
    assert files_below("two") == ["a.safetensors"]


def test_nothing_is_overwritten_unless_asked_for(photos, capsys):
    Path("reconstructed").mkdir()
    Path("reconstructed/a.png").write_text("mine")
    refused(capsys, 1, "a.png is there already; --overwrite replaces it", "reconstruct", "photos")
    assert Path("reconstructed/a.png").read_text() == "mine"
    assert pixels("reconstructed/below/b.png").shape == (65, 70, 3)
    assert main(["reconstruct", "photos", "--overwrite"]) == 0
    assert pixels("reconstructed/a.png").shape == (70, 150, 3)


def test_an_input_is_never_replaced(photos, capsys):
    before = (photos / "a.png").read_bytes()
    refused(
        capsys, 1, "would replace an input", "reconstruct", "photos", "-o", "photos", "--overwrite"
    )
    refused(
        capsys,
        1,
        "would replace an input",
        "edit",
        "photos/a.png",
        "-o",
        "photos/a.png",
        "--overwrite",
    )
    assert (photos / "a.png").read_bytes() == before


def test_a_file_beside_is_not_written_over_by_the_next_input(photos, capsys):
    (photos / "a-compare.png").write_bytes((photos / "below/b.png").read_bytes())
    said = "a-compare.png was just written for another input"
    arguments = ("reconstruct", "photos/a.png", "photos/a-compare.png", "--compare", "--overwrite")
    refused(capsys, 1, said, *arguments)
    assert pixels("reconstructed/a-compare.png").shape[0] == 210


def test_what_an_earlier_run_wrote_into_the_folder_is_no_input(photos):
    for _ in range(2):
        assert main(["reconstruct", "photos", "-o", "photos/out", "--overwrite"]) == 0
    assert files_below("photos/out") == ["a.png", "below/b.png"]


def places(inputs, output="out", suffix=".png"):
    return {
        job.source.as_posix(): job.target.as_posix()
        for job in plan(find_sources(inputs, [".png", ".jpg"], output), output, suffix)
    }


def test_where_outputs_go(home):
    for name in ("x/1.png", "x/1.jpg", "y/1.png", "y/below/2.PNG"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert places(["y"]) == {"y/1.png": "out/1.png", "y/below/2.PNG": "out/below/2.png"}
    assert places(["x"]) == {"x/1.png": "out/1.png.png", "x/1.jpg": "out/1.jpg.png"}
    assert (
        places(["y", "x/1.png"])["y/1.png"] == "out/y/1.png" and len(places(["y", "y/1.png"])) == 2
    )
    assert places(["y/1.png"], "z/new.webp") == {"y/1.png": "z/new.webp"}
    assert places(["y/1.png"], "v1.5") == {"y/1.png": "v1.5/1.png"}
    with pytest.raises(ValueError, match="would both become"):
        places(["x/1.png", "y/1.png"])
    with pytest.raises(ValueError, match="there is no file whose name ends in"):
        Path("empty").mkdir()
        places(["empty"])
    with pytest.raises(UsageError, match="name a folder"):
        places(["y"], "one.png")
    Path("notes").touch()
    with pytest.raises(UsageError, match="-o notes is a file"):
        places(["y"], "notes")


def test_files_are_whole_or_not_there(home, monkeypatch):
    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sitlib.cli.files.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(home / "x" / "a.png", b"content")
    assert files_below(home) == []


def test_ctrl_c_keeps_what_is_finished(photos, monkeypatch, capsys):
    import sitlib.cli.files as cli_files

    read = cli_files.read_image

    def interrupted(path):
        if path.name == "b.png":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(cli_files, "read_image", interrupted)
    refused(capsys, 130, "stopped", "encode", "photos")
    assert files_below("codes") == ["a.safetensors"]


# -- drawing ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [("class", "--class", "water", "water"), ("text", "--text", "A red bird!", "a-red-bird")],
    ids=lambda x: x[0],
)
def test_samples_are_those_of_generate(home, told, monkeypatch):
    kind, option, value, stem = told
    monkeypatch.setattr("sitlib.cli.drawing.BATCH", 2)
    given = ["--seed", "3", "--guidance", "2.5", "--temperature", "0.8", "--top-p", "0.9"]
    assert main(["sample", option, value, "--count", "3", "--grid", *given]) == 0
    names = [f"samples/{stem}-seed3-{index}.png" for index in range(3)]
    assert files_below("samples") == [Path(name).name for name in names] + [
        f"{stem}-seed3-grid.png"
    ]
    variant = "sit5_sc" if kind == "class" else "captioned_sit4_sc"
    profile = load_profile("smoke")
    base = (profile.autoregressive if kind == "class" else profile.text).sampling
    sampling = replace(base, seed=3, guidance=2.5, temperature=0.8, top_p=0.9)
    prompts = torch.full((3,), 1) if kind == "class" else [value] * 3
    images = tokenizer_of(variant).decode(generate(model_of(kind, variant), prompts, sampling))
    for name, image in zip(names, images, strict=True):
        assert np.abs(pixels(name) - image.permute(1, 2, 0).numpy() * 255).max() < 0.51
    grid = pixels(f"samples/{stem}-seed3-grid.png")
    assert grid.shape == (130, 130, 3) and (grid[66:, :64] == pixels(names[2])).all()
    assert (grid[66:, 66:] == 255).all()


def test_a_model_is_drawn_as_its_profile_says_however_it_is_named(home, root):
    profile, variant = load_profile("smoke"), "ar_captioned_sit4_sc"
    stored = root / f"models/autoregressive/{variant}-seed0"
    elsewhere = home / "model.safetensors"
    save_model(
        elsewhere, retold("text", "captioned_sit4_sc"), name="autoregressive/mine-seed0", run="mine"
    )

    def sampler(*model):
        return models.sampler(
            build_parser().parse_args(["sample", "--text", "a cat", *model]), True
        )

    for name in (variant, f"{variant}-seed0", str(stored), str(stored / "model.safetensors")):
        assert sampler("--model", name) == profile.sampler(variant)
    assert sampler() == profile.sampler(variant)
    assert sampler("--model", str(elsewhere)) == profile.text.sampling != profile.sampler(variant)


def test_previews_have_the_size_of_their_scales(home):
    assert main(["sample", "--class", "water", "--scales", "2", "-o", "small.png"]) == 0
    assert main(["sample", "--class", "water", "-o", "large.png"]) == 0
    tokenizer, small = tokenizer_of("sit5_sc"), decode_image("small.png") / 255
    assert small.shape == (3, 8, 8)
    codes = generate(
        model_of("class"), torch.tensor([1]), load_profile("smoke").autoregressive.sampling
    )
    torch.testing.assert_close(small, tokenizer.decode(codes, 2)[0], atol=0.51 / 255, rtol=0)


def test_prompts_that_a_model_does_not_take_are_refused(home, capsys):
    refused(
        capsys,
        1,
        "it knows mountain, water, city (did you mean 'water'?)",
        "sample",
        "--class",
        "watr",
    )
    refused(
        capsys,
        1,
        "is told texts, not classes",
        "sample",
        "--class",
        "x",
        "--model",
        "ar_captioned_sit4_sc",
    )
    refused(
        capsys,
        1,
        "is told classes, not texts",
        "sample",
        "--text",
        "a cat",
        "--model",
        "ar_sit5_sc",
    )
    refused(capsys, 1, "is empty", "sample", "--text", " ")
    refused(
        capsys,
        1,
        "writes codes of the tokenizer sit5_sc",
        "sample",
        "--class",
        "water",
        "--tokenizer",
        "sit4",
    )
    refused(capsys, 1, "give --scales 1 ... 5", "sample", "--class", "water", "--scales", "6")
    Path("samples").mkdir()
    Path("samples/water-seed0-0.png").write_text("mine")
    refused(capsys, 1, "another --seed draws other images", "sample", "--class", "water")
    assert (
        files_below("samples") == ["water-seed0-0.png"]
        and Path("samples/water-seed0-0.png").stat().st_size == 4
    )


@pytest.fixture
def squares(home):
    """A photograph of 64 px, and the same averaged down to 8 px."""
    for size in (64, 8):
        image = F.avg_pool2d(photographs(1), 64 // size)[0]
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(
            home / f"{size}.png"
        )
    return home


def test_upsampling_and_editing_are_those_of_the_library(squares):
    sampling = replace(load_profile("smoke").autoregressive.sampling, seed=4)
    small, large = (decode_image(f"{size}.png")[None] / 255 for size in (8, 64))
    told = torch.full((2,), 2)
    pair = (model_of("class"), tokenizer_of("sit5_sc"))
    expected = {
        "upsampled/8": upsample(*pair, small.expand(2, -1, -1, -1), told, sampling).images,
        "edited/64": edit(*pair, large.expand(2, -1, -1, -1), told, 3, sampling).images,
    }
    shared = ["--class", "city", "--count", "2", "--seed", "4"]
    assert main(["upsample", "8.png", *shared]) == 0
    assert main(["edit", "64.png", "--keep", "3", *shared]) == 0
    for name, images in expected.items():
        for index, image in enumerate(images):
            found = pixels(f"{name}-{index}.png")
            assert np.abs(found - image.permute(1, 2, 0).numpy() * 255).max() < 0.51
        assert (pixels(f"{name}-0.png") != pixels(f"{name}-1.png")).any()


def test_images_of_other_sizes_are_upsampled_only_when_asked_to_make_them_small(
    squares, photos, capsys
):
    refused(
        capsys,
        1,
        "squares of 4 or 8 or 16 or 32 px can be upsampled: --size 32",
        "upsample",
        "photos/a.png",
    )
    refused(capsys, 1, "give --size 4 or 8 or 16 or 32", "upsample", "photos/a.png", "--size", "12")
    refused(
        capsys,
        1,
        "of one size only",
        "upsample",
        "8.png",
        "--tokenizer",
        "sit4",
        "--model",
        one_size_model(),
    )
    # The centre of 64 px averaged down to 8 px is what the 8 px file holds, but for its rounding to 8 bits.
    assert main(["upsample", "64.png", "--size", "8", "-o", "x.png"]) == 0
    assert main(["upsample", "8.png", "-o", "y.png"]) == 0
    assert np.abs(pixels("x.png").astype(int) - pixels("y.png")).mean() < 8


def one_size_model():
    save_model(Path("ar_sit4.safetensors").absolute(), retold("class", "sit4"))
    return "ar_sit4.safetensors"


def test_edits_keep_the_scales_they_say(squares, photos, capsys):
    assert main(["edit", "64.png", "--keep", "5", "-o", "same.png"]) == 0
    assert main(["reconstruct", "64.png", "-o", "whole.png"]) == 0
    assert (pixels("same.png") == pixels("whole.png")).all()
    assert main(["edit", "64.png", "--keep", "2", "--class", "city", "-o", "other.png"]) == 0
    assert (pixels("other.png") != pixels("same.png")).any()
    capsys.readouterr()
    assert main(["edit", "photos/a.png", "--text", "a red bird", "-o", "square.png"]) == 0
    assert pixels("square.png").shape == (64, 64, 3)
    assert "the centre of 150x70 -> 64x64" in capsys.readouterr().out
    refused(capsys, 1, "give --keep 0 ... 5, not 6", "edit", "64.png", "--keep", "6")


# -- help ------------------------------------------------------------------------------------------------------------------------------


def test_help_is_there_at_once():
    """In a process of its own: nothing that takes seconds is imported."""
    code = (
        "import sys, runpy\nsys.argv = ['sit', '--help']\n"
        "try:\n    runpy.run_module('sitlib.cli', run_name='__main__')\n"
        "except SystemExit as stop:\n    heavy = {'torch', 'numpy', 'yaml', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "    print(heavy, file=sys.stderr)\n    sys.exit(stop.code or len(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for name in ("encode", "decode", "reconstruct", "sample", "upsample", "edit", "doctor"):
        assert f"\n    {name}" in done.stdout
    direct = [sys.executable, "-m", "sitlib.cli", "--version"]
    assert subprocess.run(direct, cwd=ROOT, capture_output=True, text=True).stdout.startswith(
        "sit 0."
    )


def test_every_subcommand_has_examples_that_its_parser_takes(home, capsys):
    import shlex

    parser = build_parser()
    commands = next(
        action for action in parser._actions if hasattr(action, "choices") and action.choices
    )
    assert len(commands.choices) >= 7
    for name, command in commands.choices.items():
        lines = command.epilog.splitlines()[1:]
        assert lines and all(shown.strip().startswith(f"sit {name}") for shown in lines)
        for shown in lines:
            assert parser.parse_args(
                shlex.split(shown, comments=True)[1:]
            ).run is command.get_default("run")
    assert main(["sample", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    profile = load_profile("smoke")
    guidance = profile.autoregressive.sampling.guidance, profile.text.sampling.guidance
    both = (
        str(guidance[0])
        if guidance[0] == guidance[1]
        else f"{guidance[0]} for classes, {guidance[1]} for texts"
    )
    assert (
        f"(default: {both})" in shown
        and "(default: ar_sit5_sc for classes, ar_captioned_sit4_sc for texts)" in shown
    )


def test_nothing_else_imports_the_command():
    others = [path for path in (ROOT / "sitlib").rglob("*.py") if path.parent.name != "cli"]
    assert [path.name for path in others if "sitlib.cli" in path.read_text()] == []
