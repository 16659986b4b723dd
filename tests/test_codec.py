"""`.sit` files: exact, small, cut off or damaged anywhere."""

import copy
import math
import os
import random
import struct
from contextlib import suppress
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
from tiny import copy_of, model_of, photographs, random_codes, tokenizer_of

import sitlib.prior as prior_module
from sitlib import codec
from sitlib.cli import main
from sitlib.files import save_model
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import code_nats
from sitlib.model.tiling import ImageCodes, Tiles, decode_codes, encode_image
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.prior import Prior
from sitlib.sample.generate import generate


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
    # Codes that training hardly had take no more than if all were as frequent.
    rare = torch.tensor([p.argmin() for p in codec.probabilities(tokenizer)])
    rare = replace(encoded(), codes=rare[:, None].expand(-1, 16))
    data = codec.compress(tokenizer, rare)
    back, _ = codec.decompress(tokenizer, data)
    assert len(data) <= plain and torch.equal(back.codes, rare.codes)


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
    ends = codec.ends_of_scales(counted(), file_of())
    assert len(ends) == 5 and ends == sorted(set(ends)) and ends[-1] <= len(file_of())
    assert shown == [sum(end <= length for end in ends) for length in range(len(shown))]
    small, _ = codec.decompress(counted(), file_of()[: shown.index(3)])
    expected = decode_codes(counted(), encoded(), 3)
    assert torch.equal(decode_codes(counted(), small), expected) and expected.shape[2:] == (16, 16)


@pytest.mark.parametrize("has_prior", [False, True])
def test_flipped_bits_are_never_a_wrong_picture(has_prior):
    prior = sure_prior() if has_prior else None
    data = codec.compress(counted(), codes_of(150, 90, 1), prior) if prior else file_of()
    for place in random.Random(0).sample(range(8 * len(data)), 60 if prior else 200):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"\.sit|version|another tokenizer"):
            codec.decompress(counted(), bytes(broken), prior)


def test_sizes_and_codes_of_no_image_are_refused():
    for changes in ({"size": (0, 64)}, {"size": (-1, 64)}, {"codes": encoded().codes + 0.5}):
        with pytest.raises(ValueError, match="1 to 65535 px|are integers"):
            codec.compress(counted(), replace(encoded(), **changes))
    for size, sentence in ((13_377, "too few for 13377x13377"), (32_767, "not 32767x32767")):
        data = file_of()[:8] + struct.pack(">2H", size, size) + file_of()[12:]
        with pytest.raises(ValueError, match=sentence):
            codec.decompress(counted(), data)


def test_other_tokenizers_versions_and_files_are_told():
    other = SpectralTokenizer(replace(tokenizer_of().config, code_dim=8)).eval()
    with pytest.raises(ValueError, match="another tokenizer"):
        codec.decompress(other, file_of())
    for version in (1, 9):
        with pytest.raises(ValueError, match=f"version {version} of the format.* reads 3 to 5"):
            codec.decompress(counted(), file_of()[:3] + bytes([version]) + file_of()[4:])
    for function in (codec.decompress, codec.ends_of_scales):
        with pytest.raises(ValueError, match=r"no \.sit file"):
            function(counted(), b"\xff\xd8\xff")
    with pytest.raises(ValueError, match="7 bytes too many"):
        codec.decompress(counted(), file_of() + b"garbage")


def test_a_tokenizer_is_known_by_its_values_in_any_precision():
    assert codec.decompress(copy.deepcopy(counted()).double(), file_of())[1]
    rounded = copy.deepcopy(counted()).bfloat16()
    data = codec.compress(rounded, encoded())
    assert codec.decompress(copy.deepcopy(rounded).float(), data)[1]
    with pytest.raises(ValueError, match="another tokenizer"):
        codec.decompress(counted(), data)


@cache
def prior_of(kind="class"):
    return Prior(model_of(kind, masked=True))


def sure_prior(code=1, logit=60.0):
    """A prior for which one code of every scale is all but certain."""
    model = copy_of(model_of("class", masked=True))
    with torch.no_grad():
        for head in model.heads:
            head.weight.zero_()
            head.bias.zero_()
            head.bias[code] = logit
    return Prior(model)


