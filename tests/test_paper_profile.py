"""The lists of runs, the paper's and the usual ones: what the pipeline reads, whole and sound."""

import shutil

import pytest
import yaml
from dvc.repo import Repo

from workbook.params import split_run
from workbook.paths import ROOT
from workbook.profile import load_profile

PAPER = load_profile("paper")
PARAMS = yaml.safe_load((ROOT / "params/paper.yaml").read_text())


def test_the_pipeline_reads_the_list_of_the_papers_runs(tmp_path):
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    shutil.copyfile(ROOT / "params/paper.yaml", tmp_path / "params.yaml")
    repo = Repo.init(str(tmp_path), no_scm=True)
    listed = {stage.name for stage in repo.index.stages}
    repo.close()
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
