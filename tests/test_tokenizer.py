"""Geometry, the two codebooks, and what may depend on what."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.data import held_out_views, open_images
from sitlib.model.patchify import SpectralGeometry
from sitlib.model.scales import ScaleMixing, ScaleTransformer
from sitlib.model.tiling import pad, unpad
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2
from sitlib.train.losses import TokenizerLoss
from workbook.profile import load_profile
from workbook.tokenizers import quantization

SMOKE = load_profile("smoke")
VARIANTS = [name for name in SMOKE.tokenizer.variants if SMOKE.tokenizer_variant(name).size == 64]


def tokenizer_of(variant, **changes):
    torch.manual_seed(0)
    return SpectralTokenizer(replace(SMOKE.tokenizer_variant(variant), **changes)).eval()


def photographs(count=4):
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(
        torch.rand(count, 3, 16, 16), size=64, mode="bicubic"
    ).clamp(0, 1)


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
    assert [geometry.patch_dim(scale) for scale in geometry.scales] == values
    assert geometry.num_tokens == tokens


def test_vit_vqgan_is_the_zero_level_case():
    geometry = SpectralGeometry(256, 0, 32)
    assert (geometry.num_tokens, geometry.patch_dim(1)) == (1024, 192)
    images = torch.rand(2, 3, 256, 256)
    unfolded = torch.nn.functional.unfold(images, 8, stride=8).transpose(
        1, 2
    )  # torch's own patches, channels first
    assert torch.equal(geometry.patchify([images])[0], unfolded)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_coefficients_survive_the_way_through_tokens(levels, grid, multiple):
    geometry = SpectralGeometry(grid * multiple * 2**levels, levels, grid)
    coefficients = [
        torch.rand(2, geometry.scale_channels(s), *2 * [geometry.scale_size(s)])
        for s in geometry.scales
    ]
    values = geometry.patchify(coefficients)
    assert [list(v.shape[1:]) for v in values] == [
        [grid**2, geometry.patch_dim(s)] for s in geometry.scales
    ]
    for one, other in zip(geometry.unpatchify(values), coefficients, strict=True):
        assert torch.equal(one, other)


def test_a_token_covers_one_part_of_the_picture_at_every_scale():
    geometry = SpectralGeometry(64, 3, 4)
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, 16:32, 32:48] = torch.rand(3, 16, 16)  # the patch in row 1, column 2
    for values in geometry.patchify(dwt2(images, "haar", 3)):
        assert (values[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [1 * 4 + 2]


def test_impossible_sizes_name_possible_ones():
    with pytest.raises(ValueError, match="multiples of 32, for example 64 or 96"):
        SpectralGeometry(70, 3, 4)


# -- tokenizer -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_values_are_normalized_and_invertible(variant):
    tokenizer, images = tokenizer_of(variant), photographs(16)
    tokenizer.fit_normalization(images)
    values = tokenizer.normalized_patches(images)
    for value in values:
        assert value.mean().abs() < 1e-3 and abs(value.std() - 1) < 0.02
    torch.testing.assert_close(tokenizer.images(values), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_ranges(variant):
    tokenizer, images = tokenizer_of(variant), photographs()
    config = tokenizer.config
    codes = tokenizer.encode(images)
    assert (
        codes.shape == (4, config.num_scales, config.tokens_per_scale)
        and codes.dtype == torch.int64
    )
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    output = tokenizer(images)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.reconstruction.clamp(0, 1), decoded, atol=1e-5, rtol=0)
    (output.reconstruction.sum() + output.codebook_loss).backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_the_decoder_may_be_given_a_mixture_of_outputs_and_codes():
    tokenizer, images = tokenizer_of("sit4"), photographs()
    z, q = (
        torch.nn.functional.normalize(tokenizer.latents(images), dim=-1),
        tokenizer.quantize(tokenizer.latents(images)).vectors,
    )
    for share in (0.0, 0.25, 1.0):
        expected = tokenizer.images(tokenizer.decode_latents((1 - share) * z + share * q))
        torch.testing.assert_close(
            tokenizer(images, share).reconstruction, expected, atol=1e-5, rtol=1e-4
        )
    assert [quantization(step, 4) for step in (0, 1, 4, 9)] == [
        0.0,
        0.25,
        1.0,
        1.0,
    ] and quantization(0, 0) == 1.0


def test_in_mixed_precision_the_lookup_stays_exact_and_dead_codes_restart():
    tokenizer, images = tokenizer_of("sit4"), photographs()
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
        vectors = tokenizer.quantize(output.latents).vectors
    assert output.latents.dtype == vectors.dtype == torch.float32
    assert torch.equal(tokenizer.quantize(output.latents).codes, output.codes)
    moved = tokenizer.update_codebooks(output, restart_after=1)
    assert all(len(codes) > 0 for codes in moved)


def test_in_mixed_precision_the_layers_at_the_ends_are_exact():
    """Without transformers between them nothing is left that autocast may round."""
    tokenizer, images = tokenizer_of("sit4"), photographs()
    tokenizer.encoder, tokenizer.decoder = (
        Same(tokenizer.encoder.position),
        Same(tokenizer.decoder.position),
    )
    expected = tokenizer(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizer(images)
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.reconstruction, expected.reconstruction)


def test_encoding_and_decoding_are_in_the_precision_of_the_device(monkeypatch):
    tokenizer, images, seen = tokenizer_of("sit4"), photographs(), []
    expected = tokenizer.decode(tokenizer.encode(images))
    for part in (tokenizer.encoder, tokenizer.decoder):
        part.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(
        "sitlib.model.tokenizer.mixed", lambda device: torch.autocast(device.type, torch.bfloat16)
    )
    codes = tokenizer.encode(images)
    found = tokenizer.decode(codes)
    assert seen == [True, True] and codes.dtype == torch.int64 and found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.05


class Same(torch.nn.Module):
    """A transformer that does nothing."""

    def __init__(self, position: torch.nn.Parameter):
        super().__init__()
        self.position = position

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return x_BTC


def test_the_two_codebooks_are_disjoint():
    tokenizer, images = tokenizer_of("sit4"), photographs()
    codes = tokenizer.encode(images)
    before = tokenizer.images(
        tokenizer.decode_latents(tokenizer.quantize(tokenizer.latents(images)).vectors)
    )
    with torch.no_grad():
        tokenizer.codebooks[0].weight.neg_()
    assert torch.equal(tokenizer.encode(images)[:, 1:], codes[:, 1:])
    assert not torch.equal(tokenizer.encode(images)[:, 0], codes[:, 0])
    assert not torch.allclose(tokenizer.decode(codes), before.clamp(0, 1))


def test_scale_mixing_is_one_map_across_the_scales_of_a_place():
    mixing, x = ScaleMixing(3, 8, causal=False), torch.randn(2, 3 * 5, 8)
    x_BSNC = x.view(2, 3, 5, 8)
    expected = x_BSNC + torch.einsum("scid,bind->bsnc", mixing.weight, x_BSNC)
    torch.testing.assert_close(mixing(x, 3), expected.flatten(1, 2))
    assert tokenizer_of("vit_vqgan").encoder.mixing is None
    assert tokenizer_of("sit4_plain").encoder.mixing is None


@pytest.mark.parametrize("mixes", [True, False])
def test_a_scale_causal_transformer_gives_the_first_scales_what_it_gives_them_among_all(mixes):
    torch.manual_seed(0)
    model = ScaleTransformer(4, 2, "scale_causal", 2, 16, 2, 4.0, num_types=2, mixes=mixes).double()
    x_BTC = torch.randn(3, 16, 16, dtype=torch.float64)
    for scales in (1, 2, 3):
        torch.testing.assert_close(model(x_BTC[:, : 4 * scales]), model(x_BTC)[:, : 4 * scales])
    full = ScaleTransformer(4, 2, "full", 2, 16, 2, 4.0, num_types=2, mixes=mixes).double()
    assert not torch.allclose(
        full(x_BTC)[:, :4], full(torch.cat([x_BTC[:, :4], -x_BTC[:, 4:]], 1))[:, :4]
    )


def test_one_codebook_serves_all_scales():
    tokenizer = tokenizer_of("sit4", num_codebooks=1)
    assert len(tokenizer.codebooks) == 1 and tokenizer.reconstruct(photographs()).shape == (
        4,
        3,
        64,
        64,
    )


# -- many sizes from one model ---------------------------------------------------------------------------------------------------------

BOTH = {"encoder_attention": "scale_causal", "decoder_attention": "scale_causal"}


@cache
def real_photographs():
    """Held-out photographs at 64 px."""
    source = open_images("data/landscapes", "test")
    return held_out_views(source, 12, 64, seed=3, kind="wide")[0]


def started(variant, **changes):
    """A tokenizer whose normalization and codebooks are those of photographs: its codes are many, not a few."""
    tokenizer, images = tokenizer_of(variant, **changes), real_photographs()
    tokenizer.fit_normalization(images)
    tokenizer.initialize_codebooks(images)
    return tokenizer, images


@pytest.mark.parametrize("variant", ["sit4", "sit5", "sit4_plain"])
def test_codes_of_a_downsampled_photograph_are_the_first_scales_of_the_whole(variant):
    tokenizer, images = started(variant, encoder_attention="scale_causal")
    codes = tokenizer.encode(images)
    assert tokenizer.sizes == [
        64 >> halvings for halvings in range(tokenizer.config.levels, -1, -1)
    ]
    assert len(codes.unique()) > 30
    for scales, size in enumerate(tokenizer.sizes, 1):
        small = torch.nn.functional.avg_pool2d(images, 64 // size)
        assert torch.equal(tokenizer.encode(small), codes[:, :scales]), size


def test_with_another_wavelet_or_full_attention_they_are_not():
    images = real_photographs()
    other, _ = started("sit4", encoder_attention="scale_causal", wavelet="bior4.4")
    small = torch.nn.functional.avg_pool2d(images, 2)
    assert not torch.equal(other.encode(small), other.encode(images)[:, :3])
    full = tokenizer_of("sit4")
    assert full.sizes == [64]
    with pytest.raises(ValueError, match="multiples of 64 px; an image of 32 x 32 px"):
        full.encode(small)


def test_any_first_scales_can_be_decoded_and_ignore_the_others():
    tokenizer, images = started("sit5", **BOTH)
    codes = tokenizer.encode(images)
    for scales, size in enumerate(tokenizer.sizes, 1):
        decoded = tokenizer.decode(codes, scales=scales)
        assert decoded.shape == (12, 3, size, size)
        assert torch.equal(decoded, tokenizer.decode(codes[:, :scales]))
        small = torch.nn.functional.avg_pool2d(images, 64 // size)
        torch.testing.assert_close(tokenizer.reconstruct(small), decoded, atol=1e-4, rtol=0)
        # The whole image holds the smaller one: its Haar approximation, before anything is clamped.
        vectors = tokenizer.quantize(tokenizer.latents(images)).vectors
        whole = torch.nn.functional.avg_pool2d(
            tokenizer.images(tokenizer.decode_latents(vectors)), 64 // size
        )
        alone = tokenizer.images(tokenizer.decode_latents(vectors[:, :scales]))
        torch.testing.assert_close(alone, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scales", [1, 2, 4])
def test_the_loss_may_ask_for_the_image_of_the_first_scales(scales):
    tokenizer, images = started(
        "sit5", encoder_attention="scale_causal", decoder_attention="scale_causal"
    )
    output = tokenizer(images, preview_scales=scales)
    reconstruction, target = output.preview
    pooled = torch.nn.functional.avg_pool2d
    torch.testing.assert_close(target, pooled(images, 64 // (4 << scales - 1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        reconstruction.clamp(0, 1), tokenizer.decode(output.codes, scales), atol=1e-4, rtol=0
    )
    assert tokenizer(images).preview is None
    # Weights of a plain sum: L2 in [-1, 1], without LPIPS here.
    config = replace(load_profile("smoke").tokenizer.loss, lpips=0.0, l2=3.0, smaller=0.5)
    with_it, without = (
        TokenizerLoss(config)(x, images).total for x in (output, replace(output, preview=None))
    )
    expected = 0.5 * 3.0 * (2 * (reconstruction - target)).square().mean()
    torch.testing.assert_close(with_it - without, expected, atol=1e-5, rtol=1e-3)


def test_a_full_decoder_refuses_the_first_scales_alone():
    tokenizer, images = started("sit4", encoder_attention="scale_causal")
    with pytest.raises(
        ValueError, match="2 of 4 scales cannot be decoded alone.*decoder_attention: scale_causal"
    ):
        tokenizer.decode(tokenizer.encode(images), scales=2)
    with pytest.raises(ValueError, match="scales must be a whole number in 1 ... 4"):
        tokenizer.decode(tokenizer.encode(images), scales=5)


@pytest.mark.parametrize(
    ("height", "width", "scales"),
    [(64, 128, 5), (128, 64, 5), (96, 32, 4), (24, 40, 2), (4, 12, 1)],
)
def test_images_of_any_shape_are_encoded_square_by_square(height, width, scales):
    tokenizer, photographs = started("sit5", **BOTH)
    image = torch.nn.functional.interpolate(photographs[:2], (height, width), mode="area")
    side = 4 << (scales - 1)
    codes = tokenizer.encode(image)
    assert codes.shape == (2, scales, 16 * (height // side) * (width // side))
    by_square = [
        torch.cat([tokenizer.reconstruct(square) for square in row.split(side, 3)], 3)
        for row in image.split(side, 2)
    ]
    torch.testing.assert_close(
        tokenizer.reconstruct(image), torch.cat(by_square, 2), atol=1e-5, rtol=0
    )
    # Codes are one grid over the whole image: the top left square's are its top left corner.
    grid = codes.unflatten(2, (4 * (height // side), 4 * (width // side)))
    assert torch.equal(grid[:, :, :4, :4].flatten(2), tokenizer.encode(image[:, :, :side, :side]))


def test_a_shape_has_to_be_named_where_it_is_not_square():
    tokenizer, images = started("sit4")
    codes = tokenizer.encode(torch.cat([images, images], 3))
    with pytest.raises(ValueError, match="of an image of several squares"):
        tokenizer.decode(codes)
    with pytest.raises(ValueError, match="token_grid 2 x 16 does not fit"):
        tokenizer.decode(codes, token_grid=(2, 16))
    assert tokenizer.decode(codes, token_grid=(4, 8)).shape == (12, 3, 64, 128)
    four = tokenizer.encode(
        torch.cat([images] * 4, 3)
    )  # 64 codes a scale would make a square of 8 x 8, too
    with pytest.raises(ValueError, match="of an image of several squares"):
        tokenizer.decode(four)


def test_what_need_not_be_usual():
    tokenizer, images = started("sit5", **BOTH)
    assert tokenizer.encode(images[:0]).shape == (0, 5, 16)
    assert tokenizer.reconstruct(images[:0]).shape == (0, 3, 64, 64)
    assert torch.equal(tokenizer.encode(images.double()), tokenizer.encode(images))
    flipped = images.transpose(2, 3)  # not contiguous
    assert torch.equal(tokenizer.encode(flipped), tokenizer.encode(flipped.contiguous()))
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(codes.to(torch.int16)), tokenizer.decode(codes))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17))
def test_padding_is_undone(height, width, multiple):
    images = torch.rand(1, 3, height, width)
    padded, size = pad(images, multiple)
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    assert padded.shape[2] - height < multiple and padded.shape[3] - width < multiple
    assert torch.equal(unpad(padded, size), images)
    assert torch.equal(padded[:, :, -1, -1], images[:, :, -1, -1])


def test_sit6_is_a_configuration():
    tokenizer = SpectralTokenizer(SMOKE.tokenizer_variant("sit6")).eval()
    assert [linear.in_features for linear in tokenizer.embed] == [3, 9, 36, 144, 576, 2304]
    images = torch.rand(1, 3, 128, 128)
    assert (
        tokenizer.encode(images).shape == (1, 6, 16)
        and tokenizer.reconstruct(images).shape == images.shape
    )


@pytest.mark.parametrize(
    ("variant", "encoder", "decoder"),
    # Transformer blocks only, in millions: 12 width^2 each for an ordinary block; an ADTransformer has all but the output
    # projection of attention, width^2, twice.
    [
        ("vit_vqgan", 8 * 12 * 0.512**2, 8 * 12 * 0.512**2),
        ("sit4_second", 8 * 23 * 0.512**2, 32 * 23 * 1.28**2),
    ],
)
def test_the_papers_shapes(variant, encoder, decoder):
    with torch.device("meta"):
        tokenizer = SpectralTokenizer(load_profile("paper").tokenizer_variant(variant))
    for part, expected in ((tokenizer.encoder, encoder), (tokenizer.decoder, decoder)):
        blocks = sum(p.numel() for p in part.transformer.blocks.parameters()) / 1e6
        assert blocks == pytest.approx(expected, rel=0.005)  # norms and biases on top


# -- second decoders -------------------------------------------------------------------------------------------------------------------


def test_a_second_decoder_keeps_every_code_and_only_itself_learns():
    base, images = started("sit5", **BOTH)
    second = SpectralTokenizer(SMOKE.tokenizer_variant("sit5_sc_second"))
    second.freeze_encoder_from(base)
    assert torch.equal(second.encode(images), base.encode(images))
    output = second.train()(images)
    output.reconstruction.sum().backward()
    learning = {name.split(".")[0] for name, p in second.named_parameters() if p.grad is not None}
    assert (
        learning
        == {"post_quant", "decoder", "unembed"}
        == {name.split(".")[0] for name, p in second.named_parameters() if p.requires_grad}
    )
    for different in (
        {"levels": 3, "num_codebooks": 4},
        {"wavelet": "db2"},
        {"encoder_heads": 1},
        {"encoder_attention": "full"},
    ):
        with pytest.raises(
            ValueError, match=f"{next(iter(different))}.* of the two tokenizers differ"
        ):
            tokenizer_of("sit5_sc", **different).freeze_encoder_from(base)


def test_adtransformer_has_more_parameters_but_the_baseline_has_one_type():
    sizes = {
        typed: sum(p.numel() for p in tokenizer_of("sit4", typed_parameters=typed).parameters())
        for typed in (True, False)
    }
    assert sizes[True] > sizes[False]
    assert len(tokenizer_of("vit_vqgan").encoder.transformer.blocks[0].qkv) == 1


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2", "bior4.4"])
def test_any_wavelet(wavelet):
    tokenizer, images = tokenizer_of("sit4", wavelet=wavelet), photographs()
    torch.testing.assert_close(
        tokenizer.images(tokenizer.normalized_patches(images)), images, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_start_where_the_data_is_and_the_data_is_spread_out(variant):
    tokenizer, images = tokenizer_of(variant), photographs(64)
    tokenizer.fit_normalization(images)
    tokenizer.initialize_codebooks(images)
    latents = tokenizer.latents(images)
    for codebook, z in zip(tokenizer.codebooks, tokenizer.by_codebook(latents), strict=True):
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
        (
            lambda t: t.encode(torch.rand(1, 3, 70, 64)),
            r"multiples of 64 px; an image of 70 x 64 px.*pad\(images, 64\)",
        ),
        (lambda t: t.encode(torch.rand(3, 64, 64)), r"floating point \[B, 3, H, W\]"),
        (lambda t: t.encode(torch.rand(1, 3, 64, 64) * 255), r"must lie in \[0, 1\], these span"),
        (lambda t: t.encode(torch.full((1, 3, 64, 64), float("nan"))), r"must lie in \[0, 1\]"),
        (lambda t: t.decode(torch.zeros(1, 4, 15, dtype=torch.int64)), r"N a multiple of 16"),
        (lambda t: t.decode(torch.zeros(1, 0, 16, dtype=torch.int64)), r"k in 1 ... 4"),
        (lambda t: t.decode(torch.zeros(1, 4, 16, dtype=torch.bool)), r"codes must be integers"),
        (
            lambda t: t.decode(torch.zeros(1, 4, 16, dtype=torch.int64), scales=2.5),
            r"scales must be a whole number in 1 ... 4",
        ),
        (
            lambda t: t.decode(torch.zeros(1, 4, 32, dtype=torch.int64), token_grid=(4,)),
            r"token_grid is \(rows, columns\)",
        ),
        (lambda t: pad(torch.rand(3, 8, 8), 4), r"pad takes images \[B, C, H, W\]"),
        (lambda t: t.decode(torch.zeros(1, 4, 16)), r"codes must be integers"),
        (lambda t: t.decode(torch.full((1, 4, 16), 64)), r"must lie in 0 ... 63"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tokenizer_of("sit4"))


def test_a_checkpoint_opens_by_itself_and_refuses_what_it_is_not(tmp_path):
    from sitlib.model.generator import AutoregressiveModel

    tokenizer, images = tokenizer_of("sit4"), photographs()
    tokenizer.fit_normalization(images)
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
