"""Profiles are read strictly, and refused with sentences that say what to do."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest

from sitlib import strict
from sitlib.model.config import AutoregressiveConfig, SamplingConfig, TokenizerConfig
from sitlib.strict import ConfigError, digest, from_dict, to_dict
from workbook.paths import resolve
from workbook.profile import Profile, load_profile, profile_values

PROFILES = sorted(path.stem for path in resolve("profiles").glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def each_class_once():
    """Pydantic reads a class again for every variant of every profile, which is most of the time that these tests take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict, "TypeAdapter", functools.cache(strict.TypeAdapter))
        yield


@functools.cache
def content(name):
    return profile_values(name)


def plain(name="quick"):
    return copy.deepcopy(content(name))


def keys(value, prefix=""):
    if not isinstance(value, dict) or prefix.endswith(
        (".variants", ".sets", ".samplers")
    ):  # of which a profile may have its own
        return {prefix}
    return set().union(*(keys(item, f"{prefix}.{name}") for name, item in value.items()))


def places(value, prefix=""):
    """Dotted paths of everything in a mapping."""
    for name, item in value.items():
        yield prefix + name
        if isinstance(item, dict):
            yield from places(item, f"{prefix}{name}.")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_valid_and_has_the_keys_of_quick(name):
    profile = load_profile(name)
    assert keys(plain(name)) == keys(plain("quick"))
    assert profile.tokenizer_variant("vit_vqgan").num_scales == 1
    assert profile.tokenizer_variant("sit4").num_scales == 4


@pytest.mark.parametrize("name", PROFILES)
def test_sit4_and_the_baseline_have_equal_tokens(name):
    profile = load_profile(name)
    counts = {
        v: (c := profile.tokenizer_variant(v)).num_scales * c.tokens_per_scale
        for v in ("vit_vqgan", "sit4")
    }
    assert counts["sit4"] == counts["vit_vqgan"]


