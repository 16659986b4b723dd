"""Geometry, the two codebooks, and what may depend on what."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.config import load_profile
from sitlib.geometry import SpectralGeometry
from sitlib.tokenizer import SpectralTokenizer
from sitlib.transformer import ScaleMixing
from sitlib.wavelets import dwt2

SMOKE = load_profile("smoke")
VARIANTS = list(SMOKE.tokenizer.variants)


def tokenizer_of(variant, **changes):
    torch.manual_seed(0)
    return SpectralTokenizer(replace(SMOKE.tokenizer_variant(variant), **changes)).eval()


def photographs(count=4):
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.rand(count, 3, 16, 16), size=64, mode="bicubic").clamp(0, 1)


# -- geometry: the table of the paper --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "levels", "values", "tokens"),
    [
        (256, 3, [12, 36, 144, 576], 1024),  # SIT-4
        (256, 4, [3, 9, 36, 144, 576], 1280),  # SIT-5
        (512, 5, [3, 9, 36, 144, 576, 2304], 1536),  # SIT-6
    ],
)
def test_values_per_token_are_those_of_the_paper(size, levels, values, tokens):
    geometry = SpectralGeometry(size, levels, 16)
    assert [geometry.values_per_token(scale) for scale in geometry.scales] == values
    assert geometry.num_tokens == tokens


def test_vit_vqgan_is_the_zero_level_case():
    geometry = SpectralGeometry(256, 0, 32)
    assert (geometry.num_tokens, geometry.values_per_token(1)) == (1024, 192)
    images = torch.rand(2, 3, 256, 256)
    unfolded = torch.nn.functional.unfold(images, 8, stride=8).transpose(
        1, 2
    )  # torch's own patches, channels first
    assert torch.equal(geometry.tokens([images])[0], unfolded)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_coefficients_survive_the_way_through_tokens(levels, grid, multiple):
    geometry = SpectralGeometry(grid * multiple * 2**levels, levels, grid)
    coefficients = [
        torch.rand(2, geometry.scale_channels(s), *2 * [geometry.scale_size(s)]) for s in geometry.scales
    ]
    values = geometry.tokens(coefficients)
    assert [list(v.shape[1:]) for v in values] == [
        [grid**2, geometry.values_per_token(s)] for s in geometry.scales
    ]
    for one, other in zip(geometry.coefficients(values), coefficients, strict=True):
        assert torch.equal(one, other)


def test_a_token_covers_one_part_of_the_picture_at_every_scale():
    geometry = SpectralGeometry(64, 3, 4)
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, 16:32, 32:48] = torch.rand(3, 16, 16)  # the patch in row 1, column 2
    for values in geometry.tokens(dwt2(images, "haar", 3)):
        assert (values[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [1 * 4 + 2]


def test_impossible_sizes_name_possible_ones():
    with pytest.raises(ValueError, match="multiples of 32, for example 64 or 96"):
        SpectralGeometry(70, 3, 4)


# -- tokenizer -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_values_are_normalised_and_invertible(variant):
    tokenizer, images = tokenizer_of(variant), photographs(16)
    tokenizer.measure_normalisation(images)
    values = tokenizer.token_values(images)
    for value in values:
        assert value.mean().abs() < 1e-3 and abs(value.std() - 1) < 0.02
    torch.testing.assert_close(tokenizer.images(values), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_ranges(variant):
    tokenizer, images = tokenizer_of(variant), photographs()
    config = tokenizer.config
    codes = tokenizer.encode(images)
    assert codes.shape == (4, config.num_scales, config.tokens_per_scale) and codes.dtype == torch.int64
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    output = tokenizer(images)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.reconstruction.clamp(0, 1), decoded, atol=1e-5, rtol=0)
    output.reconstruction.sum().backward()
    assert all(p.grad is not None for name, p in tokenizer.named_parameters() if "codebooks" not in name)


def test_in_mixed_precision_the_lookup_stays_exact_and_dead_codes_restart():
    tokenizer, images = tokenizer_of("sit4"), photographs()
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
        vectors = tokenizer.quantize(output.latents).vectors
    assert output.latents.dtype == vectors.dtype == torch.float32
    assert torch.equal(tokenizer.quantize(output.latents).codes, output.codes)
    moved = tokenizer.restart_dead_codes(output, after=1)
    assert all(len(codes) > 0 for codes in moved)


def test_the_two_codebooks_are_disjoint():
    tokenizer, images = tokenizer_of("sit4"), photographs()
    codes = tokenizer.encode(images)
    before = tokenizer.decode_vectors(tokenizer.quantize(tokenizer.latents(images)).vectors)
    with torch.no_grad():
        tokenizer.codebooks[0].weight.neg_()
    assert torch.equal(tokenizer.encode(images)[:, 1:], codes[:, 1:])
    assert not torch.equal(tokenizer.encode(images)[:, 0], codes[:, 0])
    assert not torch.allclose(tokenizer.decode(codes), before.clamp(0, 1))


def test_scale_mixing_is_one_map_across_the_scales_of_a_place():
    mixing, x = ScaleMixing(3, 8, causal=False), torch.randn(2, 3 * 5, 8)
    x_BSNC = x.view(2, 3, 5, 8)
    expected = x_BSNC + torch.einsum("scid,bind->bsnc", mixing.weight, x_BSNC)
    torch.testing.assert_close(mixing(x), expected.flatten(1, 2))
    assert isinstance(tokenizer_of("vit_vqgan").encoder_mixing, torch.nn.Identity)
    assert isinstance(tokenizer_of("sit4_plain").encoder_mixing, torch.nn.Identity)


def test_one_codebook_serves_all_scales():
    tokenizer = tokenizer_of("sit4", num_codebooks=1)
    assert len(tokenizer.codebooks) == 1 and tokenizer.reconstruct(photographs()).shape == (4, 3, 64, 64)


def test_scale_causal_encoder_codes_of_a_coarse_scale_ignore_finer_detail():
    tokenizer, images = tokenizer_of("sit4", encoder_attention="scale_causal"), photographs()
    small = torch.nn.functional.avg_pool2d(images, 2)
    blurred = torch.nn.functional.interpolate(
        small, scale_factor=2, mode="nearest"
    )  # the same but for the finest scale
    assert torch.equal(tokenizer.encode(blurred)[:, :3], tokenizer.encode(images)[:, :3])
    full = tokenizer_of("sit4")
    assert not torch.equal(full.latents(blurred)[:, :3], full.latents(images)[:, :3])


def test_adtransformer_has_more_parameters_but_the_baseline_has_one_type():
    sizes = {
        typed: sum(p.numel() for p in tokenizer_of("sit4", typed_parameters=typed).parameters())
        for typed in (True, False)
    }
    assert sizes[True] > sizes[False]
    assert len(tokenizer_of("vit_vqgan").encoder.blocks[0].qkv) == 1


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2", "bior4.4"])
def test_any_wavelet(wavelet):
    tokenizer, images = tokenizer_of("sit4", wavelet=wavelet), photographs()
    torch.testing.assert_close(tokenizer.images(tokenizer.token_values(images)), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_start_where_the_data_is_and_the_data_is_spread_out(variant):
    tokenizer, images = tokenizer_of(variant), photographs(64)
    tokenizer.measure_normalisation(images)
    tokenizer.initialise_codebooks(images)
    latents = tokenizer.latents(images)
    for codebook, z in zip(tokenizer.codebooks, tokenizer._split(latents), strict=True):
        z = z.flatten(0, 2)
        assert z.mean(0).abs().max() < 1e-3
        assert torch.linalg.eigvalsh(torch.cov(z.T))[-1] < 1.01  # no direction dominates
        error = codebook(z).commitment_loss.mean()
        with torch.no_grad():
            codebook.weight.normal_()
        assert error < 0.9 * codebook(z).commitment_loss.mean()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t: t.encode(torch.rand(1, 3, 32, 32)), r"takes images \[B, 3, 64, 64\]"),
        (lambda t: t.encode(torch.rand(3, 64, 64)), r"takes images \[B, 3, 64, 64\]"),
        (lambda t: t.decode(torch.zeros(1, 3, 16, dtype=torch.int64)), r"codes must be \[B, 4, 16\]"),
        (lambda t: t.decode(torch.full((1, 4, 16), 64)), r"must lie in 0 ... 63"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tokenizer_of("sit4"))


def test_a_checkpoint_opens_by_itself_and_refuses_what_it_is_not(tmp_path):
    from sitlib.autoregressive import AutoregressiveModel

    tokenizer, images = tokenizer_of("sit4"), photographs()
    tokenizer.measure_normalisation(images)
    path = tmp_path / "tokenizer.safetensors"
    tokenizer.save(path, run="x")
    again = SpectralTokenizer.from_checkpoint(path)
    assert again.config == tokenizer.config and torch.equal(
        again.reconstruct(images), tokenizer.reconstruct(images)
    )
    with pytest.raises(ValueError, match="SpectralTokenizer in its metadata"):
        AutoregressiveModel.from_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="make repro"):
        SpectralTokenizer.from_checkpoint(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SpectralTokenizer.from_checkpoint(path)
