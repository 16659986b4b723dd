"""`.sit` files: exact, small, cut off or damaged anywhere."""

import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import model_of, photographs, random_codes, tokenizer_of

from sitlib import codec
from sitlib.cli import main
from sitlib.files import save_model
from sitlib.model.generator import code_nats
from sitlib.model.tiling import ImageCodes, Tiles, decode_codes, encode_image
from sitlib.model.tokenizer import SpectralTokenizer


@cache
def counted():
    """A tokenizer that knows the frequencies of its codes."""
    tokenizer = SpectralTokenizer(tokenizer_of().config).eval()
    tokenizer.load_state_dict(tokenizer_of().state_dict())
    tokenizer.count_codes(photographs(16))
    return tokenizer


@cache
def encoded(height=64, width=64):
    image = F.interpolate(photographs(4)[3:], (height, width), mode="bicubic").clamp(0, 1)
    return encode_image(counted(), image)


@cache
def file_of(height=64, width=64):
    return codec.compress(counted(), encoded(height, width))


@given(height=st.integers(1, 150), width=st.integers(1, 150), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_any_codes_of_any_size_come_back(height, width, seed):
    tokenizer, tiles = counted(), Tiles.of(counted(), (height, width))
    rng, K = np.random.default_rng(seed), tokenizer.config.codebook_sizes
    count = 16 * tiles.rows * tiles.columns
    codes = torch.tensor(np.stack([rng.integers(k, size=count) for k in K[: tiles.num_scales]]))
    given = ImageCodes(codes, (height, width), (4 * tiles.rows, 4 * tiles.columns))
    back, is_whole = codec.decompress(tokenizer, codec.compress(tokenizer, given))
    assert is_whole and torch.equal(back.codes, codes)
    assert (back.size, back.token_grid) == (given.size, given.token_grid)


def test_bits_are_those_of_the_frequencies_and_the_header_is_small():
    """Within 1 % and the last word; -log2 of counts plus one, by a naive loop."""
    tokenizer, large = counted(), encoded(900, 1100)
    bits = 0.0
    for scale, codes in enumerate(large.codes):
        counts = tokenizer.code_counts[scale, : tokenizer.config.codebook_sizes[scale]].double() + 1
        bits -= float((counts / counts.sum()).log2()[codes].sum())
    size = len(codec.compress(tokenizer, large))
    assert bits / 8 < size <= 1.01 * bits / 8 + 24 + 4
    alike = SpectralTokenizer(tokenizer.config).eval()  # without frequencies: all codes alike
    plain = len(codec.compress(alike, encoded()))
    least = 16 * sum(math.log2(K) for K in tokenizer.config.codebook_sizes) / 8
    assert least <= plain <= least + 24 + 4
    images = (encode_image(tokenizer, image) for image in photographs(16).split(1))
    sizes = [len(codec.compress(tokenizer, image)) for image in images]
    assert sum(sizes) / len(sizes) < plain


def test_every_prefix_has_the_scales_that_are_whole():
    """More bytes never show less, and all that is shown is right."""
    whole, shown = encoded().codes, []
    for end in range(len(file_of())):
        try:
            image, is_whole = codec.decompress(counted(), file_of()[:end])
        except ValueError as error:
            assert "header" in str(error) or "cut off" in str(error) or "no .sit" in str(error)
            image = None
        else:
            assert torch.equal(image.codes, whole[: len(image.codes)])
            assert not is_whole or len(image.codes) == 5
        shown.append(0 if image is None else len(image.codes))
    assert shown == sorted(shown) and set(shown) >= {0, 1, 2, 3, 4}
    small, _ = codec.decompress(counted(), file_of()[: shown.index(3)])
    expected = decode_codes(counted(), encoded(), 3)
    assert torch.equal(decode_codes(counted(), small), expected) and expected.shape[2:] == (16, 16)


def test_flipped_bits_are_never_a_wrong_picture():
    data, rng = file_of(), random.Random(0)
    for place in rng.sample(range(8 * len(data)), 200):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"\.sit|version|another tokenizer"):
            codec.decompress(counted(), bytes(broken))


def test_an_enormous_size_needs_an_enormous_file():
    data = bytearray(file_of())
    data[8:12] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="too few for 65535x65535 px"):
        codec.decompress(counted(), bytes(data))


def test_other_tokenizers_versions_and_files_are_told():
    other = SpectralTokenizer(replace(tokenizer_of().config, code_dim=8)).eval()
    with pytest.raises(ValueError, match="another tokenizer"):
        codec.decompress(other, file_of())
    with pytest.raises(ValueError, match="version 9 of the format, this reads 1 and 2"):
        codec.decompress(counted(), file_of()[:3] + b"\x09" + file_of()[4:])
    with pytest.raises(ValueError, match=r"no \.sit file"):
        codec.decompress(counted(), b"\xff\xd8\xff")
    with pytest.raises(ValueError, match="7 bytes too many"):
        codec.decompress(counted(), file_of() + b"garbage")


def test_threads_do_not_change_a_file():
    threads = torch.get_num_threads()
    files = []
    for count in (1, 2):
        torch.set_num_threads(count)
        files.append(codec.compress(counted(), encode_image(counted(), photographs(1))))
    torch.set_num_threads(threads)
    assert files[0] == files[1]