def codes_of(height, width, code):
    """Codes of an image of that size, all of them the same."""
    tiles = Tiles.of(counted(), (height, width))
    codes = torch.full((tiles.num_scales, 16 * tiles.rows * tiles.columns), code)
    return ImageCodes(codes, (height, width), (4 * tiles.rows, 4 * tiles.columns))


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("size", [(64, 64), (20, 30), (150, 90)])
def test_a_prior_codes_what_it_expects(kind, size):
    """Codes come back, from one tile, of fewer scales, and of six tiles; a cut shows whole scales.

    The size is the cross-entropy under the model's own likelihood, of which a sixty-fifth goes to
    all codes alike, to 1 % and the last words. Codes are drawn from the model: it expects them.
    """
    prior, tiles = prior_of(kind), Tiles.of(counted(), size)
    model, count = prior.model, tiles.rows * tiles.columns
    drawn = generate(model.float(), count, SamplingConfig(steps_per_scale=1))[:, : tiles.num_scales]
    model.double()
    rows = drawn.unflatten(0, (tiles.rows, tiles.columns)).unflatten(3, (4, 4))
    codes = rows.permute(2, 0, 3, 1, 4).reshape(tiles.num_scales, -1)
    given = ImageCodes(codes, size, (4 * tiles.rows, 4 * tiles.columns))
    data = codec.compress(counted(), given, prior)
    assert codec.has_prior(data) and not codec.has_prior(file_of())
    back, is_whole = codec.decompress(counted(), data, prior)
    assert is_whole and torch.equal(back.codes, codes)
    assert (back.size, back.token_grid) == (given.size, given.token_grid)
    last = codec.ends_of_scales(counted(), data, prior)[-2]
    part, is_whole = codec.decompress(counted(), data[: last + 1], prior)
    assert not is_whole and torch.equal(part.codes, codes[:-1])

    whole = F.pad(drawn, (0, 0, 0, model.config.num_scales - tiles.num_scales))
    empty = torch.zeros(count, 1, dtype=torch.int64)
    with torch.no_grad():
        logits = model(whole, model.unconditional(empty if kind == "text" else empty[:, 0]))
    sizes = torch.tensor(model.config.codebook_sizes)[: tiles.num_scales, None]
    p = (-code_nats(logits, whole)).exp()[:, : tiles.num_scales]
    bits = -float(((64 * p + 1 / sizes) / 65).log2().sum())
    payload = len(data) - 13 - 2 * tiles.num_scales
    assert 0.99 * bits - 16 < 8 * payload < 1.01 * bits + 40


