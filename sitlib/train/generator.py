"""Training a generator over extracted codes: what it reads and predicts (step: `train_module`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from sitlib.data import TokenShards
from sitlib.data.images import WINDOW
from sitlib.files import Row
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.text import TextTokenizer
from sitlib.strict import to_dict
from sitlib.train.config import OptimizerConfig
from sitlib.train.loop import Logged, train_module


def train_generator(
    config: CodeModelConfig,
    optimizer_config: OptimizerConfig,
    codes: TokenShards,
    labels: Tensor,
    *,
    seed: int,
    folder: Path,
    codebooks: Sequence[Tensor] = (),
    captions: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
    pictures: Callable[[AutoregressiveModel], Tensor] | None = None,
    **options: Any,
) -> tuple[AutoregressiveModel, list[Row]]:
    """Train a model to predict the next code, a masked one hidden codes -> the model and its training curve.

    Args:
        codes: code maps [M, S, N] int64.
        labels: class ids [M]; for a text-conditional model the image [M] that each map is of.
        codebooks: vectors [K, D] of each codebook, if the model has `code_vectors`.
        captions, names: of each image, for a text-conditional model: texts, of which a step draws
            one, and what the image shows: names come equally often.
        pictures: draws images [P, 3, H, W] with the model, every `engine.images_every` steps.
        folder, options: as for `TrainLoop`.
    """
    c, about = config.transformer, replace(config, sampling=None)
    run = {"model": to_dict(about), "optimizer": to_dict(optimizer_config)}
    run |= {"codes": list(codes.shape), "seed": seed}
    set_seed(seed)
    module = AutoregressiveModel(config)
    module.set_codebooks(codebooks)
    texts = module.text_tokenizer
    tokens = [texts.encode(list(x), truncate=True) for x in captions or []] if texts else []
    draw = code_map_draws(codes, labels, names, optimizer_config.batch_size, seed)

    def batch_at(step: int) -> tuple[Tensor, ...]:
        """Codes [B, S, N] and a condition to read, partly corrupted; codes to predict, and where."""
        rng = np.random.default_rng([seed, step])
        rows = torch.from_numpy(draw(step, rng))  # [B]
        is_hidden = torch.from_numpy(rng.random(len(rows)) < c.condition_dropout)
        condition = labels[rows]
        if texts is not None:  # one caption of each image, [B, L]
            pick = rng.random(len(rows))
            of_image = [tokens[image] for image in condition.tolist()]
            drawn = [x[int(u * len(x))] for x, u in zip(of_image, pick, strict=True)]
            condition = corrupt_texts(torch.stack(drawn), texts, c.text_noise, rng)
            condition = condition[:, : int((condition != texts.pad).sum(1).max())]
            is_hidden = is_hidden[:, None]
        # Without a condition now and then: classifier-free guidance needs both.
        condition = torch.where(is_hidden, module.unconditional(condition), condition)
        targets = codes[rows]
        is_predicted = (
            hidden_codes(targets.shape, rng) if c.masked else torch.ones_like(targets) > 0
        )
        read = corrupt_codes(targets, config.codebook_sizes, c.code_noise, rng)
        return read, condition, targets, is_predicted

    def loss_fn(model: nn.Module, batch: tuple[Tensor, ...], _: int) -> tuple[Tensor, Logged]:
        read, condition, targets, is_predicted = batch
        logits = model(read, condition, is_predicted) if c.masked else model(read, condition)
        nats_BSN = code_nats(logits, targets) * is_predicted
        of_scale = is_predicted.sum(dim=(0, 2))
        nats_S = nats_BSN.detach().sum(dim=(0, 2)) / of_scale
        logged = {f"nats_scale_{scale}": x for scale, x in enumerate(nats_S, 1)}
        return nats_BSN.sum() / is_predicted.sum(), logged

    options["pictures"] = (lambda: pictures(module)) if pictures is not None else None
    return train_module(module, loss_fn, batch_at, optimizer_config, folder, run, **options)


def code_map_draws(
    codes: TokenShards,
    labels: Tensor,
    names: Sequence[str] | None,
    batch_size: int,
    seed: int,
) -> Callable[[int, np.random.Generator], np.ndarray]:
    """A function (step, its random numbers) -> code maps of the step, int64 [batch_size].

    Images come equally often; with `names`, names do, of which some have many images (the skin
    tones of an emoji). Many maps, equally many of each, come in epochs, to keep reads together.
    """
    count = len(codes)
    kinds = np.arange(count)  # [M] what each code map is of
    if names is not None:
        _, numbers = np.unique(np.array(names), return_inverse=True)
        _, kinds = np.unique(numbers[labels.numpy()], return_inverse=True)
    maps, sizes = np.argsort(kinds, kind="stable"), np.bincount(kinds)
    ends = np.cumsum(sizes)

    def drawn(step: int, rng: np.random.Generator) -> np.ndarray:
        picked = rng.integers(len(sizes), size=batch_size)
        return np.array([rng.choice(maps[ends[k] - sizes[k] : ends[k]]) for k in picked])

    def in_epochs(step: int, rng: np.random.Generator) -> np.ndarray:
        items = np.arange(step * batch_size, (step + 1) * batch_size)
        pairs = zip(*np.divmod(items, count), strict=True)
        return np.array([codes.order.permutation(seed, epoch)[item] for epoch, item in pairs])

    return in_epochs if count > WINDOW and sizes.min() == sizes.max() else drawn


def hidden_codes(shape: Sequence[int], rng: np.random.Generator) -> Tensor:
    """Which codes [B, S, N] a masked model has to predict: of each scale a share of its own, drawn
    as cos(pi u / 2) (MaskGIT, arXiv 2202.04200), and one code at least."""
    B, S, N = shape
    count = np.ceil(N * np.cos(np.pi / 2 * rng.random((B, S, 1)))).clip(1)
    return torch.from_numpy(rng.random((B, S, N)).argsort(axis=2).argsort(axis=2) < count)


# -- corruption of what training reads, never of what it predicts ----------------------------------


def corrupt_codes(
    codes: Tensor, codebook_sizes: list[int], max_share: float, rng: np.random.Generator
) -> Tensor:
    """Codes [B, S, N] with some replaced by random ones.

    Each sequence draws its own share in [0, max_share). In training a model reads the right codes,
    in sampling its own (exposure bias); Infinity flips bits for that reason (arXiv 2412.04431).
    """
    if not max_share:
        return codes
    share_B11 = max_share * torch.from_numpy(rng.random((len(codes), 1, 1)))
    is_replaced = torch.from_numpy(rng.random(codes.shape)) < share_B11
    sizes_S1 = np.array(codebook_sizes)[:, None]
    random_codes = torch.from_numpy(rng.integers(sizes_S1, size=codes.shape))
    return torch.where(is_replaced, random_codes, codes)


def corrupt_texts(
    tokens: Tensor, texts: TextTokenizer, max_tokens: int, rng: np.random.Generator
) -> Tensor:
    """Ids [B, L] of texts, half with up to `max_tokens` random ones before, half as many after."""
    if not max_tokens:
        return tokens
    corrupted = torch.full_like(tokens, texts.pad)
    for row, source in zip(corrupted, tokens, strict=True):
        words = source[(source != texts.pad) & (source != texts.end)]
        before, after = rng.integers([max_tokens + 1, max_tokens // 2 + 1]) * (rng.random() < 0.5)
        before = min(before, len(row) - 1 - len(words))
        after = min(after, len(row) - 1 - len(words) - before)
        # Ids of words follow those of padding and end.
        noise = torch.from_numpy(rng.integers(texts.end + 1, texts.vocab_size, before + after))
        ids = torch.cat([noise[:before], words, noise[before:], words.new_tensor([texts.end])])
        row[: len(ids)] = ids
    return corrupted
