"""Small untrained models; generators have weights that are far from uniform predictions."""

import importlib.util
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sitlib.data import held_out_views, open_images
from sitlib.files import save_model
from sitlib.model.config import AutoregressiveConfig, SamplingConfig, TextEncoderConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.codebooks import initialize_codebooks
from workbook.paths import ROOT
from workbook.profile import load_profile

CLASSES = ["mountain", "water", "city"]
CAPTIONS = [
    "a red cat",
    "a blue dog that sleeps",
    "two green birds",
    "a cat and a dog",
    "a red bird",
]
TEXTS = TextTokenizer.train(CAPTIONS, 300, 32)
PLAIN = SamplingConfig(guidance=2.0, batch_size=3, seed=5)
SAMPLING = {"class": replace(PLAIN, guidance=1.5, seed=2), "text": replace(PLAIN, top_p=0.9)}
TOKENIZERS = {"class": "sit5_sc", "text": "captioned_sit4_sc"}
class_and_text = pytest.mark.parametrize("kind", ["class", "text"])
class_rotary = pytest.mark.parametrize(
    ("kind", "positions"), [("class", "learned"), ("text", "rotary")]
)
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}


def fresh_generator(kind="class", num_scales=3, tokens_per_scale=4, books=2, codes=20, **changes):
    """A model for the condition `kind`, "class" or "text", as it is made. With texts it knows codes by
    vectors, so that all is tested with and without these.
    """
    code_dim = 6 if kind == "text" else 0
    values = {"tokenizer": "sit4", "layers": 2, "width": 16, "heads": 2, "mlp_ratio": 2.0}
    values |= {"norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": False, "pos_emb": "learned"}
    values |= {"dropout": 0.0, "condition_dropout": 0.1, "code_noise": 0.0, "text_noise": 0}
    values["text"] = TextEncoderConfig(1, 300, TEXTS.max_tokens) if kind == "text" else None
    config = AutoregressiveConfig(**values | changes, code_vectors=code_dim > 0)
    condition = ([], TEXTS.to_json()) if kind == "text" else (CLASSES, None)
    torch.manual_seed(0)
    codes = [codes] * num_scales if isinstance(codes, int) else codes
    sizes = (num_scales, tokens_per_scale, codes, books)
    config = CodeModelConfig(config, *sizes, *condition, code_dim=code_dim)
    model = AutoregressiveModel(config).eval()
    if code_dim:
        model.set_codebooks([torch.randn(size, code_dim) for size in codes[:books]])
    return model


def new_generator(*arguments, **changes):
    model = fresh_generator(*arguments, **changes)
    for parameter in model.parameters():
        if parameter.ndim >= 2 or parameter is getattr(model, "start", None):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


generator = cache(new_generator)  # for tests that leave it as it is


def encoded(image, format="PNG", **options) -> bytes:
    """The file of a PIL image, or of an array [H, W, channels]."""
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, format, **options)
    return file.getvalue()


def python(code, cwd=ROOT, timeout=120, **environment):
    """Run code in a process of its own, with more variables of the environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command, options = [sys.executable, "-c", code], {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, **options)


def interruptible(command):
    """A process that Ctrl-C ends, even if a shell had the tests, as its job, ignore that."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, preexec_fn=listening, **options)


def script(path):
    """A file that is not of a package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_codes(model, batch=2):
    c = model.config
    rng = torch.Generator().manual_seed(1)
    return torch.randint(
        min(c.codebook_sizes), (batch, c.num_scales, c.tokens_per_scale), generator=rng
    )


def condition_of(model, *numbers):
    """Class ids, or token ids of as many captions."""
    if model.text_tokenizer is None:
        return torch.tensor(numbers)
    return model.text_tokenizer.encode([CAPTIONS[number] for number in numbers])


def prompts_of(kind, count=3):
    return torch.arange(count) % 3 if kind == "class" else CAPTIONS[:count]


def copy_of(model, **changes):
    copy = AutoregressiveModel(replace(model.config, **changes))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def double(model):
    return copy_of(model).double()


# -- tokenizers, and generators over their codes ---------------------------------------------------


@cache
def tokenizer_of(variant="sit5_sc"):
    torch.manual_seed(0)
    tokenizer = SpectralTokenizer(load_profile("smoke").tokenizer_variant(variant)).eval()
    with torch.no_grad():
        initialize_codebooks(tokenizer, photographs(16))
    return tokenizer


@cache
def model_of(kind="class", variant="sit5_sc", **changes):
    """A generator over the codes of that tokenizer, with far from uniform predictions."""
    c = tokenizer_of(variant).config
    sizes = (c.num_scales, c.tokens_per_scale, min(c.num_codebooks, c.num_scales), c.codebook_sizes)
    model = fresh_generator(kind, *sizes, width=32, **changes)
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.5)
    return model


@cache
def photographs(count=4):
    return held_out_views(open_images(ROOT / "data/extra", "test"), count, 64, 0)[0]


def save_generator(path, kind, variant, **changes):
    """Save a tiny model that names its tokenizer and how to sample, as trained ones do."""
    model = model_of(kind, variant, **changes)
    transformer = replace(model.config.transformer, tokenizer=variant)
    copy = copy_of(model, transformer=transformer, sampling=SAMPLING[kind])
    save_model(path, copy, name=f"autoregressive/{path.parent.name}")
