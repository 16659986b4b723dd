"""The loop: schedule, a killed run resumed to the bit, refusals."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sitlib.files import read_csv
from sitlib.strict import digest
from sitlib.train import loop as training
from sitlib.train.loop import Phase, learning_rate_factor, make_optimizer, seed_everything, train
from workbook import runs, tokenizers
from workbook.finished import FOLDER, forget
from workbook.profile import load_profile
from workbook.runs import TokenizerRun
from workbook.tokenizers import trained_tokenizer

OPTIMISER = replace(
    load_profile("smoke").tokenizer.optimizer,
    steps=10,
    warmup_steps=4,
    checkpoint_every=3,
    log_every=1,
)


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    config = replace(
        OPTIMISER, steps=104, warmup_steps=4, learning_rate=1.0, final_learning_rate=0.1
    )
    factors = [learning_rate_factor(step, config) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.55) and factors[104] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_weight_decay_spares_vectors_positions_and_codebooks():
    model = nn.ModuleDict({"codebooks": nn.Linear(3, 3), "mlp": nn.Linear(3, 3)})
    decayed, exempt = make_optimizer(model, replace(OPTIMISER, weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)] and decayed["params"][0] is model[
        "mlp"
    ].weight
    assert len(exempt["params"]) == 3 and exempt["weight_decay"] == 0


def fit(folder, stop_at=None, steps=10, **changes):
    """Trains a small network with dropout; `stop_at` raises in the middle of that step, as a kill would."""
    seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def batch_at(step, part):
        return part.of(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))

    def loss(module, batch, step):
        if step == stop_at:
            raise KeyboardInterrupt
        value = (module(batch) - batch).square().mean()
        return value, {"l2": value.detach()}

    rows = train(
        [Phase(model, loss)],
        batch_at,
        replace(OPTIMISER, steps=steps, **changes),
        checkpoints=folder,
    )
    return [p.detach().clone() for p in model.parameters()], rows


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path, ema_decay):
    whole, rows = fit(tmp_path / "whole", ema_decay=ema_decay)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=8, ema_decay=ema_decay)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000006"]
    (
        tmp_path / "killed" / "partial"
    ).mkdir()  # a checkpoint that was being written when the run was killed
    resumed, resumed_rows = fit(tmp_path / "killed", ema_decay=ema_decay)
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole, strict=True))
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in resumed_rows] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]


def test_a_slow_run_has_a_state_at_every_row_once_the_last_one_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=7, checkpoint_every=100, log_every=2)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000006"]
    monkeypatch.setattr(training, "STATE_SECONDS", 60.0)
    whole, _ = fit(tmp_path / "whole", checkpoint_every=100, log_every=2)
    resumed, _ = fit(tmp_path / "killed", checkpoint_every=100, log_every=2)
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole, strict=True))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    model = nn.Linear(2, 2)

    def loss(module, batch, step):
        value = module(batch).sum() * (float("nan") if step == 7 else 1.0)
        return value, {}

    with pytest.raises(FloatingPointError, match="not finite at step 8"):
        train(
            [Phase(model, loss)],
            lambda step, part: torch.ones(1, 2),
            OPTIMISER,
            checkpoints=tmp_path,
        )
    assert (tmp_path / "step-00000006").exists()


def test_weights_that_are_not_finite_end_the_run_before_they_are_a_checkpoint(tmp_path):
    """The loss at the ninth step is 0 and its gradient is not a number, and this step writes a state: only the weights tell."""
    model = nn.Linear(2, 2)

    def loss(module, batch, step):
        value = module(batch).sum() if step < 8 else (module.weight * 0.0).sum().sqrt()
        return value, {}

    with pytest.raises(FloatingPointError, match="weights are not finite after step 9"):
        train(
            [Phase(model, loss)],
            lambda step, part: torch.ones(1, 2),
            OPTIMISER,
            checkpoints=tmp_path,
        )
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000006"]


def test_two_phases_train_two_modules(tmp_path):
    """The place of a discriminator: an own loss and optimizer in the same loop."""
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    starts = [m.weight.detach().clone() for m in models]
    phases = [
        Phase(m, lambda module, batch, step: (module(batch).square().mean(), {})) for m in models
    ]
    train(phases, lambda step, part: torch.ones(4, 2), OPTIMISER, checkpoints=tmp_path)
    assert all(not torch.equal(m.weight, start) for m, start in zip(models, starts, strict=True))


def test_a_phase_may_rest_and_has_settings_of_its_own(tmp_path):
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    start = models[1].weight.detach().clone()
    awake = []

    def second(module, batch, step):
        if step < 6:
            assert torch.equal(module.weight, start)
            return None
        awake.append(step)
        value = module(batch).square().mean()
        return value, {"second": value.detach()}

    phases = [
        Phase(models[0], lambda module, batch, step: (module(batch).square().mean(), {})),
        Phase(
            models[1],
            second,
            optimizer=replace(OPTIMISER, learning_rate=0.0125, warmup_steps=0, weight_decay=0.0),
        ),
    ]
    rows = train(phases, lambda step, part: torch.ones(4, 2), OPTIMISER, checkpoints=tmp_path)
    assert awake == [6, 7, 8, 9]
    assert "second" not in rows[5] and "second" in rows[6]
    # Adam's first step moves every weight by the learning rate: its own, not that of the run.
    assert (models[1].weight - start).abs().max() > 0.0125


def test_values_at_log_stand_in_the_row_of_their_steps(tmp_path):
    seen = []

    def at_log():
        count = float(len(seen))
        seen.clear()
        return {"steps_since": count}

    model = nn.Linear(2, 2)
    phase = Phase(
        model, lambda module, batch, step: (module(batch).square().mean(), {}), at_log=at_log
    )
    phase.after_update = lambda optimizer: seen.append(1) or {}
    rows = train(
        [phase],
        lambda step, part: torch.ones(1, 2),
        replace(OPTIMISER, log_every=3),
        checkpoints=tmp_path,
    )
    assert [row["steps_since"] for row in rows] == [3, 3, 3, 1]


def test_the_moving_average_is_torchs():
    ours, theirs = (
        AveragedModel(nn.Linear(4, 3), multi_avg_fn=get_ema_multi_avg_fn(0.9)) for _ in range(2)
    )
    model = nn.Linear(4, 3)
    for _ in range(4):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        training._follow(ours, model, 0.9)
        theirs.update_parameters(model)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_the_moving_average_of_the_weights_is_what_is_kept(tmp_path):
    history = []

    def fit_average(decay, folder):
        history.clear()
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        phase = Phase(model, lambda module, batch, step: (module(batch).square().mean(), {}))
        phase.after_update = lambda optimizer: history.append(model.weight.detach().clone()) or {}
        train(
            [phase],
            lambda step, part: torch.ones(4, 3),
            replace(OPTIMISER, ema_decay=decay),
            checkpoints=folder,
        )
        return model.weight.detach()

    kept = fit_average(0.5, tmp_path / "a")
    average = history[0]
    for weight in history[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(kept, average)
    assert not torch.equal(kept, history[-1])
    assert torch.equal(fit_average(0.0, tmp_path / "b"), history[-1])


# -- runs ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Results go to a folder of the test's own; data and weights are the project's."""
    real = runs.resolve
    monkeypatch.setattr(
        runs,
        "resolve",
        lambda path: (
            tmp_path / path
            if str(path).split("/")[0] in ("models", "scratch", "metrics", ".ckpt")
            else real(path)
        ),
    )
    return tmp_path


