"""Muon: made orthogonal as an SVD does, beside torch.optim.Muon, AdamW for everything else.

Adafactor: beside the published equations in float64, and beside torch.optim.Adafactor.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sitlib.train.config import EngineConfig, OptimizerConfig
from sitlib.train.loop import TrainLoop
from sitlib.train.optim import Adafactor, forget_moments, make_optimizer, orthogonalize

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


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_singular_values_become_one_and_singular_vectors_stay(rows, columns, seed):
    rng = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, rows, columns, generator=rng, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    S = S.clamp_min(0.2 * S[:, :1])  # five steps lift values from a fifth of the largest
    made = U.mT @ orthogonalize(U @ torch.diag_embed(S) @ Vh, 5) @ Vh.mT
    values = made.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(made, torch.diag_embed(values), atol=1e-9, rtol=0)


def test_steps_are_those_of_torch(monkeypatch):
    monkeypatch.setattr("sitlib.train.optim.NS_STEPS", 5)
    model, other = Network(), Network()
    ours = make_optimizer(model, CONFIG)
    theirs = torch.optim.Muon(
        other.hidden(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(CONFIG.steps):
        for network, optimizer in ((model, ours), (other, theirs)):
            set_gradients(network, step)
            optimizer.step()
    for mine, reference, first in zip(
        model.hidden(), other.hidden(), Network().hidden(), strict=True
    ):
        moved = (reference - first).norm()
        assert (mine - reference).norm() < 0.02 * moved  # torch multiplies in bf16


def test_all_other_weights_move_as_with_adamw_to_the_bit():
    model, other = Network(), Network()
    ours, theirs = (
        make_optimizer(model, CONFIG),
        make_optimizer(other, replace(CONFIG, algorithm="adamw")),
    )
    for step in range(CONFIG.steps):
        for network, optimizer in ((model, ours), (other, theirs)):
            set_gradients(network, step)
            optimizer.step()
    same = {
        name: torch.equal(p, dict(other.named_parameters())[name])
        for name, p in model.named_parameters()
    }
    assert [name for name in same if not same[name]] == [
        name for name in same if "blocks" in name and name.endswith("weight")
    ]


def test_a_batch_of_matrices_is_each_alone():
    matrices = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalize(matrix[None], 3) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, 3), alone)


@pytest.mark.parametrize("config", [CONFIG, ADAFACTOR], ids=lambda config: config.algorithm)
def test_it_goes_on_from_a_state_to_the_bit(config):
    model = Network()
    optimizer = make_optimizer(model, config)
    for step in range(config.steps):
        if step == 3:
            model, state = deepcopy(model), deepcopy(optimizer.state_dict())
            again, optimizer = optimizer, make_optimizer(model, config)
            optimizer.load_state_dict(state)
            assert len(again.state) == len(optimizer.state)
        set_gradients(model, step)
        optimizer.step()
    whole = Network()
    straight = make_optimizer(whole, config)
    for step in range(config.steps):
        set_gradients(whole, step)
        straight.step()
    assert all(map(torch.equal, model.parameters(), whole.parameters()))


def test_a_matrix_without_gradient_stays():
    model = Network()
    optimizer, before = make_optimizer(model, CONFIG), deepcopy(model)
    set_gradients(model, 0)
    model.hidden()[0].grad = None
    optimizer.step()
    still = [torch.equal(a, b) for a, b in zip(model.hidden(), before.hidden(), strict=True)]
    assert still == [True, False, False, False]


@pytest.mark.parametrize("config", [CONFIG, ADAFACTOR], ids=lambda config: config.algorithm)
def test_sharded_matrices_are_refused(tmp_path, monkeypatch, config):
    monkeypatch.setattr("sitlib.train.loop.make_accelerator", lambda *_: Accelerator())
    loop = TrainLoop(config, tmp_path, {}, engine=EngineConfig(strategy="fsdp", processes=2))
    with pytest.raises(ValueError, match=f"{config.algorithm} takes whole: set algorithm: adamw"):
        loop.prepare(Network(), config)


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


def test_adafactor_without_momentum_is_that_of_torch_where_both_mean_the_same():
    """torch's beta2 is 1 - 1 / t with `beta2_decay=-1`, ours in the limit of 1; its rate is absolute
    while lr < 1 / sqrt(t) and weights' sizes are below `eps2`."""
    model, other = Network(), Network()
    ours = Adafactor(
        model.parameters(), {"lr": 1e-3, "betas": (0.0, 1 - 1e-7), "weight_decay": 0.1}
    )
    theirs = torch.optim.Adafactor(
        other.parameters(), lr=1e-3, beta2_decay=-1.0, eps=(1e-30, 1.0), weight_decay=0.1
    )
    for step in range(8):
        for network, optimizer in ((model, ours), (other, theirs)):
            set_gradients(network, step)
            optimizer.step()
    for mine, reference in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-7, rtol=2e-6)


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
