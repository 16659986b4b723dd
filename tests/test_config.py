"""Profiles are read strictly, and refused with sentences that say what to do."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest

from sitlib.strict import ConfigError, digest, from_dict, to_dict
from workbook.params import merge, read_yaml
from workbook.paths import resolve
from workbook.profile import Profile, load_profile

PROFILES = sorted(path.stem for path in resolve("profiles").glob("*.yaml"))
QUICK = load_profile("quick")


def change(path, value):
    """Plain values of the profile quick with one changed, or (KeyError) left out."""
    values = copy.deepcopy(to_dict(QUICK))
    *parents, last = path.split(".")
    section = functools.reduce(dict.__getitem__, parents, values)
    if value is KeyError:
        del section[last]
    else:
        section[last] = value
    return values


def quick_with(path, value):
    return from_dict(Profile, change(path, value), "quick.yaml")


def places(value, prefix=""):
    """Dotted paths of everything in a mapping."""
    for name, item in value.items():
        yield prefix + name
        if isinstance(item, dict):
            yield from places(item, f"{prefix}{name}.")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_a_baseline_of_as_many_tokens(name):
    profile = load_profile(name)
    baseline, sit4 = (profile.tokenizer_variant(variant) for variant in ("vit_vqgan", "sit4"))
    assert (baseline.num_scales, sit4.num_scales) == (1, 4)
    assert baseline.tokens_per_scale == 4 * sit4.tokens_per_scale
    assert from_dict(Profile, to_dict(profile)) == profile
    for variant in [*profile.autoregressive.variants, *profile.text.variants]:
        is_told_texts = profile.autoregressive_variant(variant).text is not None
        assert is_told_texts == (variant in profile.text.variants)


CAUSAL = "tokenizer.variants.captioned_sit4_sc"
REFUSED = [  # (key, value, sentence)
    # unknown and missing keys, wrong types
    ("tokenizer.loss.lipps", 0.1, "loss.lipps is not a known key (did you mean 'lpips'?)"),
    ("data.source", KeyError, "quick.yaml: data.source is missing; add it."),
    ("data.size", "64", "data.size must be a valid integer, it is '64'."),
    ("tokenizer.optimizer.learning_rate", "1e-3", "write 1.0e-3"),
    ("tokenizer.common.encoder_attention", "causal", "'full' or 'scale_causal'"),
    # numbers out of their range
    ("tokenizer.optimizer.steps", 0, "tokenizer.optimizer.steps must be greater than 0, it is 0."),
    # combinations in a section
    ("tokenizer.optimizer.checkpoint_every", 30, "must be a multiple of log_every"),
    ("tokenizer.optimizer.warmup_steps", 9999, "must lie in 0 ... steps = 1400"),
    ("tokenizer.optimizer.final_learning_rate", 1.0, "must lie in 0 ... learning_rate"),
    ("text.evaluation.candidates", 100_000, "candidates 100000 are drawn from the"),
    ("text.dual_encoder.heads", 3, "must be a multiple of heads 3"),
    ("engine.trackers", ["tensorbored"], "tensorboard"),
    ("text.evaluation.kid_subset_size", 100_000, "kid_subset_size must lie in 2 ... 184"),
    ("autoregressive.evaluation.neighbors", 100_000, "neighbors must lie in 1 ... 499"),
    ("applications.repeated", 10**6, "repeated must not be more than images = 150"),
    ("tokenizer.common.encoder_heads", 3, "must be a multiple of encoder_heads 3"),
    ("tokenizer.common.quantizer", "codebok", "'codebok' is not known: take codebook"),
    ("tokenizer.common.mlp_ratio", 0.001, "leaves no unit of encoder_width 128"),
    ("tokenizer.variants.vit_vqgan.transform", "pyramid", "transform pyramid needs levels"),
    ("tokenizer.loss.multiscale", 0.1, "needs levels and decoder_attention: scale_causal"),
    ("tokenizer.variants.sit5_sc_second.codes_from", "sit4", "codes_from must be sit5_sc"),
    ("tokenizer.variants.sit5_sc_second.code_dim", 8, "code_dim cannot differ from sit5_sc"),
    ("autoregressive.variants.ar_sit4.optimizer", {"steps": 10}, "must lie in 0 ... steps = 10"),
    ("text.samplers", {"ar_sit4": {}}, "text.samplers: 'ar_sit4' is not known"),
    ("autoregressive.variants.ar_sit4.text", {}, "which only those of text have"),
    ("engine", {"processes": 3}, "3 processes share every batch equally"),
    # tokenizers
    ("tokenizer.variants.sit4.grid_size", 5, "multiple of grid_size * 2^levels = 40"),
    ("tokenizer.common.wavelet", "harr", "'harr' is not a discrete wavelet: use haar"),
    ("tokenizer.common.num_codes", 100_000, "raise data.normalization_views or lower num_codes"),
    ("tokenizer.variants.sit4.num_codebooks", 3, "2 (approximation, details) or 4 (one for every"),
    (CAUSAL, {"transform": "lifted_wavelet", "wavelet": "db2"}, "is of haar, not db2"),
    ("tokenizer.variants.sit4.loss", {"lipps": 0.1}, "did you mean 'lpips'"),
    (f"{CAUSAL}.adversarial", {"weight": 0.1, "start": 99_999}, "adversarial term would never act"),
    (f"{CAUSAL}.data", {"sorce": "data/emoji"}, "did you mean 'source'"),
    (f"{CAUSAL}.data", {"size": 32}, "data.size: views are as large as the tokenizer"),
    ("tokenizer.variants.sit4.codes_from", "sit55", "did you mean 'sit5'"),
    ("tokenizer.variants.sit4.codes_from", "sit5_sc_second", "has codes of another variant itself"),
    # generators
    ("autoregressive.variants.ar_sit4.tokenizer", "sit44", "did you mean 'sit4'"),
    ("autoregressive.variants.ar_sit4.tokenizer", "sit6", "sit6 is built for 128 px"),
    ("autoregressive.common.text_noise", 2, "but this model is told classes"),
    ("autoregressive.samplers", {"ar_sit44": {}}, "did you mean 'ar_sit4'"),
    ("text.common.text", None, "which a model of the section text needs"),
    ("text.variants.ar_sit4", {}, "autoregressive.variants and text.variants both have ar_sit4"),
    # applications
    ("applications.text_generator", "ar_sit5_sc", "applications.text_generator: 'ar_sit5_sc'"),
    ("applications.class_generator", "ar_sit4", "so its tokenizer sit4 needs three levels"),
    ("tokenizer.evaluation.sets.extra", KeyError, "evaluation.sets needs an entry `extra`"),
    ("text.evaluation.candidates", 151, "at least text.evaluation.candidates = 151"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), REFUSED)
def test_wrong_values_are_refused_with_a_sentence(path, value, sentence):
    with pytest.raises(ConfigError) as caught:
        quick_with(path, value)
    assert sentence in str(caught.value)
    assert path.split(".")[-1] in str(caught.value)
    assert not str(caught.value).endswith("..")


def test_wrong_values_of_any_kind_end_in_sentences_or_a_profile():
    """Whatever stands at any place of a profile is refused with sentences, if at all."""
    rng, refused = np.random.default_rng(0), 0
    junk = [None, "x", -1, 0, [], {}, 1.5, True, 10**5, KeyError]
    for path in places(to_dict(QUICK)):
        try:
            quick_with(path, junk[rng.integers(len(junk))])
        except ConfigError as error:
            refused += 1
            lines = str(error).split("\n")
            assert all(line.startswith("quick.yaml: ") and line.endswith(".") for line in lines)
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {size: 1, size: 2}", "own.yaml is not valid YAML: the key size is there twice"),
        ("data: [", "own.yaml is not valid YAML"),
        ("- 1", "own.yaml must be a mapping"),
        ("base: quikc", "There is no profile 'quikc': choose one of .*quick"),
        ("base: [quick]", "base names another profile"),
        ("base: other.yaml", "other.yaml: base names another profile"),
        ("base: quick\ndata: {size: 2026-01-01}", "own.yaml: data.size .* '2026-01-01'"),
        ("caf\xe9: 1", "own.yaml is not valid YAML"),
        ("base: quick\ndta: {}", "own.yaml: dta is not a known key"),
    ],
)
def test_broken_files_are_refused_with_a_sentence(tmp_path, text, sentence):
    (tmp_path / "own.yaml").write_text(text.replace("other", f"{tmp_path}/other"), "latin-1")
    (tmp_path / "other.yaml").write_text(f"base: {tmp_path}/own.yaml")
    with pytest.raises(ConfigError, match=sentence):
        load_profile(tmp_path / "own.yaml")


def test_a_profile_says_in_what_it_differs_from_its_base(tmp_path):
    (tmp_path / "own.yaml").write_text("base: smoke\ntokenizer: {loss: {lpips: 0.5}}")
    own, smoke = load_profile(tmp_path / "own.yaml"), load_profile("smoke")
    assert own.tokenizer.loss == replace(smoke.tokenizer.loss, lpips=0.5)
    assert replace(own, tokenizer=smoke.tokenizer) == smoke
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}
    assert read_yaml(resolve("profiles/smoke.yaml"))["base"] == "quick"


def test_a_digest_names_equal_values_equally():
    config = QUICK.tokenizer_variant("sit4")
    assert digest(config, 1) == digest(load_profile("quick").tokenizer_variant("sit4"), 1)
    assert digest(config, 1) == digest(to_dict(config), 1)
    others = digest(config, 2), digest([config], 1), digest(replace(config, num_codes=8), 1)
    assert len({digest(config, 1), *others}) == 4


# -- variants --------------------------------------------------------------------------------------


def test_a_tokenizer_variant_may_differ_in_everything_and_have_images_of_its_own():
    values = change("tokenizer.variants.sit4.loss", {"lpips": 0.0})
    variants = values["tokenizer"]["variants"]
    variants["sit4"]["optimizer"] = {"steps": 1000}
    variants["sit5_sc"]["data"] = {"source": "data/emoji", "flip": False}
    variants["sit5_sc_second"]["data"] = {"flip": True}
    profile = from_dict(Profile, values)
    own, usual = profile.tokenizer_training("sit4"), QUICK.tokenizer_training("sit4")
    assert own.loss == replace(usual.loss, lpips=0.0)
    assert own.optimizer == replace(usual.optimizer, steps=1000)
    assert profile.tokenizer_training("sit5") == QUICK.tokenizer_training("sit5")
    # A second decoder has the codes of the first, and its images unless it says otherwise.
    first = profile.tokenizer_variant("sit5_sc")
    larger = replace(first, decoder_attention="full", decoder_layers=6)
    assert profile.tokenizer_variant("sit5_sc_second") == larger
    assert profile.tokenizer_training("sit5_sc_second").codes_from == "sit5_sc"
    second = profile.tokenizer_data("sit5_sc_second")
    assert (second.source, second.flip) == ("data/emoji", True)
    emoji = {"source": "data/emoji", "flip": False, "min_crop": 0.6}
    assert QUICK.tokenizer_data("captioned_sit4_sc") == replace(QUICK.data, **emoji)
    assert QUICK.tokenizer_data("sit6").size == 128  # of the model, not of the section


def test_a_generator_variant_may_have_its_own_optimizer_sampler_and_text_encoder():
    values = change("autoregressive.variants.ar_sit4.optimizer", {"steps": 1000, "beta2": 0.9})
    text = {"layers": 3, "vocab_size": 300, "max_tokens": 2}
    values["text"]["variants"]["ar_captioned_sit4_sc"] |= {"text": text}
    values["text"]["samplers"] = {"ar_captioned_vit_vqgan": {"top_p": 0.7, "guidance": 3.0}}
    profile = from_dict(Profile, values)
    usual = QUICK.autoregressive.optimizer
    assert profile.generator_optimizer("ar_sit4") == replace(usual, steps=1000, beta2=0.9)
    assert profile.generator_optimizer("ar_vit_vqgan") == usual
    assert profile.autoregressive_variant("ar_captioned_sit4_sc").text.vocab_size == 300
    sampler = replace(QUICK.text.sampling, top_p=0.7, guidance=3.0)
    assert profile.sampler("ar_captioned_vit_vqgan") == sampler
    assert profile.sampler("ar_captioned_sit4_sc") == QUICK.text.sampling