def without_lpips():
    profile = load_profile("smoke")
    section = profile.tokenizer
    variants = section.variants | {"sit4_gan": GAN}
    return replace(
        profile,
        tokenizer=replace(section, variants=variants, loss=replace(section.loss, lpips=0.0)),
    )


SMOKE = load_profile("smoke")
JUDGE = replace(SMOKE.text.dual_encoder, reconstructions=[])
NO_GENERATORS = {
    "autoregressive": replace(SMOKE.autoregressive, variants={}),
    "text": replace(SMOKE.text, variants={}, samplers={}, dual_encoder=JUDGE),
}
GAN = {
    "levels": 3,
    "grid_size": 4,
    "adversarial": {"weight": 0.1, "r1": 1.0, "r1_every": 2},
    "optimizer": {"ema_decay": 0.9},
}


def test_a_run_of_ones_own_goes_to_scratch_and_is_found_again(elsewhere, monkeypatch):
    profile = without_lpips()
    first = trained_tokenizer(profile, "sit4", 0)
    assert first.path.is_relative_to(elsewhere / "scratch") and not (elsewhere / "models").exists()
    assert [path.name for path in (elsewhere / ".ckpt").iterdir()] == [
        "locks"
    ]  # the checkpoints of a finished run are gone
    assert first.curve["step"][-1] == profile.tokenizer.optimizer.steps and not first.model.training
    stamp = first.path.stat().st_mtime_ns
    assert trained_tokenizer(profile, "sit4", 0).path.stat().st_mtime_ns == stamp


def test_the_pipelines_result_is_taken_only_if_it_is_of_the_same_run(elsewhere):
    profile = without_lpips()
    made = trained_tokenizer(profile, "sit4", 0, pipeline=True)
    assert made.path == elsewhere / "models/tokenizer/sit4-seed0/model.safetensors"
    assert trained_tokenizer(profile, "sit4", 0).path == made.path
    changed = replace(profile, data=replace(profile.data, min_crop=0.5))
    assert trained_tokenizer(changed, "sit4", 0).path.is_relative_to(elsewhere / "scratch")
    assert read_csv(elsewhere / "metrics/curves/tokenizer/sit4-seed0.csv") == made.curve


