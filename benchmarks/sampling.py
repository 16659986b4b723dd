"""Speed of drawing codes against Hugging Face `generate`, no cache, and the machine's limit; and of
drawing them a scale at a time.

    python benchmarks/sampling.py [--layers 6] [--width 256] [--heads 8] [--codes 1024]
        [--tokens 512] [--batch 16] [--rounds 3]

All candidates draw as many codes with a transformer of the same depth, width and vocabulary, random
weights, temperature 1, no filters, no guidance. The limit is the time of the matrix products of
every step alone, plus reading the keys and values that a step needs once, at the rate at which the
machine copies memory. Each candidate is called once a round (that without a cache in the first
only), so that whatever else the machine does slows all of them. Run it on an idle machine.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sitlib.model.config import AutoregressiveConfig, SamplingConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.transformer import best_device
from sitlib.sample.draw import filtered_probabilities, sample_codes
from sitlib.sample.generate import generate

DEFAULTS = {"layers": 6, "width": 256, "heads": 8, "codes": 1024, "tokens": 512, "batch": 16}
DEFAULTS |= {"rounds": 3}
OURS, UNCACHED = "sitlib", "sitlib, no cache"
PASSES = (1, 2, 4, 8)  # of a masked model in each of four scales


def our_model(options: argparse.Namespace, masked: bool = False) -> AutoregressiveModel:
    sizes = {"layers": options.layers, "width": options.width, "heads": options.heads}
    shape = AutoregressiveConfig(tokenizer="none", dropout=0.0, masked=masked, **sizes)
    config = CodeModelConfig(shape, 4, options.tokens // 4, [options.codes] * 4, 1, ["class"], None)
    return AutoregressiveModel(config).eval()


def hugging_face(options: argparse.Namespace, **cache: str) -> Callable[[], Tensor]:
    """GPT-2 of the same sizes."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, logging
    except ImportError:
        raise SystemExit("This compares with transformers: pip install -e '.[peers]'") from None

    logging.set_verbosity_error()
    sizes = {"n_embd": options.width, "n_layer": options.layers, "n_head": options.heads}
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    sizes |= {"vocab_size": options.codes, "n_positions": options.tokens + 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids)).eval()
    start = torch.zeros(options.batch, 1, dtype=torch.int64)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": options.tokens, **cache}

    @torch.inference_mode()
    def call() -> Tensor:
        return model.generate(start, attention_mask=torch.ones_like(start), **settings)[:, 1:]

    return call


@torch.inference_mode()
def without_cache(model: AutoregressiveModel, labels: Tensor) -> None:
    """The plain way: the whole sequence so far through the model for every code."""
    codes_BT = torch.zeros(len(labels), model.num_tokens, dtype=torch.int64)
    for position in range(model.num_tokens):
        probabilities = filtered_probabilities(next_logits(model, codes_BT[:, :position], labels))
        codes_BT[:, position] = sample_codes(probabilities, torch.rand(len(labels)))


def next_logits(model: AutoregressiveModel, codes_BT: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, K] of the code after some codes [B, t], of which nothing is remembered."""
    return model.prefill(labels, codes_BT.shape[1] + 1, codes_BT)[1]


def seconds(call: Callable, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def products_of_step(options: argparse.Namespace) -> Callable[[], None]:
    """[B, C] times the weights of every layer, and of the head."""
    width, batch = options.width, options.batch
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    shapes = [*shapes * options.layers, (width, options.codes)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs = {rows: torch.randn(batch, rows) for rows in (width, 4 * width)}

    def step() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight)

    return step


def copy_rate() -> float:
    """Bytes a second that a copy of a block larger than all caches reads."""
    source = torch.zeros(2**27, dtype=torch.uint8)
    target = source.clone()
    return max(len(source) / seconds(lambda: target.copy_(source)) for _ in range(5))


def cache_bytes(options: argparse.Namespace) -> float:
    """Keys and values of all earlier positions, read once in every step."""
    position_bytes = 2 * 4 * options.layers * options.width * options.batch
    return position_bytes * options.tokens * (options.tokens + 1) / 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    options = parser.parse_args(arguments)
    if min(vars(options).values()) < 1 or options.tokens % 4:
        parser.error("every number must be at least 1, and tokens a multiple of 4.")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_default_device(best_device())
    model, labels = our_model(options), torch.zeros(options.batch, dtype=torch.int64)
    step, masked = products_of_step(options), our_model(options, masked=True)
    by_scale = {
        f"a scale in {k} passes": partial(
            generate, masked, labels, SamplingConfig(steps_per_scale=k)
        )
        for k in PASSES
    }
    calls = {
        OURS: lambda: generate(model, labels, SamplingConfig()),
        **by_scale,
        "GPT-2 generate, static": hugging_face(options, cache_implementation="static"),
        "GPT-2 generate, default": hugging_face(options),
        UNCACHED: lambda: without_cache(model, labels),
    }
    about = f"{best_device()}, {torch.get_num_threads()} threads, float32 (sitlib on a GPU: bf16)"
    print(f"torch {torch.__version__}, {about}, {vars(options)}")
    times: dict[str, list[float]] = {name: [] for name in (*calls, "products", "cache")}
    for call in list(calls.values())[:2]:
        call()  # warms up
    for index in range(options.rounds):
        for name, call in calls.items():
            if name != UNCACHED or index == 0:  # once: it takes minutes
                times[name].append(seconds(call))
        times["products"].append(seconds(step, options.tokens))
        times["cache"].append(cache_bytes(options) / copy_rate())
    medians = {name: statistics.median(values) for name, values in times.items()}
    limit, ours = medians["products"] + medians["cache"], medians[OURS]
    for name, middle in {**medians, "limit: products and cache": limit}.items():
        line = f"  {name:26s}{middle:8.2f} s"
        if name in calls:
            line += f"{options.batch * options.tokens / middle:10.0f} codes/s"
            line += f"{middle / ours:8.2f} x sitlib's time, {middle / limit:.2f} x the limit's"
        print(line)


if __name__ == "__main__":
    main()