def change(path, value):
    values = plain()
    *parents, last = path.split(".")
    section = values
    for name in parents:
        section = section[name]
    if value is KeyError:
        del section[last]
    else:
        section[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("tokenizer.loss.lipps", 0.1, "did you mean 'lpips'"),
        ("tokenizer.common.widht", 64, "widht is not a known key"),
        ("data.flip", KeyError, "data.flip is missing"),
        ("data.size", "64", "valid integer"),
        ("data.size", 32, "needs a tokenizer of data.size 32 px"),
        ("tokenizer.optimizer.learning_rate", "1e-3", "write 1.0e-3"),
        ("tokenizer.optimizer.steps", 0, "steps must be at least 1"),
        ("tokenizer.variants.sit4.grid", 5, "multiple of grid * 2^levels = 40"),
        ("tokenizer.common.encoder_heads", 3, "must be a multiple of encoder_heads 3"),
        ("tokenizer.common.encoder_attention", "causal", "'full' or 'scale_causal'"),
        ("tokenizer.loss.lpips_net", "squeeze", "'alex' or 'vgg'"),
        ("tokenizer.common.wavelet", "harr", "did you mean 'haar'"),
        ("tokenizer.common.code_learning", "emma", "'gradient' or 'ema'"),
        ("tokenizer.common.code_decay", 1.0, "code_decay must lie in (0, 1)"),
        ("tokenizer.adversarial.r1_every", 0, "r1_every must be at least 1"),
        ("tokenizer.optimizer.ema_decay", 1.0, "ema_decay must lie in [0, 1)"),
        ("tokenizer.variants.sit4.loss", {"lipps": 0.1}, "did you mean 'lpips'"),
        ("tokenizer.variants.sit4.codes_from", "sit55", "did you mean 'sit5'"),
        (
            "tokenizer.variants.sit5_sc_second.code_dim",
            8,
            "code_dim cannot differ from sit5_sc, whose codes it takes over",
        ),
        (
            "tokenizer.variants.sit4.codes_from",
            "sit5_sc_second",
            "has codes of another variant itself",
        ),
        ("tokenizer.variants.sit5_sc_second.codes_from", "sit4", "codes_from must be sit5_sc"),
        (
            "tokenizer.variants.sit4.optimizer",
            None,
            "lists the keys in which the variant differs, it is None",
        ),
        ("tokenizer.loss.quantization_ramp", 99_999, "must be shorter than training"),
        (
            "tokenizer.loss.smaller",
            0.1,
            "which need several levels and decoder_attention: scale_causal",
        ),
        ("autoregressive.common.code_noise", 1.5, "code_noise must lie in [0, 1]"),
        (
            "autoregressive.common.text_noise",
            2,
            "text_noise is of texts, but this model is told classes",
        ),
        (
            "applications.text_generator",
            "ar_sit5_sc",
            "applications.text_generator: 'ar_sit5_sc' is not known",
        ),
        (
            "tokenizer.evaluation.sets.extra",
            KeyError,
            "tokenizer.evaluation.sets needs an entry `extra`",
        ),
        ("applications.temperatures", [], "temperatures must be positive numbers"),
        (
            "text.evaluation.candidates",
            151,
            "images must be at least text.evaluation.candidates = 151",
        ),
        ("applications.repeated", 10**6, "repeated must lie in 1 ... images"),
        (
            "autoregressive.evaluation.throughput_batch_size",
            0,
            "throughput_batch_size must be at least 1",
        ),
        (
            "tokenizer.variants.sit4.adversarial",
            {"weight": 0.1, "start": 99_999},
            "the adversarial term would never act",
        ),
        ("tokenizer.common.mlp_ratio", 0.001, "leaves no unit of encoder_width 128"),
        ("tokenizer.evaluation.sets.emoji.kind", "narrow", "'crops' or 'wide'"),
        (
            "tokenizer.common.num_codes",
            100_000,
            "raise data.normalization_views or lower num_codes",
        ),
        ("tokenizer.optimizer.checkpoint_every", 30, "must be a multiple of log_every"),
        ("tokenizer.optimizer.beta1", 2.0, "beta1 must lie in"),
        # codebooks
        (
            "tokenizer.variants.sit4.num_codebooks",
            3,
            "must be 1 (shared), 2 (approximation, details) or 4 (one for every scale)",
        ),
        ("tokenizer.variants.sit5.num_codebooks", 4, "or 5 (one for every scale), it is 4"),
        ("tokenizer.variants.vit_vqgan.num_codebooks", 4, "or 1 (one for every scale), it is 4"),
        ("tokenizer.common.num_codebooks", 0, "it is 0"),
        # a tokenizer variant's own data
        (
            "tokenizer.variants.captioned_sit4_sc.data",
            {"sorce": "data/emoji"},
            "did you mean 'source'",
        ),
        (
            "tokenizer.variants.captioned_sit4_sc.data",
            "data/emoji",
            "lists the keys in which the variant differs",
        ),
        (
            "tokenizer.variants.captioned_sit4_sc.data",
            {"min_crop": 0.0},
            "min_crop is a fraction in (0, 1]",
        ),
        ("tokenizer.variants.captioned_sit4_sc.data", {"flip": "no"}, "valid boolean"),
        (
            "tokenizer.variants.captioned_sit4_sc.data",
            {"normalization_views": 1},
            "raise data.normalization_views or lower num_codes",
        ),
        # autoregressive models
        ("autoregressive.variants.ar_sit4.tokenizer", "sit44", "did you mean 'sit4'"),
        ("autoregressive.variants.ar_sit4.tokenizer", "sit6", "sit6 is built for 128 px"),
        ("autoregressive.variants.ar_sit4.tokenizer", 4, "valid string"),
        ("autoregressive.variants.ar_sit4.widht", 64, "did you mean 'width'"),
        ("autoregressive.common.class_dropout", 0.1, "class_dropout is not a known key"),
        ("autoregressive.common.condition_dropout", KeyError, "condition_dropout is missing"),
        ("autoregressive.common.condition_dropout", 1.0, "condition_dropout must lie in [0, 1)"),
        ("autoregressive.common.dropout", -0.1, "dropout must lie in [0, 1)"),
        ("autoregressive.common.layers", 0, "layers must be at least 1"),
        ("autoregressive.common.heads", 3, "width 128 must be a multiple of heads 3"),
        ("autoregressive.common.heads", 0, "must be a multiple of heads 0"),
        ("autoregressive.common.mlp_ratio", 0.0, "mlp_ratio 0.0 leaves no unit of width"),
        ("autoregressive.common.norm", "batch", "'layer' or 'rms'"),
        ("autoregressive.common.mlp", "relu", "'gelu' or 'swiglu'"),
        ("autoregressive.common.positions", "sine", "'learned' or 'rotary'"),
        ("autoregressive.common.bias", 1, "valid boolean"),
        ("autoregressive.common.qk_norm", "yes", "valid boolean"),
        # a generator variant's own sampler and optimizer
        ("autoregressive.samplers", {"ar_sit44": {}}, "did you mean 'ar_sit4'"),
        ("text.samplers", {"ar_sit4": {}}, "text.samplers: 'ar_sit4' is not known"),
        ("text.samplers", {"ar_captioned_sit4_sc": {"top_q": 0.5}}, "did you mean 'top_p'"),
        ("text.samplers", {"ar_captioned_sit4_sc": {"top_p": 0.0}}, "top_p must lie in (0, 1]"),
        ("text.evaluation.top_p_sweep", [0.5, 1.5], "top_p_sweep must list numbers in (0, 1]"),
        ("autoregressive.variants.ar_sit4.optimizer", {"stps": 10}, "did you mean 'steps'"),
        (
            "autoregressive.variants.ar_sit4.optimizer",
            10,
            "lists the keys in which the variant differs",
        ),
        (
            "autoregressive.variants.ar_sit4.optimizer",
            {"steps": 10},
            "must lie in 0 ... steps = 10",
        ),
        ("autoregressive.variants.ar_sit4.optimizer", {"learning_rate": "1e-3"}, "write 1.0e-3"),
        (
            "text.variants.ar_captioned_sit4_sc.optimizer",
            {"beta1": 1.0},
            "beta1 must lie in [0, 1)",
        ),
        ("text.variants.ar_captioned_sit4_sc.optimizer", None, "differs, it is None"),
        # texts, and no texts
        (
            "text.common.text",
            None,
            "text.ar_captioned_vit_vqgan: `text` describes a text encoder, which a model",
        ),
        (
            "text.variants.ar_captioned_sit4_sc.text",
            None,
            "which a model of the section text needs",
        ),
        (
            "autoregressive.variants.ar_sit4.text",
            {"layers": 1, "vocabulary": 512, "max_tokens": 48},
            "autoregressive.ar_sit4: `text` describes a text encoder, which only models of the section text have",
        ),
        ("text.common.text", {"layers": 1, "vocabulary": 512}, "max_tokens is missing"),
        ("text.common.text.layers", 0, "layers must be at least 1"),
        ("text.common.text.vocabulary", 299, "vocabulary must be at least 300"),
        ("text.common.text.max_tokens", 1, "max_tokens must be at least 2"),
        ("text.common.tokens", 1, "tokens is not a known key"),
        (
            "text.variants.ar_captioned_sit4_sc.tokenizer",
            "captioned_sit4",
            "did you mean 'captioned_sit4_sc'",
        ),
        (
            "text.variants.ar_sit4",
            {},
            "autoregressive.variants and text.variants both have ar_sit4",
        ),
        (
            "autoregressive.variants.ar_captioned_sit4_sc",
            {},
            "autoregressive.variants and text.variants both have ar_captioned_sit4_sc",
        ),
        ("text", KeyError, "text is missing"),
        ("text.captions.per_image", 0, "per_image must be at least 1"),
        ("text.captions.source", None, "valid string"),
        ("text.evaluation.candidates", 1, "candidates must be at least 2"),
        ("text.evaluation.candidates", 100_000, "candidates 100000 are drawn from the"),
        ("text.evaluation.kid_subset_size", 1, "kid_subset_size must lie in 2 ..."),
        ("text.evaluation.kid_subset_size", 100_000, "kid_subset_size must lie in 2 ..."),
        ("text.evaluation.neighbours", 0, "neighbours must lie in 1 ..."),
        ("text.evaluation.neighbours", 100_000, "neighbours must lie in 1 ..."),
        ("text.dual_encoder.layers", 0, "layers must be at least 1"),
        ("text.dual_encoder.dim", 0, "dim must be at least 1"),
        ("text.dual_encoder.heads", 3, "must be a multiple of heads 3"),
        ("text.dual_encoder.vocabulary", 0, "vocabulary"),
        ("text.dual_encoder.max_tokens", 0, "max_tokens"),
        ("text.dual_encoder.dropout", 1.0, "dropout must lie in [0, 1)"),
        ("text.dual_encoder.optimizer.clip_norm", 0.0, "clip_norm must be positive"),
        # codes and sampling
        ("text.codes.views_per_image", 0, "views_per_image and held_out_views must be at least 1"),
        (
            "autoregressive.codes.held_out_views",
            0,
            "views_per_image and held_out_views must be at least 1",
        ),
        ("autoregressive.sampling.top_k", -1, "top_k must be 0 (off) or more"),
        ("autoregressive.sampling.top_p", 0.0, "top_p must lie in (0, 1]"),
        ("autoregressive.sampling.top_p", 1.1, "top_p must lie in (0, 1]"),
        ("autoregressive.sampling.min_p", 1.0, "min_p must lie in [0, 1)"),
        ("autoregressive.sampling.min_p", -0.1, "min_p must lie in [0, 1)"),
        ("autoregressive.sampling.batch_size", -1, "batch_size must be 0 (automatic) or more"),
        ("autoregressive.sampling.seed", -1, "seed must not be negative"),
        ("text.sampling.guidance_growth", "cosine", "'constant' or 'linear'"),
        ("text.sampling.guidance", "3", "valid number"),
        ("autoregressive.evaluation.neighbours", 100_000, "neighbours must lie in 1 ..."),
        ("autoregressive.evaluation.guidance_sweep", 1.5, "valid array"),
        ("autoregressive.evaluation.kid_subset_size", 100_000, "kid_subset_size must lie in"),
        ("autoregressive.sampling.temperature", 0.0, "temperature must be positive"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(path, value, sentence):
    with pytest.raises(ConfigError) as caught:
        from_dict(Profile, change(path, value), "quick.yaml")
    assert sentence in str(caught.value)
    assert path.split(".")[-1] in str(caught.value)
    assert not str(caught.value).endswith("..")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("autoregressive.common.width", 0),
        (
            "autoregressive.common.mlp_ratio",
            0.001,
        ),  # no hidden unit; tokenizer.common.mlp_ratio is refused
        ("autoregressive.codes.seed", -1),
        ("autoregressive.evaluation.seed", -1),
        ("autoregressive.tokenizer_seed", -1),
        ("autoregressive.optimizer.weight_decay", -1.0),
        ("autoregressive.sampling.guidance", float("nan")),
        ("text.captions.seed", -1),
        ("text.evaluation.seed", -1),
        ("text.dual_encoder.width", 0),
        # Without effect, because the variant's own size counts.
        ("tokenizer.variants.captioned_sit4_sc.data", {"size": 32}),
    ],
)
def test_what_can_only_fail_later_is_refused_at_once(path, value):
    with pytest.raises(ConfigError) as caught:
        from_dict(Profile, change(path, value), "quick.yaml")
    assert path.split(".")[-1] in str(caught.value)


