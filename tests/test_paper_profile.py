"""The paper profile: stated values, marks on those that no text states, its variants."""

import shutil
import subprocess
import sys

import pytest
import yaml

from sitlib.train.optim import learning_rate_factor
from workbook.params import split_run
from workbook.paths import ROOT
from workbook.profile import load_profile

PAPER = load_profile("paper")
CAPTIONED = "ar_captioned_sit4_scd"


TOKENS = {  # variant: px, codes
    "vit_vqgan": (256, 1024),
    "sit4": (256, 1024),
    "sit5": (256, 1280),
    "sit6": (512, 1536),
    "vit_vqgan_512": (512, 1024),
    "vit_vqgan_512_p8": (512, 4096),
}
CAUSAL = {"sc": (True, True), "sce": (True, False), "scd": (False, True)}  # encoder, decoder


def test_tokenizers_have_the_papers_numbers_of_codes_and_attention_as_their_names_say():
    for variant, (size, tokens) in TOKENS.items():
        config = PAPER.tokenizer_variant(variant)
        assert (config.size, config.num_scales * config.tokens_per_scale) == (size, tokens), variant
    for variant in PAPER.tokenizer.variants:
        if (name := variant.split("_")[-1]) in CAUSAL:
            config = PAPER.tokenizer_variant(variant)
            sides = config.encoder_attention, config.decoder_attention
            assert tuple(side == "scale_causal" for side in sides) == CAUSAL[name], variant


def test_models_over_codes_are_trained_as_published_and_tokenizers_as_vit_vqgan():
    def rates(optimizer):
        steps = optimizer.warmup_steps, optimizer.decay_start, optimizer.steps
        return [optimizer.learning_rate * learning_rate_factor(step, optimizer) for step in steps]

    vim, parti, improved = map(
        PAPER.generator_optimizer, ("ar_sit4", CAPTIONED, "ar_sit4_improved")
    )
    assert rates(vim) == pytest.approx([4.5e-4, 4.5e-4, 1e-5])
    assert rates(parti) == pytest.approx([4.5e-5, 4.5e-5, 0.025 * 4.5e-5])
    assert (vim.decay_start, parti.decay_start) == (80_000, 85_000)
    assert all((o.algorithm, o.beta1, o.beta2) == ("adafactor", 0.9, 0.96) for o in (vim, parti))
    assert improved.algorithm == "adamw" and rates(improved) == [1e-4] * 3
    tokenizer = PAPER.tokenizer_training("sit4").optimizer
    assert tokenizer.algorithm == "adamw" and rates(tokenizer)[2] == pytest.approx(5e-5)


# -- in the pipeline -------------------------------------------------------------------------------


PARAMS = yaml.safe_load((ROOT / "params/paper.yaml").read_text())


def test_the_pipeline_reads_the_list_of_the_papers_runs(tmp_path):
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    shutil.copyfile(ROOT / "params/paper.yaml", tmp_path / "params.yaml")
    for arguments in (["init", "--no-scm", "--quiet"], ["stage", "list", "--name-only"]):
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    listed = set(done.stdout.split())
    assert {f"train_tokenizer@{run}" for run in PARAMS["tokenizers"]} <= listed
    assert {f"evaluate_text@{run}" for run in PARAMS["text_generators"]} <= listed
    assert "decode_again@ar_sit4_improved_second-seed0" in listed


@pytest.mark.parametrize("file", ["params.yaml", "params/paper.yaml"])
def test_listed_runs_are_variants_of_the_profile_and_need_runs_that_are_listed(file):
    params = yaml.safe_load((ROOT / file).read_text())
    profile = load_profile(params["profile"])
    for run, needed in params["tokenizers"].items():
        base = profile.tokenizer_training(split_run(run)[0]).codes_from
        assert needed == (f"models/tokenizer/{base}-seed{split_run(run)[1]}" if base else "weights")
        assert needed == "weights" or needed.rpartition("/")[2] in params["tokenizers"]
    for name, section in (("generators", "autoregressive"), ("text_generators", "text")):
        for run, codes in params[name].items():
            variant = split_run(run)[0]
            assert profile.autoregressive_variant(variant).tokenizer == split_run(codes)[0]
            assert params["codes"][codes] == section and codes in params["tokenizers"]
            assert profile.generator_section(variant).tokenizer_seed == split_run(codes)[1]
    for source in params["decoded_again"].values():
        generators = params["generators"] | params["text_generators"]
        assert source["of"] in generators and source["decoder"] in params["tokenizers"]


def test_every_variant_of_the_paper_but_our_own_is_trained():
    ours = {"sit4_sce", "sit4_scd"}
    small = {name for name in PAPER.tokenizer.variants if not name.endswith("_second")}
    assert small - {split_run(run)[0] for run in PARAMS["tokenizers"]} == ours
    applications = PAPER.applications
    generators = {split_run(run)[0] for run in PARAMS["generators"] | PARAMS["text_generators"]}
    assert {applications.class_generator, applications.text_generator} <= generators
