"""The benchmarks run, and count what they say they count."""

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from workbook.estimates import flops
from workbook.paths import ROOT


def loaded(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark():
    """benchmarks/tokenizer.py; the number of threads is put back."""
    module = loaded("tokenizer")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_tokenizer_benchmark_prints_a_ratio_for_every_operation(
    benchmark, weights_folder, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark, "fetch_weights", lambda: None)
    monkeypatch.setattr(benchmark, "SQUARES", (64,))
    benchmark.main(
        ["--profile", "smoke", "--geometry", "profile", "--repetitions", "1", "--threads", "1"]
    )
    printed = capsys.readouterr().out
    ratios = re.findall(r"(training step|encode|decode) +SIT-4 / ViT-VQGAN: (\S+) in time", printed)
    assert [name for name, _ in ratios] == ["training step", "encode", "decode"]
    assert all(float(ratio) > 0 for _, ratio in ratios)


def test_both_models_of_both_geometries_have_as_many_tokens(benchmark):
    profile = benchmark.load_profile("quick")
    for geometry, tokens in (("profile", 64), ("paper", 1024)):
        configs = benchmark.configurations(profile, geometry).values()
        assert [config.num_scales * config.tokens_per_scale for config in configs] == [
            tokens,
            tokens,
        ]


def test_flops_of_attention_are_counted_forwards_and_backwards(benchmark):
    batch, heads, length, dim = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, length, dim, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * dim

    def attention():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert benchmark.gigaflops(attention) * 1e9 == pytest.approx(2 * product)
    assert benchmark.gigaflops(lambda: attention().sum().backward()) * 1e9 == pytest.approx(
        7 * product
    )


# -- sampling ------------------------------------------------------------------------------------------------------------------------------

SIZES = [
    "--layers",
    "2",
    "--width",
    "16",
    "--heads",
    "2",
    "--codes",
    "32",
    "--tokens",
    "8",
    "--batch",
    "3",
    "--rounds",
    "1",
]


@pytest.fixture
def sampling():
    return loaded("sampling")


@pytest.fixture
def options():
    names = ("layers", "width", "heads", "codes", "tokens", "batch")
    return SimpleNamespace(**dict(zip(names, (2, 16, 2, 32, 8, 3), strict=True)))


@torch.no_grad()
def test_the_loop_without_a_cache_computes_what_the_one_with_a_cache_does(sampling, options):
    model = sampling.our_model(options)
    for head in model.heads:  # which start at zero
        torch.nn.init.normal_(head.weight)
    codes, labels = torch.randint(options.codes, (3, 8)), torch.zeros(3, dtype=torch.int64)
    state, logits = model.prefill(labels)
    for position in range(8):
        torch.testing.assert_close(sampling.next_logits(model, codes[:, :position], labels), logits)
        if position < 7:
            logits = model.decode_one_token(state, codes[:, position])


@torch.no_grad()
def test_the_limit_counts_every_product_of_a_step_and_every_byte_of_the_cache(sampling, options):
    model, labels = sampling.our_model(options), torch.zeros(3, dtype=torch.int64)
    linear = [
        m.weight.numel()
        for m in [*model.transformer.modules(), *model.heads]
        if isinstance(m, torch.nn.Linear)
    ]
    assert flops(sampling.products_of_step(options)) == 2 * options.batch * sum(linear)
    cache = model.prefill(labels, options.tokens)[0].cache
    one_position = 4 * cache.store.numel() / cache.capacity
    assert sampling.cache_bytes(options) == one_position * sum(range(1, options.tokens + 1))


def test_sampling_benchmark_prints_ratios_to_its_peers_and_the_share_of_the_limit(sampling, capsys):
    pytest.importorskip("transformers")
    sampling.main(SIZES)
    printed = capsys.readouterr().out
    for peer in ("GPT-2 generate, static", "GPT-2 generate, default", "sitlib, no cache"):
        assert re.search(rf"{peer} .* [\d.]+ x sitlib's time, [\d.]+ x the limit's", printed)
    assert re.search(r"limit \(both\).*sitlib reaches \d+% of it", printed)


def test_sampling_benchmark_says_what_it_needs(sampling, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[peers\]'"):
        sampling.main(SIZES)
