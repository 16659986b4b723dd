"""Training: schedule, average, a killed run resumed to the bit, refusals, whole tokenizers."""

from dataclasses import replace

import pytest
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sitlib.data import open_images
from sitlib.train import loop as loops
from sitlib.train import tokenizer as training
from sitlib.train.loop import train_module
from sitlib.train.optim import ema_update, learning_rate_factor, make_optimizer
from sitlib.train.tokenizer import train_tokenizer
from workbook.paths import resolve
from workbook.profile import load_profile

SMOKE = load_profile("smoke")
SETTINGS = {"steps": 10, "warmup_steps": 4, "checkpoint_every": 3, "log_every": 1}
OPTIMIZER = replace(SMOKE.tokenizer.optimizer, **SETTINGS)


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    rates = {"learning_rate": 1.0, "final_learning_rate": 0.1}
    config = replace(OPTIMIZER, steps=104, warmup_steps=4, **rates)
    factors = [learning_rate_factor(step, config) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.55) and factors[104] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_weight_decay_spares_vectors_positions_and_codebooks():
    model = nn.ModuleDict({"codebooks": nn.Linear(3, 3), "mlp": nn.Linear(3, 3)})
    decayed, exempt = make_optimizer(model, replace(OPTIMIZER, weight_decay=0.1)).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["mlp"].weight)]
    assert len(exempt["params"]) == 3 and exempt["weight_decay"] == 0


def test_the_moving_average_is_torchs():
    average = get_ema_multi_avg_fn(0.9)
    ours, theirs = (AveragedModel(nn.Linear(4, 3), multi_avg_fn=average) for _ in range(2))
    model = nn.Linear(4, 3)
    for _ in range(4):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        ema_update(ours, model, 0.9)
        theirs.update_parameters(model)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


# -- the loop ------------------------------------------------------------------------------------


def batch_at(step, part):
    return part.of(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))


def fit(folder, loss_fn=None, stop_at=None, **changes):
    """Train a small network with dropout; `stop_at` raises in the middle of that step, as a kill."""
    set_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def loss(module, batch, step):
        if step == stop_at:
            raise KeyboardInterrupt
        value = (module(batch) - batch).square().mean()
        return value, {"l2": value.detach()}

    config = replace(OPTIMIZER, **changes)
    return train_module(model, loss_fn or loss, batch_at, config, folder=folder, run={})


def states(folder):
    return [path.name for path in folder.glob("step-*")]


def without_seconds(rows):
    """As text: "nan" equals itself."""
    return str([{k: v for k, v in row.items() if k != "seconds"} for row in rows])


def assert_equal(ours, theirs):
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path, ema_decay):
    whole, rows = fit(tmp_path / "whole", ema_decay=ema_decay)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=8, ema_decay=ema_decay)
    assert states(tmp_path / "killed") == ["step-00000006"]
    (tmp_path / "killed/partial").mkdir()  # a state that was being written when it was killed
    resumed, resumed_rows = fit(tmp_path / "killed", ema_decay=ema_decay)
    assert_equal(resumed, whole)
    assert without_seconds(resumed_rows) == without_seconds(rows)


