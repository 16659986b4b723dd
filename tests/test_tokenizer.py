"""Geometry, codebooks, what may depend on what; images of any size in tiles."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from sitlib.data import held_out_views, open_images
from sitlib.metrics import code_counts, codebook_statistics
from sitlib.model.patchify import SpectralGeometry, add_overlaps, patchify
from sitlib.model.quantizer import QUANTIZERS, Codebook, Quantized
from sitlib.model.tiling import ImageCodes, decode_codes
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.codebooks import initialize_codebooks, reset_dead_codes, take_over_codes
from sitlib.train.losses import border_error
from workbook.profile import load_profile

SMOKE = load_profile("smoke")
VARIANTS = [name for name in SMOKE.tokenizer.variants if SMOKE.tokenizer_variant(name).size == 64]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
CAUSAL = {"encoder_attention": "scale_causal", "decoder_attention": "scale_causal"}


def tokenizer_of(variant, **changes):
    torch.manual_seed(0)
    return SpectralTokenizer(replace(SMOKE.tokenizer_variant(variant), **changes)).eval()


def blobs(count=4):
    torch.manual_seed(1)
    return F.interpolate(torch.rand(count, 3, 16, 16), size=64, mode="bicubic").clamp(0, 1)


@cache
def photographs():
    source = open_images("data/landscapes", "test")
    return held_out_views(source, 12, 64, seed=3, kind="wide")[0]


def started(variant, **changes):
    """With normalization and codebooks of photographs: its codes are many, not a few."""
    tokenizer, images = tokenizer_of(variant, **changes), photographs()
    tokenizer.fit_normalization(images)
    initialize_codebooks(tokenizer, images)
    return tokenizer, images


def assert_near(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def decoded(tokenizer, vectors):
    """Not clamped."""
    return tokenizer.to_images(tokenizer.decode_latents(vectors))


# -- geometry: the table of the paper --------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3, 8])
def test_overlapping_patches_add_up(patch):
    rows, columns, m = 2, 3, (patch + 1) // 2
    written = torch.randn(2, rows * columns, 5 * (patch + 2 * m) ** 2)
    sums = torch.zeros(2, 5, rows * patch + 2 * m, columns * patch + 2 * m)
    for token, values in enumerate(written.unbind(1)):
        top, left = (patch * place for place in divmod(token, columns))
        block = values.unflatten(1, (5, patch + 2 * m, patch + 2 * m))
        sums[:, :, top : top + patch + 2 * m, left : left + patch + 2 * m] += block
    inside = sums[:, :, m:-m, m:-m]
    assert_near(add_overlaps(written, patch, columns), patchify(inside, patch), 1e-5)


@every_variant
def test_with_overlap_neighbors_are_written_too(variant):
    """A change of one token reaches half a patch of the pixels around it, and no farther."""
    tokenizer = tokenizer_of(variant, overlap=True)
    geometry = tokenizer.geometry
    grids = zip(geometry.grids, geometry.scales, strict=True)
    patches = [torch.zeros(1, grid**2, geometry.written_dim(scale)) for grid, scale in grids]
    patches[-1][0, 0] = 1.0  # the first token of the finest scale
    (finest,) = geometry.unpatchify(geometry.add_overlaps(patches))[-1]
    reach = geometry.patch_size(geometry.scales[-1]) * 3 // 2
    expected = torch.zeros_like(finest)
    expected[:, :reach, :reach] = 1
    assert torch.equal(finest, expected)


def test_refinement_is_of_whole_images_and_starts_as_nothing():
    tokenizer, images = started("sit5", **CAUSAL, refine=8)
    plain, _ = started("sit5", **CAUSAL)
    plain.load_state_dict(tokenizer.state_dict(), strict=False)
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(codes), plain.decode(codes))
    torch.nn.init.normal_(tokenizer.refine.write.weight, std=0.01)
    assert not torch.equal(tokenizer.decode(codes), plain.decode(codes))
    assert torch.equal(tokenizer.decode(codes, 4), plain.decode(codes, 4))
    assert torch.equal(tokenizer.encode(images), codes)


@pytest.mark.parametrize("side", [2, 8])
def test_the_border_term_is_of_borders_alone(side):
    error = torch.rand(2, 3, 16, 16)
    expected = 0.0
    for image in (error, error.transpose(2, 3)):
        steps = [image[:, :, row] - image[:, :, row - 1] for row in range(side, 16, side)]
        expected += torch.stack(steps).abs().mean()
    assert_near(border_error(error, side), expected, 1e-6)


@pytest.mark.parametrize(
    ("size", "levels", "dims", "tokens"),
    [
        (256, 3, [12, 36, 144, 576], 1024),  # SIT-4
        (256, 4, [3, 9, 36, 144, 576], 1280),  # SIT-5
        (512, 5, [3, 9, 36, 144, 576, 2304], 1536),  # SIT-6
    ],
)
def test_patch_dims_are_those_of_the_paper(size, levels, dims, tokens):
    geometry = SpectralGeometry(size, levels, 16)
    assert [geometry.patch_dim(scale) for scale in geometry.scales] == dims
    assert geometry.num_tokens == tokens


def test_vit_vqgan_is_the_zero_level_case():
    geometry, images = SpectralGeometry(256, 0, 32), torch.rand(2, 3, 256, 256)
    assert (geometry.num_tokens, geometry.patch_dim(1)) == (1024, 192)
    unfolded = F.unfold(images, 8, stride=8).transpose(1, 2)  # torch's own patches
    assert torch.equal(geometry.patchify([images])[0], unfolded)


# -- one pass --------------------------------------------------------------------------------------


CASES = [
    *((variant, {}) for variant in VARIANTS),
    *(("sit4", {"transform": name}) for name in ("pyramid", "pyramid_nearest", "lifted_wavelet")),
    ("sit4", {"typed_parameters": "mlp", "num_codebooks": 1, **CAUSAL}),
]


@pytest.mark.parametrize(("variant", "changes"), CASES)
def test_shapes_and_ranges(variant, changes):
    tokenizer, images = tokenizer_of(variant, **changes), blobs(16)
    tokenizer.fit_normalization(images)
    patches = tokenizer.normalized_patches(images)
    assert all(x.mean().abs() < 1e-3 and abs(x.std() - 1) < 0.02 for x in patches)
    assert_near(tokenizer.to_images(patches), images, 1e-5)
    config, codes = tokenizer.config, tokenizer.encode(images)
    assert codes.shape == (16, config.num_scales, config.tokens_per_scale)
    back = tokenizer.decode(codes)
    assert back.shape == images.shape and back.min() >= 0 and back.max() <= 1
    output = tokenizer(images)
    assert torch.equal(output.codes, codes) and codes.dtype == torch.int64
    assert_near(output.reconstruction.clamp(0, 1), back, 1e-5)
    (output.reconstruction.sum() + output.codebook_loss).backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_in_mixed_precision_lookup_and_outer_layers_stay_exact():
    tokenizer, images = tokenizer_of("sit4"), blobs()
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
        vectors = tokenizer.quantize(output.latents).vectors
    assert output.latents.dtype == vectors.dtype == torch.float32
    assert torch.equal(tokenizer.quantize(output.latents).codes, output.codes)
    parts = map(tokenizer.by_codebook, (output.latents, output.codes))
    for codebook_z_codes in zip(tokenizer.codebooks, *parts, strict=True):
        assert reset_dead_codes(*codebook_z_codes, after=1).any()
    # Without transformers between them nothing is left that autocast may round.
    tokenizer.encoder = tokenizer.decoder = torch.nn.Identity()
    expected = tokenizer(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
    assert torch.equal(output.latents, expected.latents)
    assert torch.equal(output.reconstruction, expected.reconstruction)


def test_a_new_quantizer_is_a_class_with_a_name(monkeypatch):
    class Signs(Codebook):
        """Lookup-free: codes are the signs of two dimensions; latents are of any length."""

        codes_are_fixed = True

        def project(self, z):
            return z

        def forward(self, z):
            codes = (z[..., 0] > 0).long() + 2 * (z[..., 1] > 0)
            error = (z - self.lookup(codes)).square().mean(-1)
            return Quantized(self.lookup(codes), codes, error, error)

    monkeypatch.setitem(QUANTIZERS, "signs", Signs)
    tokenizer = tokenizer_of("sit4", quantizer="signs", num_codes=4)
    codes = tokenizer.encode(blobs())
    assert codes.max() <= 3 and tokenizer.decode(codes).shape == (4, 3, 64, 64)
    with pytest.raises(ValueError, match="quantizer 'other' is not known: take codebook, signs"):
        tokenizer_of("sit4", quantizer="other")


@every_variant
def test_codes_start_where_the_data_is_and_the_data_is_spread_out(variant):
    tokenizer, images = tokenizer_of(variant), blobs(64)
    tokenizer.fit_normalization(images)
    initialize_codebooks(tokenizer, images)
    latents = tokenizer.by_codebook(tokenizer.latents(images))
    for codebook, z in zip(tokenizer.codebooks, latents, strict=True):
        z = z.flatten(0, 2)
        assert z.mean(0).abs().max() < 1e-3
        assert torch.linalg.eigvalsh(torch.cov(z.T))[-1] < 1.01  # no direction dominates
        error = codebook(z).commitment_loss.mean()
        with torch.no_grad():
            codebook.weight.normal_()
        assert error < 0.95 * codebook(z).commitment_loss.mean()  # 4 codes gain least


def test_equal_grids_counted_in_shorter_runs_are_the_usual_model():
    usual, images = started("sit4")
    runs, _ = started("sit4", grid_size=2, grid_sizes=[4, 4, 4, 4])
    codes = runs.encode(images)
    assert codes.shape == (12, 16, 4)
    assert torch.equal(codes.flatten(1), usual.encode(images).flatten(1))
    assert torch.equal(runs.decode(codes), usual.reconstruct(images))


@pytest.mark.parametrize(
    ("grids", "first"), [([2, 4, 4, 8], [1, 5, 9]), ([8, 4, 4, 2], [16, 20, 24])]
)
def test_scales_may_have_different_numbers_of_tokens(grids, first):
    sizes = [40, 30, 20, 10]
    changes = {"grid_size": 2, "grid_sizes": grids, "num_codebooks": 4, "num_codes": sizes}
    tokenizer, images = started("sit4", **changes)
    config, codes = tokenizer.config, tokenizer.encode(images)
    assert codes.shape == (12, 25, 4) and config.num_scales == 25
    assert config.bits() == pytest.approx(
        sum(side**2 * math.log2(size) for side, size in zip(grids, sizes, strict=True))
    )
    parts = codes.tensor_split(first, dim=1)
    assert all(int(part.max()) < size for part, size in zip(parts, sizes, strict=True))
    usage = codebook_statistics(code_counts(codes, 40), 12, config)["codebooks"].values()
    for part, size, of_book in zip(parts, sizes, usage, strict=True):
        assert of_book["usage"] == pytest.approx(100 * len(part.unique()) / size)
    output = tokenizer(images)
    (output.reconstruction.sum() + output.codebook_loss).backward()
    assert all(p.grad is not None for p in tokenizer.parameters())
    assert_near(tokenizer.to_images(tokenizer.normalized_patches(images)), images, 1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid_sizes": [4, 4, 4]}, r"4 multiples of grid_size 4 that divide \[8, 8, 16, 32\]"),
        ({"grid_sizes": [4, 4, 4, 6]}, "grid_sizes must be 4 multiples"),
        ({"grid_sizes": [16, 4, 4, 4], "transform": "pyramid"}, r"divide \[8, 16, 32, 64\]"),
        ({"grid_sizes": [4, 4, 4, 8], "scale_mixing": True}, "full attention and no mixing"),
        ({"grid_sizes": [4, 4, 4, 8], **CAUSAL}, "full attention and no mixing"),
        ({"typed_parameters": "separate", **CAUSAL}, "separate needs details, and full attention"),
        ({"typed_parameters": "separate", "levels": 0}, "separate needs details"),
    ],
)
def test_what_cannot_be_combined(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokenizer_of("sit4", **changes)


# -- second decoders, files, refusals --------------------------------------------------------------


def test_a_second_decoder_keeps_every_code_and_only_itself_learns():
    base, images = started("sit5_sc")
    second = SpectralTokenizer(SMOKE.tokenizer_variant("sit5_sc_second"))
    take_over_codes(second, base)
    assert torch.equal(second.encode(images), base.encode(images))
    second.train()(images).reconstruction.sum().backward()
    parameters = dict(second.named_parameters())
    learning = {name.split(".")[0] for name, p in parameters.items() if p.grad is not None}
    trainable = {name.split(".")[0] for name, p in parameters.items() if p.requires_grad}
    assert learning == trainable == {"post_quant", "decoder", "unembed"}
    for key, value in (("wavelet", "db2"), ("encoder_heads", 1), ("encoder_attention", "full")):
        with pytest.raises(ValueError, match=f"{key}.* of the two tokenizers differ"):
            take_over_codes(tokenizer_of("sit5_sc", **{key: value}), base)


def integers(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t: t.encode(torch.rand(1, 3, 70, 64)), "not 70 x 64: .*sitlib.model.tiling"),
        (lambda t: t.encode(torch.rand(3, 64, 64)), r"floating point tensor \[B, 3, H, W\]"),
        (lambda t: t.encode(torch.rand(1, 3, 64, 64) * 255), r"must lie in \[0, 1\], these span"),
        (lambda t: t.encode(torch.full((1, 3, 64, 64), float("nan"))), r"must lie in \[0, 1\]"),
        (lambda t: t.decode(integers(1, 4, 15)), r"codes must be integers \[B, 1 ... 4, 16\]"),
        (lambda t: t.decode(torch.full((1, 4, 16), 64)), "must lie in 0 ... 63"),
        (lambda t: t.decode(integers(1, 4, 16), scales=5), "scales must be in 1 ... 4"),
        (lambda t: t.decode(integers(1, 4, 16), scales=2), "2 of 4 scales cannot.*scale_causal"),
        (
            lambda t: decode_codes(t, ImageCodes(integers(4, 32), (64, 128), (4, 4))),
            r"grid of 128x64 px are 1 \.\.\. 4, \(32, 4, 8\), not \(4, 32, 4, 4\)",
        ),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tokenizer_of("sit4"))


def test_scales_may_have_codebooks_of_different_sizes():
    tokenizer = tokenizer_of("sit4", num_codebooks=4, num_codes=[32, 16, 8, 2])
    assert tokenizer.config.bits() == 16 * (5 + 4 + 3 + 1) and tokenizer.config.bits(2) == 16 * 9
    codes = tokenizer.encode(blobs())
    assert all(int(codes[:, s].max()) < size for s, size in enumerate([32, 16, 8, 2]))
    codes[0, 3, 0] = 2
    with pytest.raises(ValueError, match=r"codes of scale 4 must lie in 0 \.\.\. 1"):
        tokenizer.decode(codes)
    for wrong in ({"num_codes": [32, 16, 8]}, {"num_codebooks": 2}):
        with pytest.raises(ValueError, match="one for every scale"):
            replace(tokenizer.config, **wrong)


@pytest.mark.parametrize("changes", [{}, {"levels": 0}, {"transform": "pyramid"}])
def test_without_standardization_coefficients_are_those_of_pixels_around_zero(changes):
    tokenizer, images = started("sit4", standardize=False, **changes)
    geometry = tokenizer.geometry
    expected = geometry.patchify(geometry.forward(2 * images - 1))
    assert_near(tokenizer.normalized_patches(images), expected, 1e-5)
    assert_near(tokenizer.to_images(expected), images, 1e-5)
