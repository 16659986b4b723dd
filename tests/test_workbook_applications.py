"""Ways of enlarging, choices by previews, images in the making."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import PLAIN, model_of, photographs, tokenizer_of

from workbook.applications import choice_scores, enlarge
from workbook.evaluate import generation
from workbook.evaluate.generation import GREY, generation_frames


def test_enlarging_is_what_pillow_does():
    small = F.avg_pool2d(photographs(6), 8)
    pixels = (64 + small * 128).round()  # Pillow clips bytes between its two passes
    for image, result in zip(pixels.byte(), enlarge(pixels / 255, 64, "lanczos"), strict=True):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.array(image.resize((64, 64), Image.Resampling.LANCZOS))
        expected = torch.from_numpy(expected).permute(2, 0, 1) / 255
        torch.testing.assert_close(result, expected, atol=1.5 / 255, rtol=0)


def test_choosing_by_previews():
    finished = np.array([[0.0, 1.0, 2.0], [3.0, 5.0, 4.0]])
    right, wrong = choice_scores(finished, finished), choice_scores(-finished, finished)
    assert right["rank_correlation"] == pytest.approx(1) and right["gain"] == pytest.approx(1)
    assert right["chosen_by_preview"] == right["best"] == 3.5 and right["at_random"] == 2.5
    assert wrong["rank_correlation"] == pytest.approx(-1) and wrong["chosen_by_preview"] == 1.5


def test_films_of_scales_are_whole_and_those_of_rows_grey_where_nothing_is_sampled(monkeypatch):
    def film(variant, labels):
        models = model_of("class", variant), tokenizer_of(variant)
        monkeypatch.setattr(generation, "load_models", lambda *_: models)
        profile = SimpleNamespace(sampler=lambda variant: PLAIN)
        return generation_frames(profile, f"ar_{variant}", 0, torch.tensor(labels), 4)

    frames = film("sit5_sc", [0, 2])
    assert len(frames) == 5 and all(frame.shape == (2, 3, 64, 64) for frame in frames)
    assert len(frames[0][0].flatten(1).unique(dim=1).T) <= 16  # 4 x 4 px, enlarged
    assert not any((frame == GREY).all(dim=1).any() for frame in frames)
    frames = film("vit_vqgan", [1])
    assert len(frames) == 4
    for index, frame in enumerate(frames, 1):
        assert (frame[:, :, 16 * index :] == GREY).all()
        assert not (frame[:, :, : 16 * index] == GREY).all()
    with pytest.raises(ValueError, match="cannot be decoded alone"):
        film("sit4", [1])
