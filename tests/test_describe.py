"""What is said of a profile before it is trained: against counts by hand and real steps."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny import python, script

from sitlib.model.tokenizer import SpectralTokenizer
from workbook.__main__ import main
from workbook.describe import cost, describe, descriptions, flops, tokenizer_subject
from workbook.profile import load_profile

SMOKE, PAPER = load_profile("smoke"), load_profile("paper")


def test_parameters_by_part_are_those_of_the_model_and_of_a_second_decoder_few_learn():
    found, second = descriptions(SMOKE, ["sit4", "sit5_sc_second"])
    model = SpectralTokenizer(SMOKE.tokenizer_variant("sit4"))
    assert found.parameters == found.cost.learning == sum(p.numel() for p in model.parameters())
    parts = found.cost.parameters
    assert parts["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert found.tokens == 64 and found.cache_bytes == 0
    parts = second.cost.parameters
    assert parts["decoder"] + parts["unembed"] < second.cost.learning < second.parameters


def test_without_the_packages_of_the_lab_a_sentence_says_how_to_install_them():
    """In a process of its own, in which nbformat cannot be imported."""
    code = "import runpy, sys; sys.modules['nbformat'] = None; sys.argv[1:] = ['describe', 'paper']"
    code += "; runpy.run_module('workbook', run_name='__main__')"
    done = python(code)
    assert done.returncode == 1 and "pip install '.[lab]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


# -- operations ------------------------------------------------------------------------------------


def paper_tokenizer(variant, batch, precision="bf16", gradient_checkpointing=False, **changes):
    """Cost of a tokenizer of the paper without LPIPS and discriminator."""
    config, training = PAPER.tokenizer_variant(variant), PAPER.tokenizer_training(variant)
    config, loss = replace(config, **changes), replace(training.loss, lpips=0.0)
    training = replace(training, loss=loss, adversarial=replace(training.adversarial, weight=0.0))
    subject = lambda: tokenizer_subject(config, training, batch)  # noqa: E731
    return cost(subject, precision, gradient_checkpointing)


def test_operations_of_the_papers_models_are_two_a_weight_and_token():
    """Two for each weight of a matrix and token; for attention two products of scores."""
    found, tokens, width = paper_tokenizer("vit_vqgan", 1), 1024, 512
    blocks = 16 * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    assert found.forward_flops == pytest.approx(blocks, rel=0.03)
    # Twice as many on the way back, where attention computes the scores again.
    assert found.step_flops == pytest.approx(3 * blocks + 16 * 2 * tokens**2 * width, rel=0.03)
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1", "2"])
def test_the_estimate_of_memory_is_what_a_real_step_takes(size):
    memory = script("benchmarks/memory.py")
    for name, subject in memory.subjects(size, pixels=64).items():
        peak = memory.measured_peak(subject)
        assert cost(subject).peak_bytes == pytest.approx(peak, rel=0.15), name


def test_nothing_is_allocated_for_a_model_of_billions():
    code = """
from dataclasses import replace
from workbook.costs import peak_mb
from workbook.describe import descriptions
from workbook.profile import load_profile

paper = load_profile("paper")
shape = {"tokenizer": "vit_vqgan", "width": 8192, "heads": 64, "layers": 4}
section = replace(paper.autoregressive, variants={"ar_vit_vqgan": shape}, samplers={})
profile = replace(paper, autoregressive=section, text=replace(paper.text, variants={}))
before = peak_mb()
(found,) = descriptions(profile, ["ar_vit_vqgan"])
print(found.parameters / 1e9, found.cost.weight_bytes / 1e9, peak_mb() - before)
"""
    done = python(code)  # a process of its own: the peak of that of the tests is high already
    parameters, gigabytes, megabytes = map(float, done.stdout.split())
    assert parameters > 3 and gigabytes > 12 and megabytes < 1000, done.stderr


@pytest.mark.parametrize("variant", ["sit6", "ar_sit5_sc", "ar_captioned_sit4_sc"])
def test_the_gpu_profile_fits_where_it_says(variant):
    """24 GB; a tenth is left for the allocator, kernels and the CUDA context."""
    (found,) = descriptions(load_profile("gpu"), [variant])
    assert 2e9 < found.gpu_bytes < 0.9 * 24e9


def described(algorithm="adamw", **changes):
    """What is said of a class-conditional model with this optimizer."""
    sections = {
        name: replace(section, optimizer=replace(section.optimizer, algorithm=algorithm))
        for name, section in (("autoregressive", SMOKE.autoregressive), ("text", SMOKE.text))
    }
    return descriptions(replace(SMOKE, **sections, **changes), ["ar_sit4"])[0]


def test_processes_share_a_batch_and_ddp_needs_its_buckets():
    engines = SMOKE.engine, replace(SMOKE.engine, processes=4)
    one, four = (described(engine=engine) for engine in engines)
    assert (one.batch, four.batch) == (16, 4)
    assert (one.extra_gradient_bytes, four.extra_gradient_bytes) == (0, 4 * four.cost.learning)
    assert four.cost.peak_bytes < one.cost.peak_bytes
    assert four.image_flops == pytest.approx(one.image_flops)
    assert one.state_bytes == 2 * 4 * one.cost.learning and one.cache_bytes == 2 * 32 * 64 * 2
    assert described("adafactor").state_bytes == one.state_bytes // 2


# -- the report ------------------------------------------------------------------------------------


def test_the_command_takes_a_profile_variants_and_a_gpu(capsys, monkeypatch):
    command = ["workbook", "describe", "smoke", "variants=[sit4, ar_captioned_sit4_sc]", "gpu=L4"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    printed = capsys.readouterr().out
    assert "Profile smoke: 1 x L4" in printed and "of 24 GB" in printed
    assert "21 TFLOP/s on each: 35% of the 60 of its data sheet" in printed
    assert {"sit4", "ar_captioned_sit4_sc"} < set(printed.split())
    assert "sit5" not in printed.split()
    monkeypatch.setattr(sys, "argv", [*command, "gpus=2"])
    with pytest.raises(ValueError, match="describe: got an unexpected keyword argument 'gpus'"):
        main()


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        ((SMOKE, []), {"gpu": "V100"}, "GPU: 'V100' is not known.*there is A100"),
        ((SMOKE, []), {"utilization": 1.5}, r"share of the peak in \(0, 1\]"),
        (("smoke", ["sit44"]), {}, "did you mean 'sit4'"),
    ],
)
def test_what_cannot_be_described_is_refused(arguments, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        describe(*arguments, **settings)
