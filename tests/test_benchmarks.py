"""The benchmarks run, and count what they say they count."""

import importlib.util
import re

import pytest
import torch

from sitlib.paths import ROOT


@pytest.fixture
def benchmark():
    """benchmarks/tokenizer.py as a module; the number of threads is put back."""
    spec = importlib.util.spec_from_file_location("tokenizer_benchmark", ROOT / "benchmarks" / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_tokenizer_benchmark_prints_a_ratio_for_every_operation(
    benchmark, weights_folder, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark, "ensure_weights", lambda: None)
    with_weights = benchmark.TokenizerLoss
    monkeypatch.setattr(benchmark, "TokenizerLoss", lambda config: with_weights(config, str(weights_folder)))
    monkeypatch.setattr(benchmark, "SQUARES", (64,))
    benchmark.main(["--profile", "smoke", "--geometry", "profile", "--repetitions", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    ratios = re.findall(r"(training step|encode|decode) +SIT-4 / ViT-VQGAN: (\S+) in time", printed)
    assert [name for name, _ in ratios] == ["training step", "encode", "decode"]
    assert all(0.1 < float(ratio) < 10 for _, ratio in ratios)


def test_both_models_of_both_geometries_have_as_many_tokens(benchmark):
    profile = benchmark.load_profile("quick")
    for geometry, tokens in (("profile", 64), ("paper", 1024)):
        configs = benchmark.configurations(profile, geometry).values()
        assert [config.num_scales * config.tokens_per_scale for config in configs] == [tokens, tokens]


def test_flops_of_attention_are_counted_forwards_and_backwards(benchmark):
    batch, heads, length, dim = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, length, dim, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * dim

    def attention():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert benchmark.gigaflops(attention) * 1e9 == pytest.approx(2 * product)
    assert benchmark.gigaflops(lambda: attention().sum().backward()) * 1e9 == pytest.approx(7 * product)
