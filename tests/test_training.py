"""Training: the loop against a plain one, what it survives, what it refuses, whole tokenizers."""

import errno
import json
import os
from dataclasses import replace
from itertools import pairwise

import accelerate.checkpointing
import pytest
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sitlib.data import open_images
from sitlib.train import checkpoint, loop, tokenizer
from sitlib.train.checkpoint import StateError
from sitlib.train.config import ONE_PROCESS
from sitlib.train.loop import train_module
from sitlib.train.optim import learning_rate_factor, make_optimizer
from workbook.paths import resolve
from workbook.profile import load_profile

SMOKE = load_profile("smoke")
SETTINGS = {"steps": 10, "warmup_steps": 4, "checkpoint_every": 3, "log_every": 1}
OPTIMIZER = replace(SMOKE.tokenizer.optimizer, **SETTINGS)


def network():
    set_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))


def batch_at(step):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def loss(module, batch, step):
    value = (module(batch) - batch).square().mean()
    return value, {"l2": value.detach()}


def stopped_at(stop):
    """The loss of a run that is stopped in the middle of a step."""

    def stopped(module, batch, step):
        if step == stop:
            raise KeyboardInterrupt
        return loss(module, batch, step)

    return stopped


def fit(folder, loss_fn=loss, run=None, optimizer=OPTIMIZER, **options):
    """Train a small network with dropout in `folder`; the network and its curve."""
    options = {"log_folder": folder.parent, **options}
    return train_module(network(), loss_fn, batch_at, optimizer, folder, run or {}, **options)


def states(folder):
    return [path.name for path in folder.glob("*/")]


def assert_equal(ours, theirs):
    """Models and curves, but for the seconds; as text, because "nan" equals itself."""
    for name, value in theirs[0].state_dict().items():
        assert torch.equal(ours[0].state_dict()[name], value), name
    texts = [[{**row, "seconds": 0} for row in rows] for _, rows in (ours, theirs)]
    assert str(texts[0]) == str(texts[1])


# -- optimizer -------------------------------------------------------------------------------------


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    rates = {"learning_rate": 1.0, "final_learning_rate": 0.1}
    config = replace(OPTIMIZER, steps=104, warmup_steps=4, **rates)
    factors = [learning_rate_factor(step, config) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.55) and factors[104] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_learning_rate_stays_until_it_decays_exponentially():
    rates = {"learning_rate": 1.0, "final_learning_rate": 0.01, "schedule": "exponential"}
    config = replace(OPTIMIZER, steps=104, warmup_steps=4, decay_start=54, **rates)
    factors = [learning_rate_factor(step, config) for step in range(106)]
    assert factors[:3] == [0.25, 0.5, 0.75] and set(factors[3:55]) == {1.0}
    assert factors[79] == pytest.approx(0.1) and factors[104:] == pytest.approx([0.01] * 2)
    ratios = {round(b / a, 12) for a, b in pairwise(factors[54:105])}
    assert ratios == {round(0.01 ** (1 / 50), 12)}


def test_weight_decay_spares_vectors_positions_and_codebooks():
    plain = {"algorithm": "adamw", "weight_decay": 0.1}
    model = nn.ModuleDict({"codebooks": nn.Linear(3, 3), "mlp": nn.Linear(3, 3)})
    decayed, exempt = make_optimizer(model, replace(OPTIMIZER, **plain)).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["mlp"].weight)]
    assert len(exempt["params"]) == 3 and exempt["weight_decay"] == 0


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_it_trains_to_the_bit_what_a_plain_loop_trains(tmp_path, ema_decay):
    config = replace(OPTIMIZER, ema_decay=ema_decay)
    model, _ = fit(tmp_path / "states", optimizer=config)
    plain = network()
    optimizer = make_optimizer(plain, config)
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        loss(plain, batch_at(step), step)[0].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(plain)
    kept = average if ema_decay else plain
    assert all(map(torch.equal, model.parameters(), kept.parameters()))


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.8}, {"algorithm": "adafactor"}])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path, changes):
    config = replace(OPTIMIZER, **({"ema_decay": 0.0} | changes))
    whole = fit(tmp_path / "whole", optimizer=config)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stopped_at(8), optimizer=config)
    assert states(tmp_path / "killed") == ["step-00000006"]
    (tmp_path / "killed/partial").mkdir()  # a state that was being written when it was killed
    assert_equal(fit(tmp_path / "killed", optimizer=config), whole)


def test_a_slow_run_has_a_state_at_every_row_once_the_last_one_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    config = replace(OPTIMIZER, checkpoint_every=100, log_every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stopped_at(7), optimizer=config)
    assert states(tmp_path / "killed") == ["step-00000006"]


def nan_loss(module, batch, step):
    return module(batch).sum() * (float("nan") if step == 7 else 1.0), {}


def nan_gradient(module, batch, step):
    """The loss at the ninth step is 0 and its gradient not a number: only the weights tell."""
    total = module(batch).sum()
    return total if step < 8 else (module[0].weight * 0.0).sum().sqrt(), {}