@cache
def prior_of(kind="class"):
    return codec.Prior(model_of(kind, masked=True))


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("size", [(64, 64), (20, 30), (150, 90)])
def test_a_prior_codes_what_it_expects(kind, size):
    """Codes come back, from one tile, of fewer scales, and of six tiles; a cut shows whole scales.

    The size is the cross-entropy under the model's own likelihood, of which a sixty-fifth goes to
    all codes alike, to 1 % and the last words.
    """
    prior, given = prior_of(kind), encoded(*size)
    data = codec.compress(counted(), given, prior)
    assert data[3] == codec.WITH_PRIOR
    back, is_whole = codec.decompress(counted(), data, prior)
    assert is_whole and torch.equal(back.codes, given.codes)
    assert (back.size, back.token_grid) == (given.size, given.token_grid)
    part, is_whole = codec.decompress(counted(), data[:-20], prior)
    assert not is_whole and torch.equal(part.codes, given.codes[: len(part.codes)])

    g, (rows, columns), model = 4, given.token_grid, prior.model
    tiles = given.codes.reshape(-1, rows // g, g, columns // g, g).permute(1, 3, 0, 2, 4)
    tiles = tiles.reshape(-1, len(given.codes), g * g)  # [M, k, N]
    whole = F.pad(tiles, (0, 0, 0, model.config.num_scales - tiles.shape[1]))
    empty = torch.zeros(len(tiles), 1, dtype=torch.int64)
    with torch.no_grad():
        logits = model(whole, model.unconditional(empty if kind == "text" else empty[:, 0]))
    sizes = torch.tensor(model.config.codebook_sizes)[: tiles.shape[1], None]
    p = (-code_nats(logits, whole)).exp()[:, : tiles.shape[1]]
    bits = -float(((64 * p + 1 / sizes) / 65).log2().sum())
    payload = len(data) - 13 - 2 * len(given.codes)
    assert 0.99 * bits - 8 < 8 * payload < 1.01 * bits + 40


def test_a_file_with_a_prior_needs_that_prior(monkeypatch):
    data = codec.compress(counted(), encoded(), prior_of())
    with pytest.raises(ValueError, match="written with a prior"):
        codec.decompress(counted(), data)
    with pytest.raises(ValueError, match="another tokenizer or prior"):
        codec.decompress(counted(), data, prior_of("text"))
    with pytest.raises(ValueError, match="a prior is a masked model"):
        codec.Prior(model_of())
    rng = random.Random(0)
    for place in rng.sample(range(8 * len(data)), 60):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"\.sit|version|another tokenizer"):
            codec.decompress(counted(), bytes(broken), prior_of())
    # Where rounding could go either way, frequencies are taken, which no machine reads otherwise.
    monkeypatch.setattr(codec, "MARGIN", 0.5)
    assert codec.compress(counted(), encoded(), prior_of()) == file_of()
    assert codec.decompress(counted(), file_of(), prior_of())[1]


def test_a_prior_says_the_same_with_any_threads_order_of_sums_and_number_of_tiles(monkeypatch):
    prior, threads = prior_of(), torch.get_num_threads()
    coarser = random_codes(prior.model, 5)[:, :3].movedim(1, 0).numpy()  # [k, M, N]
    laws = []
    for count, tiles in ((1, 16), (2, 16), (2, 1), (1, 3)):
        monkeypatch.setattr(codec, "TILES", tiles)
        torch.set_num_threads(count)
        laws.append(np.concatenate([*prior.laws(coarser)]))
    torch.set_num_threads(threads)
    assert all(np.array_equal(law, laws[0]) for law in laws[1:])
    assert np.abs(laws[0].sum(1) - 1).max() < 1e-5 and laws[0].max() < 63 / 64 + 1e-6


def test_the_command_compresses_and_decompresses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(Path("model.safetensors"), counted(), name="counted")
    pixels = (photographs(1)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).resize((150, 90)).save("photo.png")
    option = ["--tokenizer", "model.safetensors"]
    assert main(["compress", "photo.png", *option]) == 0
    header, line = capsys.readouterr().out.splitlines()
    size = Path("compressed/photo.sit").stat().st_size
    assert header.split() == ["size", "bytes", "bits/px", "saved", "file"]
    assert line.split()[:3] == ["150x90", str(size), f"{8 * size / (150 * 90):.3f}"]
    assert main(["decompress", "compressed/photo.sit", *option]) == 0
    assert main(["reconstruct", "photo.png", *option]) == 0
    images = [
        np.asarray(Image.open(f"{name}/photo.png")) for name in ("decompressed", "reconstructed")
    ]
    assert np.array_equal(*images)
    capsys.readouterr()
    Path("cut.sit").write_bytes(Path("compressed/photo.sit").read_bytes()[: size // 2])
    assert main(["decompress", "cut.sit", *option]) == 0
    assert "cut.sit was cut off: its first" in capsys.readouterr().err
    assert Image.open("decompressed/cut.png").width < 150
    Path("other.sit").write_bytes(b"something else")
    assert main(["decompress", "other.sit", *option]) == 1
    assert "this is no .sit file" in capsys.readouterr().err