def test_a_prior_says_the_same_on_machines_whose_sums_end_otherwise(monkeypatch):
    """Noise a hundred times as large as kernels were seen to differ by changes no probability."""
    prior, rng = prior_of(), torch.Generator().manual_seed(0)
    coarser = random_codes(prior.model, 5)[:, :3].movedim(1, 0).numpy()  # [k, M, N]
    first = [*prior.laws(coarser, prior_module.MARGIN)]
    assert len(first) == 5 and all(law.shape[0] == 16 for law in first)
    read, seen = type(prior.model).read_scale, set()

    def noisy(*arguments):
        logits = read(*arguments)
        seen.add(logits.dtype)
        return logits + 1e-13 * torch.randn(logits.shape, dtype=logits.dtype, generator=rng)

    monkeypatch.setattr(type(prior.model), "read_scale", noisy)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = [*prior.laws(coarser)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert seen == {torch.float64} and prior_module.WEIGHTS.sum() == 545302907
    assert np.spacing(prior_module.LARGEST_LOGIT - 0.5) < prior_module.MARGIN / 20


@pytest.mark.parametrize("logit", [math.nan, math.inf, 1e17, 128.5])
def test_logits_that_cannot_be_trusted_are_not_used(logit, monkeypatch):
    given = codes_of(64, 64, 1)
    plain = codec.compress(counted(), given)
    assert codec.compress(counted(), given, sure_prior(logit=logit)) == plain
    monkeypatch.setattr(codec, "MARGIN", 0.6)  # as if every one were too close
    assert codec.compress(counted(), given, sure_prior()) == plain


def test_a_file_with_a_prior_needs_that_prior():
    data = codec.compress(counted(), codes_of(150, 90, 1), sure_prior())
    with pytest.raises(ValueError, match="written with a prior"):
        codec.decompress(counted(), data)
    with pytest.raises(ValueError, match="another tokenizer or prior"):
        codec.decompress(counted(), data, prior_of())
    with pytest.raises(ValueError, match="a prior is a masked model"):
        Prior(model_of())
    with pytest.raises(ValueError, match="learned positions"):
        Prior(model_of("class", masked=True, pos_emb="rotary"))
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        codec.decompress(tokenizer_of("sit4"), data, sure_prior())
    assert codec.decompress(counted(), file_of(), prior_of())[1]  # what was written without
    assert codec.compress(counted(), encoded(), sure_prior()) == file_of()  # it would be longer


def test_a_prior_is_known_by_what_it_computes():
    """Files stay readable where defaults of sampling, names and training's settings change."""
    model = model_of("class", masked=True)
    changed = replace(model.config.transformer, tokenizer="other", dropout=0.5, code_noise=0.1)
    changes = {"sampling": SamplingConfig(seed=5), "classes": ["a", "b", "c"]}
    assert Prior(copy_of(model, transformer=changed, **changes)).digest == prior_of().digest
    assert Prior(copy_of(model).half().float()).digest != prior_of().digest
    other = copy_of(model, transformer=replace(model.config.transformer, heads=4))
    assert Prior(other).digest != prior_of().digest


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_prior_is_sure_of_takes_little_and_comes_back(code):
    """Also codes that leave no byte of payload, and sizes that a file can only just pay for."""
    for size in ((64, 64), (1, 300), (600, 500)):
        given = codes_of(*size, code)
        for prior in (None, sure_prior(code)):
            data = codec.compress(counted(), given, prior)
            back, is_whole = codec.decompress(counted(), data, prior)
            assert is_whole and torch.equal(back.codes, given.codes)
    assert len(data) < given.codes.numel() / 100


def test_a_size_that_the_bytes_cannot_pay_for_is_not_computed(monkeypatch):
    """Whatever length the file claims: the prior is never asked."""
    data = codec.compress(counted(), codes_of(600, 500, 1), sure_prior())
    bomb = data[:8] + struct.pack(">2H", 13_377, 13_377) + codec._leb128(2**34) + data[13:40]
    monkeypatch.setattr(Prior, "laws", lambda *_: pytest.fail("a tile was computed"))
    with pytest.raises(ValueError, match="cut off in its first scale"):
        codec.decompress(counted(), bomb, sure_prior())


def test_no_cut_shows_a_wrong_code_even_where_a_checksum_fits_by_chance(monkeypatch):
    monkeypatch.setattr(codec, "_checksum", lambda *_: 0)  # all of them fit
    rng, K = np.random.default_rng(0), counted().config.codebook_sizes
    for _ in range(3):
        codes = torch.tensor(np.stack([rng.integers(k, size=16) for k in K]))
        data, shown = codec.compress(counted(), ImageCodes(codes, (64, 64), (4, 4))), set()
        for end in range(24, len(data)):
            with suppress(ValueError):  # no scale is whole
                part, _ = codec.decompress(counted(), data[:end])
                assert torch.equal(part.codes, codes[: len(part.codes)])
                shown.add(len(part.codes))
        assert shown >= {1, 2, 3, 4}


def test_damage_of_a_whole_file_is_not_told_as_a_cut():
    data = bytearray(file_of())
    data[-10] ^= 255
    with pytest.raises(ValueError, match="damaged: the checksum of scale"):
        codec.decompress(counted(), bytes(data))
    with pytest.raises(ValueError, match="must lie in 0"):
        codec.compress(counted(), codes_of(64, 64, 10**6))


def test_a_wrong_scale_is_seen_by_the_checksums_after_it():
    """Even if its own fits by chance, and the file is cut off."""
    wrong = replace(encoded(), codes=encoded().codes.clone())
    wrong.codes[0] = wrong.codes[0].flip(0)
    data = codec.compress(counted(), wrong)
    assert data[:13] == file_of()[:13] and data[13:15] != file_of()[13:15]
    data = data[:15] + file_of()[15:23] + data[23:]  # the first checksum is its own
    for end in (len(data), len(data) - 1):
        with pytest.raises(ValueError, match="damaged: the checksum of scale 2 is wrong"):
            codec.decompress(counted(), data[:end])


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photograph in an empty folder beside a tokenizer, as options of the command."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model.safetensors"), counted(), name="counted")
    pixels = (photographs(1)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).resize((150, 90)).save("photo.png")
    return ["--tokenizer", "model.safetensors"]


