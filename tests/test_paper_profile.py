"""The paper profile: values that texts state, marks on those that none does, and how its variants come into the pipeline."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from workbook.paths import ROOT
from workbook.profile import load_profile

PAPER = load_profile("paper")


def test_the_improved_model_is_drawn_as_llamagens_and_the_others_without_guidance():
    own, usual = PAPER.sampler("ar_sit4_improved"), PAPER.sampler("ar_sit4")
    assert (own.guidance, own.temperature, own.top_k, own.top_p) == (2.0, 1.0, 0, 1.0)
    assert (usual.guidance, PAPER.sampler("ar_captioned_sit4_scd").guidance) == (1.0, 1.2)


def test_every_image_has_the_codes_of_ten_crops():
    codes = PAPER.autoregressive.codes
    assert codes.views_per_image * (1 + codes.mirrored) == 10


def test_partis_learning_rate_ends_at_its_ratio():
    assert PAPER.text.optimizer.final_learning_rate == pytest.approx(
        0.025 * PAPER.text.optimizer.learning_rate
    )


@pytest.mark.parametrize(
    ("variant", "size", "tokens"),
    [
        ("vit_vqgan", 256, 1024),
        ("sit4", 256, 1024),
        ("sit5", 256, 1280),
        ("sit6", 512, 1536),
        ("vit_vqgan_512", 512, 1024),
    ],
)
def test_tokenizers_have_the_papers_numbers_of_codes(variant, size, tokens):
    config = PAPER.tokenizer_variant(variant)
    assert (config.size, config.num_scales * config.tokens_per_scale) == (size, tokens)


@pytest.mark.parametrize("prefix", ["", "captioned_"])
@pytest.mark.parametrize(
    ("name", "causal"), [("sc", (True, True)), ("sce", (True, False)), ("scd", (False, True))]
)
def test_scale_causal_attention_is_where_the_name_says(prefix, name, causal):
    variant = "sit5_sc" if (prefix, name) == ("", "sc") else f"{prefix}sit4_{name}"
    config = PAPER.tokenizer_variant(variant)
    assert (
        config.encoder_attention == "scale_causal",
        config.decoder_attention == "scale_causal",
    ) == causal


@pytest.mark.parametrize(
    "codes",
    ["vit_vqgan", "sit4", "captioned_vit_vqgan", "captioned_sit4_scd", "captioned_sit4_sce"],
)
def test_for_generation_there_is_a_large_decoder_that_sees_what_the_small_one_does(codes):
    small, large = PAPER.tokenizer_variant(codes), PAPER.tokenizer_variant(f"{codes}_second")
    assert (large.decoder_layers, large.decoder_width, large.decoder_heads) == (32, 1280, 16)
    assert large.decoder_attention == small.decoder_attention


# -- in the pipeline -------------------------------------------------------------------------------------------------------------------


def stages(folder, overrides):
    """Names of the stages of the pipeline once `-S` has changed params.yaml."""
    for name in ("dvc.yaml", "params.yaml", "profiles/paper.yaml", "profiles/quick.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    apply_overrides(folder / "params.yaml", overrides)
    for arguments in (["init", "--no-scm", "--quiet"], ["stage", "list", "--name-only"]):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def documented_overrides():
    """Of the command in docs/scale.md that trains the paper's tables."""
    text = (ROOT / "docs/scale.md").read_text().replace("\\\n", " ")
    (command,) = [
        line
        for line in text.splitlines()
        if "dvc exp run" in line and "improved_generators" in line
    ]
    words = shlex.split(command)
    return [words[i + 1] for i, word in enumerate(words) if word == "-S"]


def test_the_documented_command_trains_every_model_of_the_paper(tmp_path):
    overrides = documented_overrides()
    found, parameters = (
        stages(tmp_path, overrides),
        yaml.safe_load((tmp_path / "params.yaml").read_text()),
    )
    assert parameters["profile"] == "paper"
    lists = (
        "tokenizers",
        "generators",
        "text_generators",
        "improved_generators",
        "second_decoders",
    )
    assert {key.partition("=")[0] for key in overrides} >= set(lists)
    for name in parameters["tokenizers"]:
        assert {f"train_tokenizer@{name}-0", f"evaluate_tokenizer@{name}-0"} <= found
    assert {f"train_autoregressive@{name}-0" for name in ("vit_vqgan", "sit4")} <= found
    assert {"train_improved@sit4-0", "evaluate_improved@sit4-0", "extract_codes@sit4"} <= found
    assert {
        f"train_text@captioned_{name}-0" for name in ("vit_vqgan", "sit4_scd", "sit4_sce")
    } <= found
    # What stages train are variants of the profile, on codes of tokenizers that others train.
    for name in parameters["tokenizers"] + [
        f"{name}_second" for name in parameters["second_decoders"]
    ]:
        PAPER.tokenizer_variant(name)
    names = parameters["generators"] + parameters["text_generators"]
    names += [f"{name}_improved" for name in parameters["improved_generators"]]
    for name in names:
        assert PAPER.autoregressive_variant(f"ar_{name}").tokenizer == name.removesuffix(
            "_improved"
        )
        assert name.removesuffix("_improved") in parameters["tokenizers"]
    assert set(parameters["second_generators"]) <= set(parameters["second_decoders"])
    assert set(parameters["second_decoders"]) <= set(parameters["tokenizers"])
    applications = PAPER.applications
    for name in (applications.class_generator, applications.text_generator):
        assert name.removeprefix("ar_") in names
    # Every variant but our own is trained.
    ours = {"sit4_sce", "sit4_scd"}
    small = {name for name in PAPER.tokenizer.variants if not name.endswith("_second")}
    assert small - set(parameters["tokenizers"]) == ours


def test_improved_models_are_of_the_variants_of_the_same_name_and_of_no_tokenizer_of_their_own():
    described = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for usual, improved in (
        ("train_autoregressive", "train_improved"),
        ("evaluate_autoregressive", "evaluate_improved"),
    ):
        text = yaml.safe_dump(described[usual], width=10_000).replace(
            "ar_${item.tokenizer}", "ar_${item.tokenizer}_improved"
        )
        text = re.sub(rf"{usual}(?=[@-])", improved, text).replace(
            "${generators}", "${improved_generators}"
        )
        expected = yaml.safe_load(text) | {"desc": described[improved]["desc"]}
        assert described[improved] == expected


def test_without_being_asked_for_no_other_model_is_trained(tmp_path):
    found = stages(tmp_path, [])
    assert "train_autoregressive@sit4-0" in found and not any("improved" in name for name in found)