def test_wrong_values_of_any_kind_end_in_sentences_or_a_profile():
    """Whatever stands at any place of a profile: never another error than one that says what to do."""
    rng, refused = np.random.default_rng(0), 0
    junk = [None, "x", -1, 0, [], {}, 1.5, True, 10**5, KeyError]
    for path in places(plain()):
        try:
            from_dict(Profile, change(path, junk[rng.integers(len(junk))]), "quick.yaml")
        except ConfigError as error:
            refused += 1
            assert all(
                line.startswith("quick.yaml: ") and line.endswith(".")
                for line in str(error).split("\n")
            )
    assert refused > 100


def test_applications_need_a_tokenizer_that_knows_small_images():
    with pytest.raises(
        ConfigError, match="applications: ar_sit4 upsamples .* tokenizer sit4 needs"
    ):
        from_dict(Profile, change("applications.class_generator", "ar_sit4"))


def test_unknown_names_list_what_there_is():
    with pytest.raises(ConfigError, match="choose one of .*quick"):
        load_profile("quikc")
    with pytest.raises(ConfigError, match="did you mean 'sit4'"):
        load_profile("quick").tokenizer_variant("sit44")
    for method in ("autoregressive_variant", "generator_section", "generator_optimizer"):
        with pytest.raises(
            ConfigError, match="autoregressive or text variant: .*did you mean 'ar_sit4'"
        ):
            getattr(load_profile("quick"), method)("ar_sit44")
    with pytest.raises(ConfigError, match="tokenizer variant: 'emoji' is not known"):
        load_profile("quick").tokenizer_data("emoji")