@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [(nan_loss, "loss at step 8 is"), (nan_gradient, "weights after step 9 are")],
)
def test_what_is_not_finite_ends_the_run_and_is_never_a_state(tmp_path, loss_fn, what):
    with pytest.raises(FloatingPointError, match=f"{what} not finite"):
        fit(tmp_path / "states", loss_fn)
    assert states(tmp_path / "states") == ["step-00000006"]


@pytest.mark.parametrize(
    ("module", "name"), [(accelerate.checkpointing, "save"), (torch, "save"), (checkpoint, "fsync")]
)
def test_a_full_disk_ends_with_a_sentence_and_the_last_good_state(
    tmp_path, monkeypatch, module, name
):
    now, real = {"step": 0}, getattr(module, name)

    def full(*arguments, **options):
        if now["step"] >= 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    def watched(module, batch, step):
        now["step"] = step
        return loss(module, batch, step)

    monkeypatch.setattr(module, name, full)
    sentence = "No space left on device.*Make room, then .*: step 00000006 is intact"
    with pytest.raises(StateError, match=sentence):
        fit(tmp_path / "full", watched)
    monkeypatch.undo()
    assert states(tmp_path / "full") == ["step-00000006"]
    assert_equal(fit(tmp_path / "full"), fit(tmp_path / "whole"))


def test_another_run_in_the_folder_is_refused_with_what_differs(tmp_path):
    run = {"model": {"width": 8, "name": "a"}, "seed": 0}
    fit(tmp_path / "states", run=run)
    assert json.loads((tmp_path / "states/run.json").read_text()) == run
    fit(tmp_path / "states", run=run)  # goes on
    other = {"model": {"width": 16, "name": "a"}, "seed": 1}
    with pytest.raises(StateError, match="step 10 of another run .model.width 8, not 16; seed 0, "):
        fit(tmp_path / "states", run=other)


def test_trackers_get_a_row_once_when_a_run_is_killed_and_goes_on(tmp_path):
    """It goes on from step 6 after it has told of step 8: TensorBoard has these steps once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"engine": replace(ONE_PROCESS, trackers=["tensorboard"]), "title": "net, seed 0"}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "key-images", stopped_at(8), **options)
    _, rows = fit(tmp_path / "key-images", **options)
    events = accumulator.EventAccumulator(str(tmp_path / "trackers/net-seed-0-key"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("l2")]
    assert told == [(row["step"], pytest.approx(row["l2"])) for row in rows]


def test_bf16_trains_too(tmp_path):
    start = network()[0].weight.detach().clone()
    model, rows = fit(tmp_path / "states", engine=replace(ONE_PROCESS, precision="bf16"))
    assert model[0].weight.dtype == torch.float32 and not torch.equal(model[0].weight, start)
    assert rows[-1]["l2"] > 0


# -- whole tokenizers ------------------------------------------------------------------------------


def train(variant, folder, base=None):
    """Train a variant of the profile `smoke`, without LPIPS."""
    config, usual = SMOKE.tokenizer_variant(variant), SMOKE.tokenizer_training(variant)
    usual = replace(usual, loss=replace(usual.loss, lpips=0.0, reset_dead_codes_after=3))
    data = SMOKE.tokenizer_data(variant)
    images = open_images(resolve(data.source), "train")
    options = {"seed": 0, "folder": folder, "base": base}
    return tokenizer.train_tokenizer(config, usual, data, images, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train("sit5_sc", tmp_path_factory.mktemp("base"))[0]


def test_a_base_is_given_to_runs_that_ask_for_it_and_to_no_others(tmp_path, base):
    for variant, given in (("sit5_sc_second", None), ("sit5_sc", base)):
        with pytest.raises(ValueError, match="needs the tokenizer `base`"):
            train(variant, tmp_path, given)


def test_a_training_starts_from_a_smaller_one(tmp_path, base):
    """At four times the pixels it is as good as the base from the first step on; alone it is not."""
    config, usual = replace(base.config, size=128, grid_size=8), SMOKE.tokenizer_training("sit5_sc")
    settings = {"steps": 1, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 1}
    optimizer = replace(usual.optimizer, batch_size=4, **settings)
    alone = replace(usual, optimizer=optimizer, loss=replace(usual.loss, lpips=0.0))
    from_base = replace(alone, starts_from="sit5_sc")
    data = replace(SMOKE.data, size=128)
    images = open_images(resolve(data.source), "train")

    def first_row(config, training, folder, **options):
        options |= {"seed": 0, "folder": tmp_path / folder}
        return tokenizer.train_tokenizer(config, training, data, images, **options)[1][0]

    row = first_row(config, from_base, "base", base=base)
    assert row["l2"] < 0.7 * first_row(config, alone, "alone")["l2"]
    with pytest.raises(ValueError, match="code_dim.* differ"):
        first_row(replace(config, code_dim=8), from_base, "other", base=base)
