"""Upsampling, editing, previews: the given scales stay, the others are those of sampling."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CAPTIONS, PLAIN, class_and_text, model_of, photographs, prompts_of, tokenizer_of

from sitlib.sample.applications import edit, preview, refine, upsample
from sitlib.sample.generate import generate

SIZES = (4, 8, 16, 32)  # below the full size, 64 px


@class_and_text
@pytest.mark.parametrize("size", SIZES)
def test_upsampling_adds_details_and_changes_nothing_else(kind, size):
    model, tokenizer, images = model_of(kind), tokenizer_of(), photographs()
    small = F.avg_pool2d(images, 64 // size)
    result = upsample(model, tokenizer, small, prompts_of(kind, 4), PLAIN)
    given_scales = SIZES.index(size) + 1
    assert result.images.shape == images.shape
    assert torch.equal(result.codes[:, :given_scales], tokenizer.encode(small))
    # Averaged down, the result is the tokenizer's reconstruction of the input, but for clamping.
    once, whole = (
        tokenizer.to_images(tokenizer.decode_latents(tokenizer.embed_codes(codes)))
        for codes in (tokenizer.encode(small), result.codes)
    )
    torch.testing.assert_close(F.avg_pool2d(whole, 64 // size), once, atol=1e-4, rtol=0)


def test_upsampling_without_a_prompt_is_unconditional():
    model, tokenizer, small = model_of(), tokenizer_of(), F.avg_pool2d(photographs(), 8)
    unconditional = upsample(model, tokenizer, small, None, PLAIN).codes
    guided = upsample(model, tokenizer, small, 4, replace(PLAIN, guidance=7.0)).codes
    first_class = upsample(model, tokenizer, small, torch.zeros(4).long(), PLAIN).codes
    assert torch.equal(unconditional, guided) and not torch.equal(unconditional, first_class)


@class_and_text
@settings(max_examples=8, deadline=None)
@given(keep=st.integers(0, 5), seed=st.integers(0, 99))
def test_an_edit_keeps_the_codes_of_the_first_scales_to_the_bit(kind, keep, seed):
    model, tokenizer, images = model_of(kind), tokenizer_of(), photographs(2)
    sampling, prompts = replace(PLAIN, seed=seed), prompts_of(kind, 2)
    result = edit(model, tokenizer, images, prompts, np.int64(keep), sampling)
    original = tokenizer.encode(images)
    assert torch.equal(result.codes[:, :keep], original[:, :keep])
    if keep == 0:
        assert torch.equal(result.codes, generate(model, prompts, sampling))
    elif keep == 5:
        torch.testing.assert_close(result.images, tokenizer.reconstruct(images))
    else:
        assert not torch.equal(result.codes, original)


@class_and_text
@pytest.mark.parametrize("scales", [1, 2, 5])
def test_a_refined_preview_is_the_sample_that_drawing_everything_would_have_given(kind, scales):
    model, tokenizer = model_of(kind), tokenizer_of()
    prompt = 1 if kind == "class" else CAPTIONS[1]
    shown = preview(model, tokenizer, prompt, PLAIN, count=4, scales=scales)
    assert shown.codes.shape == (4, scales, 16) and shown.images.shape[-1] == 64 >> (5 - scales)
    every = [prompt] * 4 if kind == "text" else torch.full((4,), 1)
    whole = generate(model, every, PLAIN)
    for index in (0, np.int64(3)):
        finished = refine(model, tokenizer, shown, index)
        assert torch.equal(finished.codes[0], whole[index])
        torch.testing.assert_close(finished.images, tokenizer.decode(whole[index : index + 1]))


def test_a_preview_may_be_refined_in_steps_and_unconditional():
    model, tokenizer = model_of("text"), tokenizer_of()
    shown = preview(model, tokenizer, None, PLAIN, count=2)
    further = refine(model, tokenizer, shown, 1, scales=3)
    assert torch.equal(further.codes, refine(model, tokenizer, shown, 1).codes[:, :3])


def cropped(side, count=1):
    return photographs(count)[..., :side, :side]


REFUSALS = [
    (upsample, "class", (cropped(64), 1), "squares of 4 or 8 or 16 or 32 px, not 64 x 64"),
    (upsample, "class", (cropped(12), 1), "not 12 x 12"),
    (upsample, "class", (cropped(8), 2), r"codes \[2, k, 16\], .* \[1, 2, 16\]"),
    (edit, "class", (cropped(32), 1, 1), "squares of 64 px"),
    (edit, "class", (cropped(64), None, 6), "keep must lie in 0 ... 5, it is 6"),
    (preview, "class", (0, PLAIN, 8, 6), "scales must lie in 1 ... 5"),
]


@pytest.mark.parametrize(("function", "kind", "arguments", "sentence"), REFUSALS)
def test_refusals(function, kind, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(model_of(kind), tokenizer_of(), *arguments)


def test_previews_models_and_tokenizers_that_do_not_belong_together_are_refused():
    model, tokenizer, full = model_of(), tokenizer_of(), tokenizer_of("sit4")
    shown = preview(model, tokenizer, 0, PLAIN, count=2, scales=2)
    codes = r"codebooks are \(5, 16, .* tokenizer's \(4, 16"
    for sentence, function, arguments in (
        ("index must lie in 0 ... 1", refine, (model, tokenizer, shown, 2)),
        (r"k <= 1; .* \[1, 2, 16\]", refine, (model, tokenizer, shown, 0, 1)),
        (codes, edit, (model, full, photographs(1), None, 1)),
        ("attends to all", preview, (model_of("class", "sit4"), full, 0)),
        ("one size only", upsample, (model, full, photographs(1), None)),
    ):
        with pytest.raises(ValueError, match=sentence):
            function(*arguments)