def test_plain_values_make_the_same_configuration_again():
    config = load_profile("quick").tokenizer_variant("sit5")
    assert from_dict(TokenizerConfig, to_dict(config)) == config


def test_digest_names_the_values_and_nothing_else():
    quick = load_profile("quick")
    assert digest(quick.data, 1) == digest(load_profile("quick").data, 1)
    assert digest(quick.data, 1) != digest(quick.data, 2)
    assert digest(quick.tokenizer_variant("sit4")) != digest(quick.tokenizer_variant("sit5"))


def test_a_variant_may_have_a_loss_and_an_optimizer_of_its_own():
    values = change("tokenizer.variants.sit4.loss", {"lpips": 0.0})
    values["tokenizer"]["variants"]["sit4"]["optimizer"] = {"steps": 1000}
    profile = from_dict(Profile, values)
    own, others = profile.tokenizer_training("sit4"), profile.tokenizer_training("sit5")
    assert own.loss.lpips == 0.0 and own.optimizer.steps == 1000
    assert others.loss.lpips > 0 and others.optimizer.steps != 1000
    assert own.loss.commitment == others.loss.commitment
    assert profile.tokenizer_variant("sit4") == load_profile("quick").tokenizer_variant("sit4")


def test_a_second_decoder_has_the_codes_of_the_first():
    profile = load_profile("quick")
    first, second = (profile.tokenizer_variant(name) for name in ("sit5_sc", "sit5_sc_second"))
    changed = {key for key, value in to_dict(second).items() if value != getattr(first, key)}
    assert changed == {"decoder_attention", "decoder_layers"}
    assert profile.tokenizer_training("sit5_sc_second").codes_from == "sit5_sc"