def test_same_seed_same_result_and_a_killed_tokenizer_resumes_to_the_bit(elsewhere, monkeypatch):
    profile = without_lpips()
    whole = trained_tokenizer(profile, "sit4", 0, pipeline=True).model
    from sitlib.model.quantizer import Codebook

    real, calls = Codebook.reset_dead_codes, []

    def killed(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4 * 10:  # four codebooks: in the tenth step of twelve
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Codebook, "reset_dead_codes", killed)
    forget(elsewhere / FOLDER)
    with pytest.raises(KeyboardInterrupt):
        trained_tokenizer(profile, "sit4", 0, pipeline=True)
    monkeypatch.setattr(Codebook, "reset_dead_codes", real)
    assert [path.name for path in (elsewhere / ".ckpt").glob("*-*/*")] == ["step-00000008"]
    resumed = trained_tokenizer(profile, "sit4", 0, pipeline=True).model
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# -- whole tokenizers ------------------------------------------------------------------------------------------------------------------


def weights_of(model):
    return torch.cat(
        [p.detach().flatten() for p in model.state_dict().values() if p.is_floating_point()]
    )


@pytest.mark.parametrize("variant", ["sit4", "sit4_gan", "sit5_sc_second"])
def test_a_killed_tokenizer_training_ends_with_the_same_weights(elsewhere, monkeypatch, variant):
    profile = without_lpips()
    whole = trained_tokenizer(profile, variant, 0)
    shutil.rmtree(
        elsewhere
        / "scratch"
        / "tokenizer"
        / f"{variant}-seed0-{digest(TokenizerRun.of(profile, variant, 0))}"
    )
    real, calls = tokenizers.training_views, []

    def killed(*arguments, **options):
        calls.append(arguments[1])
        if calls.count(7) == 1 and arguments[1] == 7:  # the prefetched batch of step 7, once
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(tokenizers, "training_views", killed)
    with pytest.raises(KeyboardInterrupt):
        trained_tokenizer(profile, variant, 0)
    assert list((elsewhere / ".ckpt").glob("*/step-*"))
    again = trained_tokenizer(profile, variant, 0)
    assert torch.equal(weights_of(again.model), weights_of(whole.model))
    strip = lambda curve: {k: v for k, v in curve.items() if k != "seconds"}  # noqa: E731
    assert str(strip(again.curve)) == str(strip(whole.curve))  # as text: "nan" equals itself


def test_every_row_of_the_curve_tells_how_codebooks_are_used(elsewhere):
    books = {"sit4_two": ["details"], "sit4": ["details_2", "details_3", "details_4"]}
    curves = {variant: trained_tokenizer(without_lpips(), variant, 0).curve for variant in books}
    columns = [
        (curves[variant], name)
        for variant, details in books.items()
        for name in ("approximation", *details, *(f"scale_{scale}" for scale in (1, 2, 3, 4)))
    ]
    for curve, name in columns:
        assert all(0 < value <= 100 for value in curve[f"usage_{name}"])
        assert all(1 <= value <= 64 for value in curve[f"perplexity_{name}"])


def test_a_second_decoder_is_trained_on_the_codes_of_the_first(elsewhere):
    profile = without_lpips()
    second = trained_tokenizer(profile, "sit5_sc_second", 0).model
    base = trained_tokenizer(profile, "sit5_sc", 0).model
    images = torch.rand(4, 3, 64, 64)
    assert torch.equal(second.encode(images), base.encode(images))
    assert second.config.decoder_layers == 2 and not torch.allclose(
        second.reconstruct(images), base.reconstruct(images)
    )


def psnr_by_pass(monkeypatch, steps, **adversarial):
    """Training PSNR of every pass over the same four batches, and where in it the discriminator begins to speak."""
    real = tokenizers.training_views
    monkeypatch.setattr(
        tokenizers,
        "training_views",
        lambda images, step, *rest, **options: real(images, step % 4, *rest, **options),
    )
    optimizer = {
        "steps": steps,
        "log_every": 4,
        "checkpoint_every": steps,
        "learning_rate": 2e-3,
        "final_learning_rate": 1e-3,
    }
    variant = {"levels": 3, "grid_size": 4, "optimizer": optimizer, "adversarial": adversarial}
    profile = without_lpips()
    profile = replace(
        profile, tokenizer=replace(profile.tokenizer, variants={"gan": variant}), **NO_GENERATORS
    )
    curve = trained_tokenizer(profile, "gan", 0).curve
    speaks = sum(step <= adversarial["start"] + adversarial["warmup"] for step in curve["step"])
    assert not math.isnan(curve["adversarial"][-1]) and math.isnan(curve["adversarial"][speaks - 1])
    return [
        10 * math.log10(4 / error) for error in curve["l2"]
    ], speaks  # peak 2, for errors in [-1, 1]


def test_switching_the_adversarial_term_on_does_not_ruin_a_reconstruction(elsewhere, monkeypatch):
    psnr, speaks = psnr_by_pass(monkeypatch, 160, weight=0.1, start=40, warmup=40, ramp=40)
    assert min(psnr[speaks:]) > psnr[speaks - 1] - 0.5
    assert psnr[-1] > psnr[speaks - 1]  # and the reconstruction still improves, 80 steps later


def test_without_warm_up_and_ramp_a_heavy_adversarial_term_does(elsewhere, monkeypatch):
    psnr, speaks = psnr_by_pass(
        monkeypatch, 100, weight=2.0, start=60, warmup=0, ramp=0, learning_rate=1e-3
    )
    assert min(psnr[speaks:]) < psnr[speaks - 1] - 0.5
