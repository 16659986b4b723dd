"""A masked generator as the entropy model of `.sit` files, alike on every machine."""

import copy
import hashlib
from collections.abc import Iterator
from decimal import Context, Decimal

import numpy as np
import torch

from sitlib.model.generator import AutoregressiveModel
from sitlib.strict import require

STEPS = 32  # in a nat: logits are rounded to them
# Of a step. Kernels, threads and orders of sums were seen to differ by 1.5e-13; about one in a
# hundred photographs of 12 megapixels has a logit so close to where rounding changes.
MARGIN = 1e-11
LARGEST_LOGIT = 2**12  # steps, 128 nats: up to there float64 is 20 times as fine as the margin
FLOOR = 64  # the share of all codes alike is 1 / (FLOOR + 1): no code is free, none costs too much
EXACT = Context(prec=30)
# Weights of logits so many steps below the largest, rounded alike on every machine.
WEIGHTS = torch.tensor(
    [int(2**24 * EXACT.exp(EXACT.divide(Decimal(-n), Decimal(STEPS)))) for n in range(533)]
)


class TooClose(Exception):
    """A logit that another machine might round otherwise."""


class Prior:
    """What a masked generator expects of each scale, given all coarser ones.

    Its logits are computed in float64 and rounded; what follows is arithmetic of integers. Machines
    differ by far less than MARGIN, so that a writer who sees no logit closer than that to where
    rounding changes can be sure of every reader.
    """

    def __init__(self, model: AutoregressiveModel):
        c = model.config
        require(c.transformer.masked, "a prior is a masked model, and this one is not.")
        learned = c.transformer.pos_emb == "learned"
        require(learned, "a prior needs learned positions: others are not computed in float64.")
        self.model = copy.deepcopy(model).double().eval()
        # Beside the weights, only what these do not tell and the computation reads.
        digest = hashlib.sha256(f"{c.transformer.heads} {c.transformer.norm}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.digest = digest.digest()

    @torch.inference_mode()
    def laws(self, coarser: np.ndarray, margin: float = 0.0) -> Iterator[np.ndarray]:
        """Probabilities float32 [N, K] of the next scale's codes, tile after tile.

        `coarser` are the codes [k, M, N] of the scales before. Raises `TooClose` for logits that
        are within `margin` of where rounding changes, not finite, or enormous.
        """
        model, device = self.model, next(self.model.parameters()).device
        K, n = model.config.codebook_sizes[len(coarser)], model.config.tokens_per_scale
        no_text = torch.zeros(1, 1, dtype=torch.int64, device=device)
        cond = model.unconditional(no_text if model.text_tokenizer else no_text[0])
        any_codes = torch.zeros(1, n, dtype=torch.int64, device=device)
        for tile in torch.from_numpy(coarser).long().to(device).unbind(1):
            with torch.autocast(device.type, enabled=False):
                state = model.start_scales(cond)
                for codes in tile:
                    model.read_scale(state, codes[None])
                logits = model.read_scale(state, any_codes, torch.ones_like(any_codes).bool())
            exact = logits[0].cpu() * STEPS
            steps, distance = exact.round(), (exact - exact.floor() - 0.5).abs()
            if not ((distance >= margin) & (steps.abs() < LARGEST_LOGIT)).all():
                raise TooClose
            steps = steps.long()
            below = (steps.amax(1, keepdim=True) - steps).clamp(max=len(WEIGHTS) - 1)
            weights = WEIGHTS[below]
            weights += 1 + weights.sum(1, keepdim=True) // (FLOOR * K)
            yield (weights.double() / weights.sum(1, keepdim=True)).float().numpy()


def least_bits(K: int) -> float:
    """Fewer bits than the likeliest of K codes takes under any prior."""
    return -0.99 * float(np.log2((FLOOR * K + 1) / ((FLOOR + 1) * K)))
