"""Training a generator: what a step reads and predicts, resumption, pictures, noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CAPTIONS, TEXTS, tokenizer_of

from sitlib.data import CaptionedImages
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train import generator as training
from sitlib.train.config import ONE_PROCESS
from sitlib.train.loop import TrainLoop
from workbook import generators
from workbook.codes import Codes
from workbook.profile import load_profile
from workbook.runs import AutoregressiveRun, Trained

PROFILE = load_profile("smoke")
IMAGES, STEPS, DROPOUT = 40, 60, 0.25
VARIANTS = ["ar_sit4", "ar_captioned_sit4_sc"]


def codes_of(variant):
    """(codes of which every image has its own, captions or None) for a variant."""
    digits = torch.stack([torch.arange(IMAGES) // 16, torch.arange(IMAGES) % 16], dim=1)
    maps, captions = digits.repeat(1, 32).view(IMAGES, 4, 16), None
    labels, classes = torch.arange(IMAGES) % 3, ["a", "b", "c"]
    if "captioned" in variant:
        texts = [[f"picture number {i} of many"] for i in range(IMAGES)]
        names = [str(i) for i in range(IMAGES)]
        captions = CaptionedImages([], texts, names, names)
        labels, classes = torch.arange(IMAGES), []
    return Codes(maps, labels, maps[:2], labels[:2], classes), captions


def train(variant, folder, engine=ONE_PROCESS, optimizer=None, model=None, pictures=None):
    run, (codes, captions) = AutoregressiveRun.of(PROFILE, variant, 0), codes_of(variant)
    run = replace(run, model=replace(run.model, **(model or {})))
    c = run.codes.tokenizer.model
    rng, sizes = torch.Generator().manual_seed(0), c.codebook_sizes[: c.num_codebooks]
    books = [torch.randn(K, c.code_dim, generator=rng) for K in sizes]
    return training.train_generator(
        generators.model_config(run, codes, captions),
        replace(run.optimizer, **(optimizer or {})),
        codes.train,
        codes.train_labels,
        seed=0,
        folder=folder,
        codebooks=books if run.model.code_vectors else (),
        captions=captions.captions if captions else None,
        names=captions.names if captions else None,
        engine=engine,
        title="test",
        log_folder=folder.parent,
        pictures=pictures,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_model_learns_to_fill_in_scales(tmp_path, variant):
    """Codes of an image repeat two digits: what is visible of a scale says the rest of it."""
    longer = {"steps": 150, "learning_rate": 3.0e-3, "log_every": 10, "checkpoint_every": 150}
    changes = {"masked": True, "code_noise": 0.0, "text_noise": 0}
    model, rows = train(variant, tmp_path / "states", optimizer=longer, model=changes)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    (codes, _), c = codes_of(variant), model.config
    codes = codes.held_out
    cond = torch.zeros(2).long()
    if model.text_tokenizer is not None:
        cond = model.text_tokenizer.encode(["picture number 0 of many", "picture number 1 of many"])
    is_hidden = torch.arange(c.tokens_per_scale).expand(codes.shape) >= 8
    model = model.eval()
    with torch.no_grad():
        right = model(codes, cond, is_hidden).argmax(-1) == codes
    assert right[is_hidden].float().mean() > 0.8


def test_a_model_reads_codes_by_the_vectors_that_the_tokenizer_decodes(monkeypatch):
    """All of them scaled to a variance of one."""
    tokenizer, variant = tokenizer_of("sit5_sc"), "ar_sit5_sc"
    c = tokenizer.config
    monkeypatch.setattr(generators, "tokenizer_of_codes", lambda *_: Trained(tokenizer, [], None))
    books = generators.codebooks_of(PROFILE, variant)
    shape = AutoregressiveRun.of(PROFILE, variant, 0).model
    model = AutoregressiveModel(generators.config_over(c, shape, ["a"]))
    model.set_codebooks(books)
    codes = torch.stack([torch.arange(8) % K for K in c.codebook_sizes])[None]  # [1, S, 8]
    for scale, vectors in enumerate(tokenizer.embed_codes(codes)[0].detach()):
        read = model.code_embedding[c.codebook_of[scale]].vectors[codes[0, scale]]
        torch.testing.assert_close(read, vectors * c.code_dim**0.5)
    with pytest.raises(ValueError, match="needs codebooks of shapes"):
        model.set_codebooks(books[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_of_the_conditions_is_hidden_and_nothing_else_is(tmp_path, monkeypatch, variant):
    (codes, captions), batches, is_hidden = codes_of(variant), [], []

    def steps(self, batch_at, *_):
        batches.extend(batch_at(step) for step in range(STEPS))
        return iter(())

    monkeypatch.setattr(TrainLoop, "steps", steps)
    clean = {"condition_dropout": DROPOUT, "code_noise": 0.0, "text_noise": 0}
    model, _ = train(variant, tmp_path / "states", model=clean)
    for read, condition, targets, is_predicted in batches:
        assert is_predicted.all()  # of a model that is not masked
        assert torch.equal(read, targets)  # without noise
        images = targets[:, 0, 0] * 16 + targets[:, 0, 1]
        assert torch.equal(targets, codes.train[images])
        true = codes.train_labels[images]
        if captions is not None:
            texts = [captions.captions[i][0] for i in images.tolist()]
            true = model.text_tokenizer.encode(texts)[:, : condition.shape[1]]
        pair = (true, model.unconditional(true))
        kept, hidden = ((condition == x).view(len(images), -1).all(1) for x in pair)
        assert torch.equal(kept, ~hidden)
        is_hidden.extend(hidden.tolist())
    error = (DROPOUT * (1 - DROPOUT) / len(is_hidden)) ** 0.5
    assert abs(np.mean(is_hidden) - DROPOUT) < 4 * error


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_shown_and_change_nothing_of_what_is_learned(tmp_path, monkeypatch, variant):
    run = AutoregressiveRun.of(PROFILE, variant, 0)
    tokenizer = Trained(SpectralTokenizer(run.codes.tokenizer.model).eval(), {}, tmp_path)
    monkeypatch.setattr(generators, "tokenizer_of_codes", lambda *_: tokenizer)
    shown = replace(PROFILE, engine=replace(ONE_PROCESS, images_every=3))
    optimizer, models = {"steps": 6, "log_every": 3, "checkpoint_every": 3}, []
    for name, profile in {"shown": shown, "plain": replace(PROFILE, engine=ONE_PROCESS)}.items():
        pictures = generators.samples_shown(profile, variant, *codes_of(variant))
        assert (pictures is None) == (name == "plain")
        states = tmp_path / name / "states"
        models.append(train(variant, states, profile.engine, optimizer, pictures=pictures)[0])
    files = sorted((tmp_path / "shown/images/test-states").iterdir())
    assert [file.name for file in files] == ["step-00000003.png", "step-00000006.png"]
    assert {Image.open(file).size for file in files} == {(generators.PICTURES * 64, 64)}
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))


# -- noise in what is read: as much as said, where said --------------------------------------------


def test_no_noise_is_the_very_input_and_some_texts_never_get_any():
    codes, tokens, rng = torch.zeros(2, 3, 4), TEXTS.encode(CAPTIONS), np.random.default_rng(0)
    assert training.corrupt_codes(codes, [9] * 3, 0.0, rng) is codes
    assert training.corrupt_texts(tokens, TEXTS, 0, rng) is tokens
    tokens = TEXTS.encode(CAPTIONS * 50)
    same = (training.corrupt_texts(tokens, TEXTS, 6, rng) == tokens).all(1)
    assert 0.4 < float(same.float().mean()) < 0.7  # half of them, and those that draw no token


def test_half_of_the_codes_at_most_is_a_quarter_on_average_and_sequences_differ():
    codes = torch.full((400, 5, 16), -1)
    noisy = training.corrupt_codes(codes, [7, 7, 3, 7, 2], 0.5, np.random.default_rng(0))
    for of_scale, size in zip(noisy.unbind(1), (7, 7, 3, 7, 2), strict=True):
        assert of_scale[of_scale != -1].unique().tolist() == list(range(size))
    share = (noisy != -1).flatten(1).float().mean(1)
    assert abs(share.mean() - 0.25) < 0.02 and share.max() < 0.7 and share.std() > 0.1


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 30), seed=st.integers(0, 999))
def test_every_text_stays_whole_between_random_tokens_and_ends_once(most, seed):
    tokens = TEXTS.encode(CAPTIONS)
    noisy = training.corrupt_texts(tokens, TEXTS, most, np.random.default_rng(seed))
    assert noisy.shape == tokens.shape and not (noisy == TEXTS.pad).all(1).any()
    for before, after in zip(tokens.tolist(), noisy.tolist(), strict=True):
        words = before[: before.index(TEXTS.end)]
        kept = after[: after.index(TEXTS.end)]
        assert set(after[len(kept) + 1 :]) <= {TEXTS.pad} and TEXTS.pad not in kept
        starts = [i for i in range(len(kept) - len(words) + 1) if kept[i : i + len(words)] == words]
        assert starts and any(i <= most and len(kept) - len(words) - i <= most // 2 for i in starts)
