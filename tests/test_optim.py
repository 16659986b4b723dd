"""Muon: made orthogonal as an SVD does, beside torch.optim.Muon, AdamW for everything else."""

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
from sitlib.train.optim import make_optimizer, orthogonalize

CONFIG = OptimizerConfig(
    algorithm="muon", steps=8, warmup_steps=0, learning_rate=1e-3, muon_learning_rate=0.02,
    weight_decay=0.1, log_every=1, checkpoint_every=1, ema_decay=0.0,
)  # fmt: skip


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


def test_it_goes_on_from_a_state_to_the_bit():
    model = Network()
    optimizer = make_optimizer(model, CONFIG)
    for step in range(CONFIG.steps):
        if step == 3:
            model, state = deepcopy(model), deepcopy(optimizer.state_dict())
            again, optimizer = optimizer, make_optimizer(model, CONFIG)
            optimizer.load_state_dict(state)
            assert len(again.state) == len(optimizer.state)
        set_gradients(model, step)
        optimizer.step()
    whole = Network()
    straight = make_optimizer(whole, CONFIG)
    for step in range(CONFIG.steps):
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


def test_sharded_matrices_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sitlib.train.loop.make_accelerator", lambda *_: Accelerator())
    loop = TrainLoop(CONFIG, tmp_path, {}, engine=EngineConfig(strategy="fsdp", processes=2))
    with pytest.raises(ValueError, match="set algorithm: adamw"):
        loop.prepare(Network(), CONFIG)
