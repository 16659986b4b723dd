"""Profiles are read strictly, and refused with sentences that say what to do."""

import copy

import pytest
import yaml

from sitlib.config import ConfigError, Profile, TokenizerConfig, digest, from_dict, load_profile, to_dict
from sitlib.paths import resolve

PROFILES = sorted(path.stem for path in resolve("profiles").glob("*.yaml"))


def plain(name="quick"):
    return yaml.safe_load(resolve(f"profiles/{name}.yaml").read_text())


def keys(value, prefix=""):
    if not isinstance(value, dict) or prefix.endswith(
        (".variants", ".sets")
    ):  # of which a profile may have its own
        return {prefix}
    return set().union(*(keys(item, f"{prefix}.{name}") for name, item in value.items()))


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
        v: (c := profile.tokenizer_variant(v)).num_scales * c.tokens_per_scale for v in ("vit_vqgan", "sit4")
    }
    assert counts["sit4"] == counts["vit_vqgan"]


def change(path, value):
    values = copy.deepcopy(plain())
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
        ("tokenizer.optimiser.learning_rate", "1e-3", "write 1.0e-3"),
        ("tokenizer.optimiser.steps", 0, "steps must be at least 1"),
        ("tokenizer.variants.sit4.grid", 5, "multiple of grid * 2^levels = 40"),
        ("tokenizer.common.encoder_heads", 3, "must be a multiple of encoder_heads 3"),
        ("tokenizer.common.encoder_attention", "causal", "'full' or 'scale_causal'"),
        ("tokenizer.loss.lpips_net", "squeeze", "'alex' or 'vgg'"),
        ("tokenizer.common.wavelet", "harr", "did you mean 'haar'"),
        ("tokenizer.common.code_learning", "emma", "'gradient' or 'ema'"),
        ("tokenizer.common.code_decay", 1.0, "code_decay must lie in (0, 1)"),
        ("tokenizer.adversarial.r1_every", 0, "r1_every must be at least 1"),
        ("tokenizer.optimiser.ema_decay", 1.0, "ema_decay must lie in [0, 1)"),
        ("tokenizer.variants.sit4.loss", {"lipps": 0.1}, "did you mean 'lpips'"),
        ("tokenizer.variants.sit4.codes_from", "sit55", "did you mean 'sit5'"),
        (
            "tokenizer.variants.sit5_sc_second.code_dim",
            8,
            "code_dim cannot differ from sit5_sc, whose codes it takes over",
        ),
        ("tokenizer.variants.sit4.codes_from", "sit5_sc_second", "has codes of another variant itself"),
        ("tokenizer.variants.sit5_sc_second.codes_from", "sit4", "codes_from must be sit5_sc"),
        (
            "tokenizer.variants.sit4.optimiser",
            None,
            "lists the keys in which the variant differs, it is None",
        ),
        ("tokenizer.loss.quantization_ramp", 99_999, "must be shorter than training"),
        (
            "tokenizer.variants.sit4.adversarial",
            {"weight": 0.1, "start": 99_999},
            "the adversarial term would never act",
        ),
        ("tokenizer.common.mlp_ratio", 0.001, "leaves no unit of encoder_width 128"),
        ("tokenizer.evaluation.sets.emoji.kind", "narrow", "'crops' or 'wide'"),
        ("tokenizer.common.num_codes", 100_000, "raise data.normalisation_views or lower num_codes"),
        ("tokenizer.optimiser.checkpoint_every", 30, "must be a multiple of log_every"),
        ("tokenizer.optimiser.beta1", 2.0, "beta1 must lie in"),
        ("autoregressive.variants.ar_sit4.tokenizer", "sit44", "did you mean 'sit4'"),
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


def test_unknown_names_list_what_there_is():
    with pytest.raises(ConfigError, match="choose one of .*quick"):
        load_profile("quikc")
    with pytest.raises(ConfigError, match="did you mean 'sit4'"):
        load_profile("quick").tokenizer_variant("sit44")


def test_plain_values_make_the_same_configuration_again():
    config = load_profile("quick").tokenizer_variant("sit5")
    assert from_dict(TokenizerConfig, to_dict(config)) == config


def test_digest_names_the_values_and_nothing_else():
    quick = load_profile("quick")
    assert digest(quick.data, 1) == digest(load_profile("quick").data, 1)
    assert digest(quick.data, 1) != digest(quick.data, 2)
    assert digest(quick.tokenizer_variant("sit4")) != digest(quick.tokenizer_variant("sit5"))


def test_a_variant_may_have_a_loss_and_an_optimiser_of_its_own():
    values = change("tokenizer.variants.sit4.loss", {"lpips": 0.0})
    values["tokenizer"]["variants"]["sit4"]["optimiser"] = {"steps": 1000}
    profile = from_dict(Profile, values)
    own, others = profile.tokenizer_training("sit4"), profile.tokenizer_training("sit5")
    assert own.loss.lpips == 0.0 and own.optimiser.steps == 1000
    assert others.loss.lpips > 0 and others.optimiser.steps != 1000
    assert own.loss.commitment == others.loss.commitment
    assert profile.tokenizer_variant("sit4") == load_profile("quick").tokenizer_variant("sit4")


def test_a_second_decoder_has_the_codes_of_the_first():
    profile = load_profile("quick")
    first, second = (profile.tokenizer_variant(name) for name in ("sit5_sc", "sit5_sc_second"))
    changed = {key for key, value in to_dict(second).items() if value != getattr(first, key)}
    assert changed == {"decoder_attention", "decoder_layers"}
    assert profile.tokenizer_training("sit5_sc_second").codes_from == "sit5_sc"


def test_a_variant_may_be_of_another_size():
    config = load_profile("quick").tokenizer_variant("sit6")  # the paper's 512 px at a quarter of the side
    assert (config.size, config.num_scales, config.num_scales * config.tokens_per_scale) == (128, 6, 96)
