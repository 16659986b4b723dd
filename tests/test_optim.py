"""Muon beside an SVD and torch.optim.Muon, AdamW for everything else.

Adafactor: beside the published equations in float64.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sitlib.train.config import OptimizerConfig
from sitlib.train.optim import NS_STEPS, Adafactor, forget_moments, make_optimizer, orthogonalize

CONFIG = OptimizerConfig(
    algorithm="muon", steps=8, warmup_steps=0, learning_rate=1e-3, muon_learning_rate=0.02,
    weight_decay=0.1, log_every=1, checkpoint_every=1, ema_decay=0.0,
)  # fmt: skip
ADAFACTOR = replace(CONFIG, algorithm="adafactor", beta2=0.96)


class Network(nn.Module):
    """Two matrices of one shape, a tall and a wide one, as blocks have them; a head and vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = ((12, 12), (12, 12), (36, 12), (12, 48))
        linears = [nn.Linear(columns, rows) for rows, columns in shapes]
        self.stack = nn.ModuleDict({"blocks": nn.ModuleList(linears)})
        self.head = nn.Linear(12, 5)

    def hidden(self):
        return [linear.weight for linear in self.stack["blocks"]]


def set_gradients(model, step):
    rng = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)


def take_steps(pairs):
    for network, optimizer in pairs:
        for step in range(CONFIG.steps):
            set_gradients(network, step)
            optimizer.step()


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_singular_values_become_one_and_singular_vectors_stay(rows, columns, seed):
    rng = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, rows, columns, generator=rng, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    for steps, share in ((NS_STEPS, 0.5), (5, 0.2)):  # lift values from this share of the largest
        given_values = torch.diag_embed(S.clamp_min(share * S[:, :1]))
        made = U.mT @ orthogonalize(U @ given_values @ Vh, steps) @ Vh.mT
        values = made.diagonal(dim1=1, dim2=2)
        assert values.min() > 0.6 and values.max() < 1.25
        torch.testing.assert_close(made, torch.diag_embed(values), atol=1e-9, rtol=0)


def test_steps_are_those_of_torch(monkeypatch):
    monkeypatch.setattr("sitlib.train.optim.NS_STEPS", 5)
    model, other = Network(), Network()
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(other.hidden(), **settings)
    take_steps([(model, make_optimizer(model, CONFIG)), (other, theirs)])
    weights = zip(model.hidden(), other.hidden(), Network().hidden(), strict=True)
    for mine, reference, first in weights:
        assert (mine - reference).norm() < 0.02 * (reference - first).norm()  # torch: in bf16


def test_all_other_weights_move_as_with_adamw_to_the_bit():
    networks = Network(), Network()
    ours, theirs = map(make_optimizer, networks, (CONFIG, replace(CONFIG, algorithm="adamw")))
    take_steps(zip(networks, (ours, theirs), strict=True))
    pairs = zip(networks[0].named_parameters(), networks[1].parameters(), strict=True)
    for (name, mine), reference in pairs:
        assert torch.equal(mine, reference) != ("blocks" in name and mine.ndim == 2), name


# -- Adafactor -------------------------------------------------------------------------------------


def naive_adafactor(weight, grads, decay, lr, beta1, beta2):
    """Algorithms 4 and 5 of arXiv 1804.04235 in float64, element by element, sums as published.

    With beta2 of its section 7.1, momentum of the steps as in Tensor2Tensor, and decoupled decay.
    """
    weight = weight.detach().double().clone()
    is_vector, X = weight.ndim == 1, weight.view(-1, weight.shape[-1])
    R, C, V, M = torch.zeros(len(X)), torch.zeros(X.shape[1]), torch.zeros_like(X), 0.0
    R, C = R.double(), C.double()
    for t, grad in enumerate(grads, 1):
        G = grad.double().view_as(X)
        b = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        squares = G**2 + 1e-30
        V = b * V + (1 - b) * squares
        R, C = b * R + (1 - b) * squares.sum(1), b * C + (1 - b) * squares.sum(0)
        U = G / (V if is_vector else torch.outer(R, C) / R.sum()).sqrt()
        U = U / max(1.0, float(U.square().mean().sqrt()))
        M = beta1 * M + (1 - beta1) * lr * U
        X -= M + lr * decay * X
    return weight


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_is_what_is_published(beta1):
    config, model, start = replace(ADAFACTOR, beta1=beta1), Network(), Network()
    optimizer, grads = make_optimizer(model, config), []
    for step in range(config.steps):
        set_gradients(model, step)
        # Sizes differ by rows, columns, steps; one row has no gradient before the sixth step.
        for parameter in model.parameters():
            sizes = 2.0 ** -torch.arange(len(parameter))
            parameter.grad *= sizes.view(-1, *[1] * (parameter.ndim - 1))
            parameter.grad[-1] *= step >= 5
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        optimizer.step()
    pairs = zip(start.parameters(), zip(*grads, strict=True), strict=True)
    for mine, (weight, of_weight) in zip(model.parameters(), pairs, strict=True):
        decay = config.weight_decay if weight.ndim > 1 else 0.0
        expected = naive_adafactor(weight, of_weight, decay, 1e-3, beta1, 0.96)
        torch.testing.assert_close(mine.double(), expected, atol=2e-7, rtol=2e-6)


def test_restarted_codes_have_no_history():
    codes, rows = nn.Parameter(torch.zeros(4, 3)), torch.tensor([True, False, False, True])
    optimizer = Adafactor([codes], {"lr": 0.1, "betas": (0.9, 0.96), "weight_decay": 0.0})
    forget_moments(optimizer, codes, rows)  # before the first step there is nothing to forget
    codes.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    before = deepcopy(optimizer.state[codes])
    forget_moments(optimizer, codes, rows)
    for name in ("exp_avg", "row_sq"):
        now = optimizer.state[codes][name]
        assert not now[rows].any() and torch.equal(now[~rows], before[name][~rows])
    assert torch.equal(optimizer.state[codes]["column_sq"], before["column_sq"])
    optimizer.step()
    assert codes.isfinite().all()
