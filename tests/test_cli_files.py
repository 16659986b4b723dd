"""The command `sit`: broken files, files that are there, places of outputs, an end on the way."""

import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import files_below, pixels
from tiny import model_of, python, tokenizer_of

from sitlib import codec
from sitlib.cli import build_parser, images, main
from sitlib.cli.files import Jobs
from sitlib.files import DiskError, read_metadata, write_tensors
from sitlib.model.tiling import Tiles, encode_image
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.prior import Prior, least_bits

# Prints the most memory of a process so far, KiB: that of getrusage begins with its parent's.
PEAK = "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"


def test_a_broken_file_is_named_and_the_others_are_done(photos, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photograph")
    (photos / ".hidden.png").write_bytes(b"not looked at")
    assert main(["encode", "photos"]) == 1
    said = capsys.readouterr().err
    assert "photos/broken.jpg: it cannot be decoded" in said and "2 of 3 done" in said
    assert files_below("codes") == ["a.safetensors", "below/b.safetensors"]


def test_an_image_that_needs_too_much_memory_is_named_and_the_others_are_done(
    photos, monkeypatch, capsys
):
    def encode(tokenizer, image):
        if image.shape[3] == 150:
            np.zeros(2**62, np.uint8)
        return encode_image(tokenizer, image)

    monkeypatch.setattr(images.tiling, "encode_image", encode)
    assert main(["encode", "photos"]) == 1
    assert "photos/a.png: it needs more memory than there is" in capsys.readouterr().err
    assert files_below("codes") == ["below/b.safetensors"]


DAMAGE = [
    {"size": [3000, 4000]},
    {"size": [-8, 8]},
    {"size": [8.0, 8.0]},
    {"token_grid": [4, 8]},
    {"tokenizer": None},
    {"codes": lambda codes: codes[:-1]},
    {"codes": lambda codes: codes[0, 0]},
    {"codes": lambda codes: codes.to(torch.complex64)},
    {"codes": lambda codes: codes + 10_000},
]


def test_codes_that_contradict_themselves_are_named_and_the_others_are_done(photos, capsys):
    main(["encode", "64.png", "-o", "codes/sound.safetensors"])
    sound = Path("codes/sound.safetensors")
    for number, change in enumerate(DAMAGE):
        codes, about = load_file(sound)["codes"], read_metadata(sound)
        codes = change.pop("codes", lambda codes: codes)(codes)
        write_tensors(f"codes/{number}.safetensors", {"codes": codes}, about | change)
    save_file({"codes": codes}, "codes/foreign.safetensors", {"about": "[]"})
    assert main(["decode", "codes"]) == 1
    said = capsys.readouterr().err
    for name in (*range(len(DAMAGE)), "foreign"):
        assert f"sit: codes/{name}.safetensors" in said
    assert files_below("decoded") == ["sound.png"] and "Traceback" not in said


def test_names_need_not_be_utf8_and_a_text_needs_no_letters_and_may_be_long(photos, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    (photos / "a.png").rename(photos / name)
    assert main(["encode", f"photos/{name}"]) == main(["decode", "codes"]) == 0
    assert files_below("decoded") == ["caf\N{REPLACEMENT CHARACTER}.png"]
    long = "two green birds and a blue dog that sleeps and a red cat and a"
    for text in ("\N{RED APPLE}", "\N{GREEN APPLE}", f"{long} dog", f"{long} bird"):
        assert main(["sample", "--text", text]) == 0
    assert main(["sample", "--class", "Mountain"]) == 0
    names = {Path(file).name.lower() for file in files_below("samples")}
    assert len(names) == 5 and max(map(len, names)) < 80


def test_a_line_of_pixels_is_not_enlarged_without_end_and_a_model_may_lie_anywhere(home):
    for width, factor in ((3000, 1), (500, 4)):
        Image.new("RGB", (width, 1)).save("line.png")
        assert main(["reconstruct", "line.png", "--compare", "--overwrite"]) == 0
        beside = Image.open("reconstructed/line-compare.png")
        assert beside.size == (2 * width * factor + images.GAP, factor)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # two folders below the root
        model = shutil.copy("../models/autoregressive/ar_sit5_sc-seed0/model.safetensors", folder)
        assert main(["sample", "--class", "water", "--model", model]) == 0


def test_large_images_pass_in_strips(home):
    """In floating point 1.5 megapixels, a preview and the comparison take 190 MB."""
    code = "from sitlib.cli import images, main; images.LARGEST_LPIPS = 1_000_000"
    code += "; images.TOKENIZER = 'sit5_sc'"
    for side in (64, 1225):
        Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(f"{side}.png")
        code += f"\nassert main(['reconstruct', '{side}.png', '--scales', '4,5', '--compare']) == 0"
        code += PEAK
    done = python(code, home, SITLIB_WEIGHTS=str(home))
    assert done.returncode == 0, done.stderr
    small, large = (int(line) for line in done.stdout.splitlines() if line.isdecimal())
    assert pixels("reconstructed/1225-compare.png").shape[0] == 1000
    assert large - small < 100_000


def test_the_largest_file_that_is_read_takes_a_gibibyte_at_most(home):
    """Of memory, PyTorch included: a size and a length that it may have, and nothing but zeros."""
    H, W = codec.LARGEST, codec.MOST_PIXELS // codec.LARGEST
    name = codec._name(SpectralTokenizer.from_pretrained("photos-256"), None)
    fields = codec.FIELDS.pack(codec.MAGIC, codec.UNIFORM, name, H, W) + codec._leb128(2**30)
    Path("bomb.sit").write_bytes(fields.ljust(codec.MOST_BYTES, b"\0"))
    code = "from sitlib.cli import main; print(main(['decompress', 'bomb.sit']))"
    done = python(code + PEAK, home)
    code, peak = (int(line) for line in done.stdout.splitlines() if line.isdecimal())
    assert code == 1 and "damaged" in done.stderr
    assert peak < 2**20


def test_a_payload_of_zeros_is_refused_after_its_first_tiles(monkeypatch):
    """Whatever the prior says, zeros are read as code 0, so that anybody can write the checksums."""
    tokenizer = tokenizer_of("sit5_sc")
    prior = Prior(model_of("class", masked=True))
    tiles = Tiles.of(tokenizer, (640, 640))
    count = tiles.rows * tiles.columns * tokenizer.config.tokens_per_scale
    least = sum(count * least_bits(K) / 8 for K in tokenizer.config.codebook_sizes)
    payload = bytes(int(least) + 1)
    fields = codec.FIELDS.pack(
        codec.MAGIC, codec.WITH_PRIOR, codec._name(tokenizer, prior), 640, 640
    )
    fields += codec._leb128(len(payload))
    crc, sums, zeros = zlib.crc32(fields), b"", np.zeros(count, np.int32)
    for _ in range(tiles.num_scales):
        crc = codec._checksum(crc, zeros)
        sums += struct.pack(">H", crc & 0xFFFF)
    tiles_read, laws = [], Prior.laws
    monkeypatch.setattr(
        Prior, "laws", lambda *args: (tiles_read.append(p) or p for p in laws(*args))
    )
    with pytest.raises(ValueError, match="damaged in scale 1"):
        codec.decompress(tokenizer, fields + sums + payload, prior)
    assert len(tiles_read) < 5 < tiles.rows * tiles.columns


def test_a_name_as_long_as_names_may_be_is_no_reason_to_stop(photos, capsys):
    shutil.copy(photos / "a.png", photos / f"{'L' * 251}.png")
    assert main(["compress", "photos", "nowhere", "x" * 300]) == 1
    said = capsys.readouterr().err
    assert "nowhere: there is no such file" in said and "3 of 5 done" in said
    assert Path(f"compressed/photos/{'L' * 251}.sit").is_file()


def test_nothing_is_overwritten_unless_asked_for(photos, capsys):
    Path("reconstructed").mkdir()
    Path("reconstructed/a.png").write_text("mine")
    assert main(["reconstruct", "photos"]) == 1
    assert "a.png is there already; --overwrite replaces it" in capsys.readouterr().err
    assert Path("reconstructed/a.png").read_text() == "mine"
    assert pixels("reconstructed/below/b.png").shape == (65, 70, 3)
    assert main(["reconstruct", "photos", "--overwrite"]) == 0
    assert pixels("reconstructed/a.png").shape == (70, 150, 3)
    # What is in the way of one output stops no other.
    (photos / "c.png").write_bytes((photos / "below/b.png").read_bytes())
    Path("taken/a.png").mkdir(parents=True)
    Path("taken/below").touch()
    assert main(["reconstruct", "photos", "-o", "taken", "--overwrite"]) == 1
    assert capsys.readouterr().err.count("cannot be written, as a folder has its name, or a") == 2
    assert files_below("taken") == ["below", "c.png"]
    # Nor a file beside by the next input.
    (photos / "a-compare.png").write_bytes((photos / "below/b.png").read_bytes())
    inputs = ["photos/a.png", "photos/a-compare.png"]
    assert main(["reconstruct", *inputs, "--compare", "--overwrite"]) == 1
    assert "a-compare.png was just written for another input" in capsys.readouterr().err
    assert pixels("reconstructed/a-compare.png").shape[0] == 210


def test_where_outputs_go(home):
    def places(*inputs, output="out"):
        options = build_parser().parse_args(["reconstruct", *inputs, "-o", output])
        return {str(path): str(target) for path, target in Jobs(options).targets.items()}

    for name in ("x/1.png", "x/1.jpg", "y/1.png", "y/below/2.PNG", "y/out/old.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    # What an earlier run wrote into the folder is no input.
    below = {"y/1.png": "y/out/1.png", "y/below/2.PNG": "y/out/below/2.png"}
    assert places("y", output="y/out") == below
    assert places("x") == {"x/1.jpg": "out/1.png", "x/1.png": "out/1.png.png"}
    assert places("y", "x/1.png")["y/1.png"] == "out/y/1.png" and len(places("y", "y/1.png")) == 3
    assert places("y/1.png", output="z/new.webp") == {"y/1.png": "z/new.webp"}
    assert places("y/1.png", output="v1.5") == {"y/1.png": "v1.5/1.png"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DiskError("stopped: there is no room")])
def test_ctrl_c_and_a_full_disk_end_the_work_and_keep_what_is_finished(
    photos, monkeypatch, capsys, error
):
    def write(path, *content):
        if path.name == "b.safetensors":
            raise error
        write_tensors(path, *content)

    (photos / "c.png").write_bytes((photos / "a.png").read_bytes())
    monkeypatch.setattr(images, "write_tensors", write)
    inputs = [f"photos/{name}.png" for name in ("a", "below/b", "c")]
    assert main(["encode", *inputs]) == (1 if isinstance(error, DiskError) else 130)
    assert capsys.readouterr().err.count("stopped") == 1
    assert files_below("codes") == ["a.safetensors"]
