"""Codes in training: their start by k-means, restarts, codes or all weights of another tokenizer.

Every process gives its own latents and codes; all of them move their codes alike.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.files import misfits
from sitlib.model.quantizer import Codebook
from sitlib.model.tokenizer import DECODER_MODULES, SpectralTokenizer
from sitlib.strict import require
from sitlib.train.distributed import all_reduce, rank, world_size

PIXELS_AT_A_TIME = 2**25  # in the encoder, before training: 170 images of 256 px
SIMILARITIES_AT_A_TIME = 2**28  # of latents and codes, in k-means: 1 GiB


@torch.no_grad()
def initialize_codebooks(tokenizer: SpectralTokenizer, images: Tensor) -> None:
    """Whiten the latents of training images [B, 3, H, H], then start codes by k-means.

    Latents of photographs first vary in hardly more than one direction (brightness), and a
    codebook that starts there learns the others slowly.
    """
    batch_size = max(1, PIXELS_AT_A_TIME // images[0].numel())

    def latents() -> list[Tensor]:  # [M, D] of each codebook
        z = torch.cat([tokenizer.latents(batch) for batch in images.split(batch_size)])
        return [part.flatten(0, 2) for part in tokenizer.by_codebook(z)]

    for head, z in zip(tokenizer.pre_quant, latents(), strict=True):
        # Change its last layer so that latents get mean 0 and covariance I (symmetrically).
        linear = cast(nn.Linear, cast(nn.Sequential, head)[-1])
        variance, axes = torch.linalg.eigh(torch.cov(z.T))
        variance = variance.clamp_min(1e-4 * variance[-1])  # do not blow up empty directions
        whitening = axes @ torch.diag(variance.rsqrt()) @ axes.T
        linear.bias.copy_(whitening @ (linear.bias - z.mean(0)))
        linear.weight.copy_(whitening @ linear.weight)
    for codebook, z in zip(tokenizer.codebooks, latents(), strict=True):
        if not codebook.codes_are_fixed:
            start_codes(codebook, z)


def _require_alike(
    tokenizer: SpectralTokenizer,
    base: SpectralTokenizer,
    may_differ: Callable[[str], bool],
    only: str,
) -> None:
    """Raise ValueError if other keys of two tokenizers' configurations differ."""
    theirs = asdict(base.config)
    differs = (key for key, value in asdict(tokenizer.config).items() if value != theirs[key])
    wrong = [key for key in differs if not may_differ(key)]
    require(not wrong, f"{wrong} of the two tokenizers differ; only {only} may.")


def take_over_codes(tokenizer: SpectralTokenizer, base: SpectralTokenizer) -> None:
    """Copy and freeze the encoder and codebooks of another tokenizer: only the decoder learns."""
    _require_alike(tokenizer, base, lambda key: key.startswith("decoder_"), "decoder_*")
    state = base.state_dict().items()
    frozen = {key: x for key, x in state if key.split(".")[0] not in DECODER_MODULES}
    tokenizer.load_state_dict(tokenizer.state_dict() | frozen)
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(name not in frozen)


def take_over_weights(tokenizer: SpectralTokenizer, base: SpectralTokenizer) -> None:
    """Copy all weights of another tokenizer; positions are interpolated where its grid differs."""
    resized = "size", "grid_size", "refine"
    _require_alike(tokenizer, base, resized.__contains__, ", ".join(resized))
    new = {name: x for name, x in tokenizer.state_dict().items() if name.startswith("refine.")}
    state = new | base.state_dict()
    for name in ("encoder.pos_emb", "decoder.pos_emb"):  # [S g^2, C]
        here, there = tokenizer.config, base.config
        x = state[name].unflatten(0, (-1, there.grid_size, there.grid_size)).permute(0, 3, 1, 2)
        x = F.interpolate(x, (here.grid_size,) * 2, mode="bilinear")  # [S, C, g, g]
        state[name] = x.permute(0, 2, 3, 1).flatten(0, 2)
    if wrong := misfits(state, tokenizer.state_dict()):
        raise ValueError(f"weights to start from do not fit: {wrong}.")
    tokenizer.load_state_dict(state)


@torch.no_grad()
def start_codes(codebook: Codebook, z: Tensor, iterations: int = 20) -> None:
    """Place codes at the centroids of spherical k-means of latents [M, D]."""
    z, num_codes = codebook.project(z), codebook.num_codes
    sentence = f"k-means of {num_codes} codes needs at least {num_codes} vectors, not {len(z)}."
    require(len(z) >= num_codes, sentence)
    centroids = z[torch.randperm(len(z), device=z.device)[:num_codes]].clone()
    rows = max(1, SIMILARITIES_AT_A_TIME // num_codes)
    for _ in range(iterations):
        nearest = torch.cat([(part @ centroids.T).argmax(-1) for part in z.split(rows)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, z)
        empty = torch.bincount(nearest, minlength=num_codes) == 0
        sums[empty] = z[torch.randint(len(z), (int(empty.sum()),), device=z.device)]
        centroids = F.normalize(sums, dim=-1)
    codebook.weight.copy_(centroids)
    codebook.steps_unused.zero_()


@torch.no_grad()
def reset_dead_codes(codebook: Codebook, z: Tensor, codes: Tensor, after: int) -> Tensor:
    """Move codes unused for `after` steps (0: never) onto random latents (arXiv 2107.03312).

    Takes latents [..., D] of a step, as many as other processes have, and their codes [...]; a code
    is dead if no process used it. Returns bool [K].
    """
    steps_unused, codes = codebook.steps_unused, codes.flatten()
    uses = torch.zeros_like(steps_unused)  # int64 [K]
    uses.index_add_(0, codes, torch.ones_like(codes))  # unlike bincount, does not wait for a GPU
    used = all_reduce(uses) > 0
    steps_unused.add_(1).masked_fill_(used, 0)
    if not after or codebook.codes_are_fixed:
        return torch.zeros_like(used)
    dead = steps_unused >= after
    z = codebook.project(z.reshape(-1, z.shape[-1]))  # [M, D]
    if dead.is_cuda:  # counting the dead would wait for the GPU: draw for every code
        source = torch.randint(world_size() * len(z), dead.shape, device=z.device)
    elif not dead.any():
        return dead
    else:
        source = torch.zeros_like(steps_unused)
        source[dead] = torch.randint(world_size() * len(z), (int(dead.sum()),))
    if world_size() > 1:
        dist.broadcast(source, src=0)
    source = source - rank() * len(z)  # row of z, where the latent is of this process
    is_mine = (source >= 0) & (source < len(z))
    vectors = all_reduce(torch.where(is_mine[:, None], z[source.clamp(0, len(z) - 1)], 0.0))
    codebook.weight.copy_(torch.where(dead[:, None], vectors, codebook.weight))
    steps_unused.masked_fill_(dead, 0)
    return dead
