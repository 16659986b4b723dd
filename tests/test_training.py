"""The loop: schedule, a killed run resumed to the bit, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sitlib.config import load_profile
from sitlib.experiments import runs
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.results import read_curve
from sitlib.training import Phase, learning_rate_factor, make_optimiser, seed_everything, train

OPTIMISER = replace(
    load_profile("smoke").tokenizer.optimiser, steps=10, warmup_steps=4, checkpoint_every=3, log_every=1
)


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    config = replace(OPTIMISER, steps=104, warmup_steps=4, learning_rate=1.0, final_learning_rate=0.1)
    factors = [learning_rate_factor(step, config) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.55) and factors[104] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_weight_decay_spares_vectors_positions_and_codebooks():
    model = nn.ModuleDict({"codebooks": nn.Linear(3, 3), "mlp": nn.Linear(3, 3)})
    decayed, exempt = make_optimiser(model, replace(OPTIMISER, weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)] and decayed["params"][0] is model["mlp"].weight
    assert len(exempt["params"]) == 3 and exempt["weight_decay"] == 0


def fit(folder, stop_at=None, steps=10):
    """Trains a small network with dropout; `stop_at` raises in the middle of that step, as a kill would."""
    seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def batch_at(step):
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

    def loss(module, batch, step):
        if step == stop_at:
            raise KeyboardInterrupt
        value = (module(batch) - batch).square().mean()
        return value, {"l2": value.detach()}

    rows = train([Phase(model, loss)], batch_at, replace(OPTIMISER, steps=steps), checkpoints=folder)
    return [p.detach().clone() for p in model.parameters()], rows


def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path):
    whole, rows = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=8)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000006"]
    (tmp_path / "killed" / "partial").mkdir()  # a checkpoint that was being written when the run was killed
    resumed, resumed_rows = fit(tmp_path / "killed")
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole, strict=True))
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in resumed_rows] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    model = nn.Linear(2, 2)

    def loss(module, batch, step):
        value = module(batch).sum() * (float("nan") if step == 7 else 1.0)
        return value, {}

    with pytest.raises(FloatingPointError, match="not finite at step 8"):
        train([Phase(model, loss)], lambda step: torch.ones(1, 2), OPTIMISER, checkpoints=tmp_path)
    assert (tmp_path / "step-00000006").exists()


def test_two_phases_train_two_modules(tmp_path):
    """The place of a discriminator: an own loss and optimiser in the same loop."""
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    starts = [m.weight.detach().clone() for m in models]
    phases = [Phase(m, lambda module, batch, step: (module(batch).square().mean(), {})) for m in models]
    train(phases, lambda step: torch.ones(4, 2), OPTIMISER, checkpoints=tmp_path)
    assert all(not torch.equal(m.weight, start) for m, start in zip(models, starts, strict=True))


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
    return replace(profile, tokenizer=replace(section, loss=replace(section.loss, lpips=0.0)))


def test_a_run_of_ones_own_goes_to_scratch_and_is_found_again(elsewhere, monkeypatch):
    profile = without_lpips()
    first = trained_tokenizer(profile, "sit4", 0)
    assert first.path.is_relative_to(elsewhere / "scratch") and not (elsewhere / "models").exists()
    assert not list((elsewhere / ".ckpt").glob("*"))  # the checkpoints of a finished run are gone
    assert first.curve["step"][-1] == profile.tokenizer.optimiser.steps and not first.model.training
    stamp = first.path.stat().st_mtime_ns
    assert trained_tokenizer(profile, "sit4", 0).path.stat().st_mtime_ns == stamp


def test_the_pipelines_result_is_taken_only_if_it_is_of_the_same_run(elsewhere):
    profile = without_lpips()
    made = trained_tokenizer(profile, "sit4", 0, pipeline=True)
    assert made.path == elsewhere / "models/tokenizer/sit4-seed0/model.safetensors"
    assert trained_tokenizer(profile, "sit4", 0).path == made.path
    changed = replace(profile, data=replace(profile.data, min_crop=0.5))
    assert trained_tokenizer(changed, "sit4", 0).path.is_relative_to(elsewhere / "scratch")
    assert read_curve(elsewhere / "metrics/curves/tokenizer/sit4-seed0.csv") == made.curve


def test_same_seed_same_result_and_a_killed_tokenizer_resumes_to_the_bit(elsewhere, monkeypatch):
    profile = without_lpips()
    whole = trained_tokenizer(profile, "sit4", 0, pipeline=True).model
    from sitlib.quantizer import Codebook

    real, calls = Codebook.restart_dead, []

    def killed(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2 * 10:  # two codebooks: in the tenth step of twelve
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Codebook, "restart_dead", killed)
    with pytest.raises(KeyboardInterrupt):
        trained_tokenizer(profile, "sit4", 0, pipeline=True)
    monkeypatch.setattr(Codebook, "restart_dead", real)
    assert [path.name for path in (elsewhere / ".ckpt").glob("*/*")] == ["step-00000008"]
    resumed = trained_tokenizer(profile, "sit4", 0, pipeline=True).model
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