def test_the_command_compresses_and_decompresses(photo, capsys):
    assert main(["compress", "photo.png", *photo]) == 0
    header, line = capsys.readouterr().out.splitlines()
    size = Path("compressed/photo.sit").stat().st_size
    assert header.split() == ["size", "bytes", "bits/px", "file"]
    assert line.split()[:3] == ["150x90", str(size), f"{8 * size / (150 * 90):.3f}"]
    assert main(["decompress", "compressed/photo.sit", *photo]) == 0
    assert main(["reconstruct", "photo.png", *photo]) == 0
    names = ("decompressed", "reconstructed")
    assert np.array_equal(*(np.asarray(Image.open(f"{name}/photo.png")) for name in names))
    save_model(Path("prior.safetensors"), sure_prior().model.float(), name="sure")
    photo += ["--prior", "prior.safetensors"]
    assert main(["compress", "photo.png", "-o", "shorter.sit", *photo]) == 0
    assert "photo.png: the prior does not help" in capsys.readouterr().err
    assert Path("shorter.sit").read_bytes() == Path("compressed/photo.sit").read_bytes()


def test_the_command_says_what_is_wrong_with_a_file(photo, capsys, monkeypatch):
    def said(*arguments, code=1):
        assert main([*arguments]) == code
        return capsys.readouterr().err

    full = replace(counted().config, decoder_attention="full")
    save_model(Path("full.safetensors"), SpectralTokenizer(full))
    other = ["--tokenizer", "full.safetensors"]
    for name, tokenizer in (("photo", photo), ("full", other)):
        said("compress", "photo.png", "-o", f"{name}.sit", *tokenizer, code=0)
        data = Path(f"{name}.sit").read_bytes()
        Path(f"cut-{name}.sit").write_bytes(data[: len(data) // 2])
    told = said("decompress", "cut-photo.sit", *photo, code=0)
    assert "cut-photo.sit was cut off: its first" in told
    assert Image.open("decompressed/cut-photo.png").width < 150
    told = said("decompress", "cut-full.sit", *other)
    assert "was cut off, and this tokenizer needs all scales" in told and "smaller" not in told
    digest = said("decompress", "photo.sit", "-o", "x.png", *other)
    digest = digest.split("give that one (digest ")[1][:8]
    assert main(["describe", "model.safetensors"]) == 0
    assert f"digest      {digest}" in capsys.readouterr().out
    Image.new("RGB", (65_536, 1)).save("wide.png")
    monkeypatch.setattr("sitlib.model.tiling.encode_image", lambda *_: pytest.fail("encoded"))
    assert "1 to 65535 px a side" in said("compress", "wide.png", *photo)
    Path("other.sit").write_bytes(b"something else")
    assert "this is no .sit file" in said("decompress", "other.sit", *photo)
    Path("sparse.sit").write_bytes(b"SIT\x01")
    os.truncate("sparse.sit", 20 * 2**30)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
    told = said("decompress", "sparse.sit", *photo)
    assert "sparse.sit: this is no .sit file: it has more than" in told


def test_threads_do_not_change_a_file():
    threads = torch.get_num_threads()
    files = []
    for count in (1, 2):
        torch.set_num_threads(count)
        files.append(codec.compress(counted(), encode_image(counted(), photographs(1))))
    torch.set_num_threads(threads)
    assert files[0] == files[1]