def test_a_slow_run_has_a_state_at_every_row_once_the_last_one_is_old(tmp_path, monkeypatch):
    settings = {"checkpoint_every": 100, "log_every": 2}
    monkeypatch.setattr(loops, "STATE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=7, **settings)
    assert states(tmp_path / "killed") == ["step-00000006"]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(tmp_path):
    def loss(module, batch, step):
        return module(batch).sum() * (float("nan") if step == 7 else 1.0), {}

    with pytest.raises(FloatingPointError, match="loss at step 8 is not finite"):
        fit(tmp_path, loss)
    assert states(tmp_path) == ["step-00000006"]


def test_weights_that_are_not_finite_end_the_run_before_they_are_a_state(tmp_path):
    """The loss at the ninth step is 0 and its gradient not a number: only the weights tell."""

    def loss(module, batch, step):
        total = module(batch).sum()
        return total if step < 8 else (module[0].weight * 0.0).sum().sqrt(), {}

    with pytest.raises(FloatingPointError, match="weights after step 9 are not finite"):
        fit(tmp_path, loss)
    assert states(tmp_path) == ["step-00000006"]


def test_the_moving_average_of_the_weights_is_what_is_kept(tmp_path):
    def fit_average(decay, folder):
        torch.manual_seed(0)
        model, history = nn.Linear(4, 3), []
        trained, _ = train_module(
            model,
            lambda module, batch, step: (module(batch).square().mean(), {}),
            batch_at,
            replace(OPTIMIZER, ema_decay=decay),
            folder=folder,
            run={},
            after_update=lambda: history.append(model.weight.detach().clone()),
        )
        return trained.weight.detach(), history

    kept, history = fit_average(0.5, tmp_path / "a")
    average = history[0]
    for weight in history[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(kept, average)
    assert torch.equal(fit_average(0.0, tmp_path / "b")[0], history[-1])


# -- whole tokenizers ----------------------------------------------------------------------------


def train(variant, folder, base=None, adversarial=None, **optimizer):
    """Train a variant of the profile `smoke`, without LPIPS."""
    config, usual = SMOKE.tokenizer_variant(variant), SMOKE.tokenizer_training(variant)
    usual = replace(usual, loss=replace(usual.loss, lpips=0.0, reset_dead_codes_after=3))
    usual = replace(usual, optimizer=replace(usual.optimizer, **optimizer))
    usual = replace(usual, adversarial=replace(usual.adversarial, **(adversarial or {})))
    data = SMOKE.tokenizer_data(variant)
    images = open_images(resolve(data.source), "train")
    return train_tokenizer(config, usual, data, images, seed=0, folder=folder, base=base)


GAN = {"weight": 0.1, "start": 2, "warmup": 1, "ramp": 2, "r1": 1.0, "r1_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train("sit5_sc", tmp_path_factory.mktemp("base"))[0]


@pytest.mark.parametrize(
    ("variant", "adversarial", "ema_decay"),
    [("sit4", None, 0.0), ("sit4", GAN, 0.9), ("sit5_sc_second", None, 0.0)],
    ids=["sit4", "with a discriminator", "second decoder"],
)
def test_a_killed_tokenizer_ends_with_the_same_bits(
    tmp_path, monkeypatch, base, variant, adversarial, ema_decay
):
    base = base if variant.endswith("second") else None

    def run(folder):
        return train(variant, folder, base, adversarial, ema_decay=ema_decay)

    whole, rows = run(tmp_path / "whole")
    real = training.training_views

    def killed(images, step, *arguments, **options):
        if step == 7:
            raise KeyboardInterrupt
        return real(images, step, *arguments, **options)

    monkeypatch.setattr(training, "training_views", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.undo()
    assert states(tmp_path / "killed")
    again, again_rows = run(tmp_path / "killed")
    assert_equal(again, whole)
    assert without_seconds(again_rows) == without_seconds(rows)


def test_a_base_is_given_to_runs_that_ask_for_it_and_to_no_others(tmp_path, base):
    for variant, given in (("sit5_sc_second", None), ("sit5_sc", base)):
        with pytest.raises(ValueError, match="needs the tokenizer `base`"):
            train(variant, tmp_path, given)


@pytest.mark.parametrize(
    ("variant", "details"),
    [("sit4_two", ["details"]), ("sit4", ["details_2", "details_3", "details_4"])],
)
def test_every_row_of_the_curve_tells_how_codebooks_are_used(tmp_path, variant, details):
    _, rows = train(variant, tmp_path)
    scales = [f"scale_{scale}" for scale in (1, 2, 3, 4)]
    for name in ("approximation", *details, *scales):
        assert all(0 < row[f"usage_{name}"] <= 100 for row in rows)
        assert all(1 <= row[f"perplexity_{name}"] <= 64 for row in rows)


def test_a_second_decoder_is_trained_on_the_codes_of_the_first(tmp_path, base):
    second, _ = train("sit5_sc_second", tmp_path, base)
    second, images = second.eval(), torch.rand(4, 3, 64, 64)
    assert torch.equal(second.encode(images), base.encode(images))
    assert second.config.decoder_layers == 2
    assert not torch.allclose(second.reconstruct(images), base.reconstruct(images))
