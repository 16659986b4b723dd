"""Small untrained generators whose weights are large enough for far from uniform predictions."""

from functools import cache

import torch

from sitlib.model.config import AutoregressiveConfig, TextEncoderConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer

CLASSES = ["mountain", "water", "city"]
CAPTIONS = [
    "a red cat",
    "a blue dog that sleeps",
    "two green birds",
    "a cat and a dog",
    "a red bird",
]
TEXTS = TextTokenizer.train(CAPTIONS, 300, 32)
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}


def fresh_generator(kind="class", num_scales=3, tokens_per_scale=4, books=2, codes=20, **changes):
    """A model for the condition `kind`, "class" or "text", as it is made."""
    values = {
        "tokenizer": "sit4",
        "layers": 2,
        "width": 16,
        "heads": 2,
        "mlp_ratio": 2.0,
        "norm": "layer",
        "mlp": "gelu",
        "bias": True,
        "qk_norm": False,
        "pos_emb": "learned",
        "dropout": 0.0,
        "condition_dropout": 0.1,
        "code_noise": 0.0,
        "text_noise": 0,
        "text": TextEncoderConfig(1, 300, TEXTS.max_tokens) if kind == "text" else None,
    }
    config = AutoregressiveConfig(**values | changes)
    condition = ([], TEXTS.to_json()) if kind == "text" else (CLASSES, None)
    torch.manual_seed(0)
    sizes = (num_scales, tokens_per_scale, codes, books)
    return AutoregressiveModel(CodeModelConfig(config, *sizes, *condition)).eval()


def new_generator(*arguments, **changes):
    model = fresh_generator(*arguments, **changes)
    for parameter in model.parameters():
        if parameter.ndim >= 2 or parameter is getattr(model, "start", None):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


generator = cache(new_generator)  # for tests that leave it as it is


def random_codes(model, batch=2):
    c = model.config
    rng = torch.Generator().manual_seed(1)
    return torch.randint(c.num_codes, (batch, c.num_scales, c.tokens_per_scale), generator=rng)


def condition_of(model, *numbers):
    """Class ids, or token ids of as many captions."""
    if model.text_tokenizer is None:
        return torch.tensor(numbers)
    return model.text_tokenizer.encode([CAPTIONS[number] for number in numbers])


def double(model):
    """A copy in float64."""
    copy = AutoregressiveModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.double().eval()
