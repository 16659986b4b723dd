"""The dual encoder: its loss against a naive loop, what it learns, its file and its data."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sitlib.data import CaptionedImages, open_images, training_views
from sitlib.files import load_model, save_model
from sitlib.metrics import lite0_features
from sitlib.model.dual_encoder import DualEncoder, StoredDualEncoderConfig, contrastive_loss
from sitlib.model.text import TextTokenizer
from sitlib.train.config import CaptionsConfig, DataConfig
from sitlib.train.dual_encoder import train_dual_encoder
from workbook.evaluate import text
from workbook.evaluate.text import view_features
from workbook.profile import load_profile
from workbook.runs import DualEncoderRun

SMOKE = load_profile("smoke").text.dual_encoder
SETTINGS = {"steps": 40, "batch_size": 8, "warmup_steps": 4, "log_every": 20}
SETTINGS |= {"checkpoint_every": 20, "learning_rate": 3e-3, "final_learning_rate": 0.0}
OPTIMIZER = replace(SMOKE.optimizer, **SETTINGS)
SIZES = {"layers": 1, "width": 32, "heads": 2, "dim": 16, "vocab_size": 300, "max_tokens": 12}
SHAPE = replace(SMOKE, **SIZES, image_size=64, degraded_views=1, optimizer=OPTIMIZER)
PLAIN = replace(SHAPE, degraded_views=0)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220)}
TEXTS = [f"a {colour} square" for colour in COLOURS]
WORDS = TextTokenizer.train([*TEXTS, "a square of one colour only"], 300, SHAPE.max_tokens)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DualEncoder(StoredDualEncoderConfig(SHAPE.shape, WORDS.to_json(), 20)).eval()


def naive_loss(logits, names):
    """Mean of -log of the right one's share, among what is right or of another name."""
    total, count = 0.0, len(names)
    for table in (logits, logits.T):
        for row in range(count):
            allowed = [c for c in range(count) if c == row or names[c] != names[row]]
            shares = sum(math.exp(table[row, c]) for c in allowed)
            total -= math.log(math.exp(table[row, row]) / shares)
    return total / (2 * count)


@pytest.mark.parametrize("names", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [3, 3, 3, 3, 0]])
def test_the_loss_and_its_gradient_are_those_of_a_naive_loop(names):
    logits = np.random.default_rng(0).normal(scale=2, size=(5, 5))
    expected = np.empty((5, 5))
    for place in np.ndindex(5, 5):
        step = np.zeros((5, 5))
        step[place] = 1e-5
        rise = naive_loss(logits + step, names) - naive_loss(logits - step, names)
        expected[place] = rise / 2e-5
    found = torch.from_numpy(logits).requires_grad_()
    loss = contrastive_loss(found, torch.tensor(names))
    loss.backward()
    assert loss.item() == pytest.approx(naive_loss(logits, names), rel=1e-12)
    np.testing.assert_allclose(found.grad, expected, atol=1e-9)


@torch.no_grad()
def test_similarities_are_cosines_which_survive_the_file(model, tmp_path):
    features, tokens = torch.randn(5, 20), WORDS.encode(TEXTS)
    images, words = model.embed_images(features), model.embed_texts(tokens)
    assert images.shape == (5, SHAPE.dim) and words.shape == (3, SHAPE.dim)
    expected = torch.nn.functional.cosine_similarity(images[:, None], words[None], dim=-1)
    torch.testing.assert_close(model.similarity(features, tokens), expected)
    torch.testing.assert_close(model(features, tokens), expected / 0.07)
    model.log_scale.fill_(math.log(500))
    model.limit_scale()
    torch.testing.assert_close(model(features, tokens), expected * 100)
    save_model(tmp_path / "model.safetensors", model, run="a run")
    again = load_model(tmp_path / "model.safetensors", DualEncoder)
    assert again.config == model.config and not again.training
    found = again(features, again.text_tokenizer.encode(TEXTS))
    assert torch.equal(found, model(features, tokens))


# -- training on captioned images ------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five noisy squares of each of three colours, with two captions each."""
    folder, generator = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "train" / name).mkdir(parents=True)
        for index in range(5):
            noise = generator.normal(scale=20, size=(24, 24, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "train" / name / f"{index}.png")
    images = open_images(folder, "train")
    names = [images.class_names[label] for label in images.labels]
    texts = [[f"a {name} square", f"all {name}"] for name in names]
    return CaptionedImages(images, texts, names, names)


@pytest.fixture
def run():
    images = DataConfig("none", size=16, min_crop=0.5, flip=True, normalization_views=1)
    return DualEncoderRun(images, CaptionsConfig("names", per_image=2, seed=0), SHAPE, [], seed=0)


def test_clean_degraded_and_reconstructed_views_come_with_the_position_of_their_image(
    data, run, monkeypatch
):
    class Inverting:
        def reconstruct(self, images):
            return 1 - images

    features, positions = view_features(run, data.images, [Inverting()])
    views, labels, keys = training_views(data.images, 0, 15, 16, 0, kind="wide", flip=False)
    assert features.shape == (45, 1280) and sorted(positions[:15]) == list(range(15))
    assert np.array_equal(positions, np.tile(positions[:15], 3))
    assert [data.images.keys[position] for position in positions[:15].tolist()] == keys
    assert torch.equal(data.images.labels[positions[:15]], labels)
    clean, inverted = (lite0_features(x, size=SHAPE.image_size) for x in (views, 1 - views))
    torch.testing.assert_close(features[:15], clean)
    torch.testing.assert_close(features[30:], inverted)
    assert not torch.allclose(features[15:30], clean)
    monkeypatch.setattr(text, "VIEWS", 4)  # of 15 images: the last views are of a second epoch
    _, positions = view_features(replace(run, model=PLAIN), data.images, [])
    assert sorted(positions) == list(range(15))


def test_it_learns_the_captions_and_gives_equal_weights_again(data, run, tmp_path):
    texts = (*view_features(run, data.images, []), data.captions, data.names)
    model, rows = train_dual_encoder(run.model, *texts, seed=0, folder=tmp_path / "first")
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["accuracy"] > 0.8

    model.eval()
    features, positions = view_features(replace(run, seed=1, model=PLAIN), data.images, [])
    with torch.no_grad():
        similarity = model.similarity(features, model.text_tokenizer.encode(TEXTS))
    found = [list(COLOURS)[place] for place in similarity.argmax(dim=1)]
    right = [name == data.names[p] for name, p in zip(found, positions, strict=True)]
    assert np.mean(right) > 0.9

    again, _ = train_dual_encoder(run.model, *texts, seed=0, folder=tmp_path / "second")
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
