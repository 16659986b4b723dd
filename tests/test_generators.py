"""What a step of training a model over codes reads, and what it is to predict."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sitlib.train.engine import Part
from workbook import generators
from workbook.codes import Codes
from workbook.profile import load_profile
from workbook.runs import AutoregressiveRun

PROFILE = load_profile("smoke")
IMAGES, STEPS, DROPOUT = 40, 60, 0.25


@pytest.fixture(params=["ar_sit4", "ar_captioned_sit4_sc"])
def training(request, monkeypatch, tmp_path):
    """(model, codes, captions or None, batches) of a variant, of which every image has codes of its own."""
    usual = AutoregressiveRun.of(PROFILE, request.param, 0)
    run = replace(
        usual, model=replace(usual.model, condition_dropout=DROPOUT, code_noise=0.0, text_noise=0)
    )
    digits = torch.stack([torch.arange(IMAGES) // 16, torch.arange(IMAGES) % 16], dim=1)
    maps = digits.repeat(1, 32).view(IMAGES, 4, 16)
    is_text = usual.model.text is not None
    captions = [[f"picture number {i} of many"] for i in range(IMAGES)] if is_text else None
    labels = torch.arange(IMAGES) if is_text else torch.arange(IMAGES) % 3
    codes = Codes(maps, labels, maps[:2], labels[:2], [] if is_text else ["a", "b", "c"])
    found = SimpleNamespace()

    def caught(phases, batch_at, *_, **__):
        found.model, found.batch_at = phases[0].module, batch_at
        return []

    monkeypatch.setattr(generators, "train", caught)
    texts = (
        SimpleNamespace(captions=captions, names=[str(i) for i in range(IMAGES)])
        if is_text
        else None
    )
    generators._train(run, codes, texts, tmp_path, "", PROFILE.engine, None)
    return found.model, codes, captions, [found.batch_at(step, Part(0, 1)) for step in range(STEPS)]


def test_a_share_of_the_conditions_is_hidden_and_nothing_else_is(training):
    model, codes, captions, batches = training
    is_hidden = []
    for read, condition, targets in batches:
        assert torch.equal(read, targets)  # without noise
        images = targets[:, 0, 0] * 16 + targets[:, 0, 1]
        assert torch.equal(targets, codes.train[images])
        if captions is None:
            true = codes.train_labels[images]
        else:
            true = model.text_tokenizer.encode([captions[i][0] for i in images.tolist()])
            true = true[:, : condition.shape[1]]
        nothing = model.unconditional(true)
        kept, hidden = (
            (condition == wanted).view(len(images), -1).all(1) for wanted in (true, nothing)
        )
        assert torch.equal(kept, ~hidden)
        is_hidden.append(hidden)
    share = torch.cat(is_hidden).float().mean()
    assert abs(share - DROPOUT) < 4 * (DROPOUT * (1 - DROPOUT) / len(torch.cat(is_hidden))) ** 0.5