def test_a_variant_may_be_of_another_size():
    config = load_profile("quick").tokenizer_variant(
        "sit6"
    )  # the paper's 512 px at a quarter of the side
    assert (config.size, config.num_scales, config.num_scales * config.tokens_per_scale) == (
        128,
        6,
        96,
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_scales_share_codebooks_or_have_their_own(count):
    config = from_dict(
        Profile, change("tokenizer.variants.sit4.num_codebooks", count)
    ).tokenizer_variant("sit4")
    assert config.num_codebooks == count and config.num_scales == 4


def test_a_tokenizer_variant_may_have_images_of_its_own():
    profile = load_profile("quick")
    own, usual = profile.tokenizer_data("captioned_sit4_sc"), profile.tokenizer_data("sit4")
    assert usual == profile.data
    assert (own.source, own.flip) == ("data/emoji", False) != (usual.source, usual.flip)
    assert (
        own.normalization_views == usual.normalization_views
    )  # what it does not say is as everywhere
    assert profile.tokenizer_data("sit6").size == 128  # of the model, not of the section
    # A second decoder learns on the images of its codes, unless it says otherwise.
    values = change("tokenizer.variants.sit5_sc.data", {"source": "data/emoji", "flip": False})
    values["tokenizer"]["variants"]["sit5_sc_second"]["data"] = {"flip": True}
    second = from_dict(Profile, values).tokenizer_data("sit5_sc_second")
    assert (second.source, second.flip) == ("data/emoji", True)


def test_a_generator_variant_may_have_an_optimizer_of_its_own():
    values = change("autoregressive.variants.ar_sit4.optimizer", {"steps": 1000, "beta2": 0.9})
    values["text"]["variants"]["ar_captioned_sit4_sc"]["optimizer"] = {"steps": 700}
    profile, usual = from_dict(Profile, values), load_profile("quick")
    own = profile.generator_optimizer("ar_sit4")
    assert (own.steps, own.beta2) == (1000, 0.9)
    changed = {
        key
        for key, value in to_dict(own).items()
        if value != getattr(profile.autoregressive.optimizer, key)
    }
    assert changed == {"steps", "beta2"}
    assert profile.generator_optimizer("ar_vit_vqgan") == usual.autoregressive.optimizer
    assert profile.generator_optimizer("ar_captioned_sit4_sc").steps == 700
    assert profile.generator_optimizer("ar_captioned_vit_vqgan") == usual.text.optimizer
    assert profile.autoregressive_variant("ar_sit4") == usual.autoregressive_variant("ar_sit4")


@pytest.mark.parametrize("name", PROFILES)
def test_variants_belong_to_one_section_which_says_what_they_are_conditioned_on(name):
    profile = load_profile(name)
    for variant in profile.autoregressive.variants:
        assert profile.generator_section(variant) is profile.autoregressive
        assert profile.autoregressive_variant(variant).text is None
    for variant in profile.text.variants:
        assert profile.generator_section(variant) is profile.text
        assert profile.autoregressive_variant(variant).text.max_tokens > 1


def test_a_text_variant_may_have_a_text_encoder_of_its_own():
    values = change(
        "text.variants.ar_captioned_sit4_sc.text", {"layers": 3, "vocabulary": 300, "max_tokens": 2}
    )
    text = from_dict(Profile, values).autoregressive_variant("ar_captioned_sit4_sc").text
    assert (text.layers, text.vocabulary, text.max_tokens) == (3, 300, 2)


def test_rotary_positions_need_heads_of_a_multiple_of_four_dimensions():
    config = to_dict(load_profile("quick").autoregressive_variant("ar_sit4"))
    rotary = {**config, "positions": "rotary", "heads": 4}
    assert from_dict(AutoregressiveConfig, {**rotary, "width": 48}).width == 48
    with pytest.raises(ConfigError, match="heads of a multiple of 4 dimensions, not 6"):
        from_dict(AutoregressiveConfig, {**rotary, "width": 24})
    assert (
        from_dict(AutoregressiveConfig, {**rotary, "width": 24, "positions": "learned"}).width == 24
    )


@pytest.mark.parametrize(
    "changes", [{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "batch_size": 0}, {"guidance": 0.0}]
)
def test_everything_about_sampling_can_be_switched_off(changes):
    values = {**to_dict(load_profile("quick").autoregressive.sampling), **changes}
    assert to_dict(from_dict(SamplingConfig, values)) == values


def test_a_variant_may_be_drawn_otherwise_than_the_others_of_its_section():
    values = change("text.samplers", {"ar_captioned_vit_vqgan": {"top_p": 0.7, "guidance": 3.0}})
    profile = from_dict(Profile, values)
    usual = profile.text.sampling
    assert profile.sampler("ar_captioned_sit4_sc") == usual
    assert profile.sampler("ar_captioned_vit_vqgan") == replace(usual, top_p=0.7, guidance=3.0)
    assert profile.sampler("ar_sit4") == profile.autoregressive.sampling


def test_plain_values_make_the_same_profile_again():
    for name in PROFILES:
        profile = load_profile(name)
        assert from_dict(Profile, to_dict(profile)) == profile


def test_the_papers_improved_model_has_llamagens_blocks_and_training():
    profile = load_profile("paper")
    model, usual = (
        profile.autoregressive_variant(name) for name in ("ar_sit4_improved", "ar_sit4")
    )
    assert (model.norm, model.mlp, model.bias, model.positions) == (
        "rms",
        "swiglu",
        False,
        "rotary",
    )
    assert (
        int(model.width * model.mlp_ratio) == 2816
    )  # 2/3 of 4 times the width, up to a multiple of 256
    assert (usual.norm, usual.mlp, usual.bias, usual.positions) == (
        "layer",
        "gelu",
        True,
        "learned",
    )
    own, others = (profile.generator_optimizer(name) for name in ("ar_sit4_improved", "ar_sit4"))
    assert (
        own.steps * own.batch_size // 1_281_167 == 299
    )  # 300 epochs of ImageNet, to a third of one
    assert own != others and own.learning_rate == own.final_learning_rate == 1e-4


def test_an_optional_key_at_its_default_is_no_part_of_a_digest():
    config = load_profile("quick").tokenizer_variant("sit4")
    named = to_dict(config)
    for key in ("transform", "patch_local", "neighbour_mixing"):
        del named[key]
    assert digest(config) == digest(named)  # what was made before these keys keeps its name
    assert digest(replace(config, transform="pyramid")) != digest(config)
    assert from_dict(TokenizerConfig, named) == config
