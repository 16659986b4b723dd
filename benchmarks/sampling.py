"""Speed of drawing codes against Hugging Face `generate`, against no cache, and against the machine's limit.

    python benchmarks/sampling.py [--layers 6] [--width 256] [--heads 8] [--codes 1024] [--tokens 512] [--batch 16] [--rounds 3]

All candidates draw as many codes with a transformer of the same depth, width and vocabulary, random weights, temperature 1, no filters,
no guidance. The limit is the time of the matrix products of every step alone, plus reading the keys and values that a step needs once, at
the rate at which the machine copies memory. Each candidate is called once per round (the one without a cache in the first only), so that
whatever else the machine does slows all of them; medians are printed. Run it on an idle machine.
"""

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

import torch
from torch import Tensor

from sitlib.model.config import AutoregressiveConfig, SamplingConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.sample.generate import filtered_probabilities, generate, sample_codes

OURS, STATIC, DYNAMIC, UNCACHED = (
    "sitlib",
    "GPT-2 generate, static",
    "GPT-2 generate, default",
    "sitlib, no cache",
)
SAMPLING = SamplingConfig(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    guidance=1.0,
    guidance_growth="constant",
    batch_size=0,
    seed=0,
)


def our_model(options: argparse.Namespace) -> AutoregressiveModel:
    shape = AutoregressiveConfig(
        tokenizer="none",
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        mlp_ratio=4.0,
        norm="layer",
        mlp="gelu",
        bias=True,
        qk_norm=False,
        pos_emb="learned",
        dropout=0.0,
        condition_dropout=0.0,
        code_noise=0.0,
        text_noise=0,
        text=None,
    )
    config = CodeModelConfig(shape, 4, options.tokens // 4, options.codes, 1, ["class"], None)
    return AutoregressiveModel(config).eval()


def hugging_face(options: argparse.Namespace, **cache: str) -> Callable[[], Tensor]:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, logging
    except ImportError:
        raise SystemExit(
            "Hugging Face transformers is what this compares with: pip install -e '.[peers]'"
        ) from None

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=options.codes,
        n_positions=options.tokens + 1,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model, start = GPT2LMHeadModel(config).eval(), torch.zeros(options.batch, 1, dtype=torch.int64)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": options.tokens, **cache}

    @torch.inference_mode()
    def call() -> Tensor:
        return model.generate(start, attention_mask=torch.ones_like(start), **settings)[:, 1:]

    return call


@torch.inference_mode()
def without_cache(model: AutoregressiveModel, labels: Tensor) -> Tensor:
    """The plain way: the whole sequence so far through the model for every code."""
    shape = (len(labels), model.config.num_scales, model.config.tokens_per_scale)
    codes_BT = torch.zeros(len(labels), model.num_tokens, dtype=torch.int64)
    for position in range(model.num_tokens):
        logits = next_logits(model, codes_BT[:, :position], labels)
        codes_BT[:, position] = sample_codes(
            filtered_probabilities(logits), torch.rand(len(labels))
        )
    return codes_BT.view(shape)


def next_logits(model: AutoregressiveModel, codes_BT: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, K] of the code after some codes [B, t], of which nothing is remembered."""
    return model.prefill(labels, codes_BT.shape[1] + 1, codes_BT)[1]


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def products(options: argparse.Namespace) -> float:
    """Seconds of the matrix products of all steps: [B, C] times the weights of every layer, and the head."""
    step = products_of_step(options)
    return seconds(lambda: [step() for _ in range(options.tokens)])


def products_of_step(options: argparse.Namespace) -> Callable[[], None]:
    width, batch = options.width, options.batch
    shapes = [
        (width, 3 * width),
        (width, width),
        (width, 4 * width),
        (4 * width, width),
    ] * options.layers
    weights = [torch.randn(rows, columns) for rows, columns in [*shapes, (width, options.codes)]]
    inputs = {rows: torch.randn(batch, rows) for rows in (width, 4 * width)}

    def step() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight)

    return step


def copy_rate() -> float:
    """Bytes a second that a copy of a block larger than all caches reads."""
    source = torch.zeros(2**27, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    return max(len(source) / seconds(lambda: target.copy_(source)) for _ in range(5))


def cache_reading(options: argparse.Namespace) -> float:
    """Seconds in which the keys and values of all earlier positions are read once in every step."""
    return cache_bytes(options) / copy_rate()


def cache_bytes(options: argparse.Namespace) -> float:
    position_bytes = 2 * 4 * options.layers * options.width * options.batch
    return position_bytes * options.tokens * (options.tokens + 1) / 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {
        "layers": 6,
        "width": 256,
        "heads": 8,
        "codes": 1024,
        "tokens": 512,
        "batch": 16,
        "rounds": 3,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    options = parser.parse_args(arguments)
    if min(vars(options).values()) < 1 or options.tokens % 4:
        parser.error("every number must be at least 1, and tokens a multiple of 4.")

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, labels = our_model(options), torch.zeros(options.batch, dtype=torch.int64)
    candidates = {
        OURS: lambda: generate(model, labels, SAMPLING),
        STATIC: hugging_face(options, cache_implementation="static"),
        DYNAMIC: hugging_face(options),
        UNCACHED: lambda: without_cache(model, labels),
    }
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}, float32\n"
        f"{options.layers} layers, width {options.width}, {options.heads} heads, {options.codes} codes, "
        f"{options.tokens} tokens, batch {options.batch}, {options.rounds} rounds"
    )
    times: dict[str, list[float]] = {name: [] for name in candidates}
    bounds: dict[str, list[float]] = {"matrix products": [], "reading the cache": []}
    for call in list(candidates.values())[:2]:
        call()  # warms up
    for index in range(options.rounds):
        for name, call in candidates.items():
            if name != UNCACHED or index == 0:  # once: it takes minutes
                times[name].append(seconds(call))
        bounds["matrix products"].append(products(options))
        bounds["reading the cache"].append(cache_reading(options))
    ours = statistics.median(times[OURS])
    limit = sum(statistics.median(values) for values in bounds.values())
    for name, values in times.items():
        middle = statistics.median(values)
        ratios = (
            ""
            if name == OURS
            else f"   {middle / ours:6.2f} x sitlib's time, {middle / limit:.2f} x the limit's"
        )
        print(
            f"  {name:26s}{middle:8.2f} s{options.batch * options.tokens / middle:10.0f} codes/s{ratios}"
        )
    for name, values in bounds.items():
        print(f"  {name:26s}{statistics.median(values):8.2f} s")
    print(f"  {'limit (both)':26s}{limit:8.2f} s   sitlib reaches {limit / ours:.0%} of it")


if __name__ == "__main__":
    main()
