"""R-precision against a naive loop and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.metrics import bootstrap_interval, r_precision


def captions_of_names(seed, images=12, names=8, captions=24):
    """Similarities that are often tied, right captions and the captions' names."""
    generator = np.random.default_rng(seed)
    similarity = torch.from_numpy(generator.integers(6, size=(images, captions)) / 6)
    right = torch.from_numpy(generator.integers(captions, size=images))
    return similarity, right, [f"name{i % names}" for i in range(captions)]


class TestRPrecision:
    @given(seed=st.integers(0, 2**31), candidates=st.integers(2, 22))
    @settings(max_examples=20, deadline=None)
    def test_is_that_of_a_naive_loop(self, seed, candidates):
        similarity, right, names = captions_of_names(seed)
        expected = []
        for image, caption in enumerate(right.tolist()):
            others = [other for other in range(len(names)) if names[other] != names[caption]]
            drawn = np.random.default_rng([3, image]).choice(others, candidates - 1, replace=False)
            values = [float(similarity[image, other]) for other in (caption, *drawn)]
            places = [place for place, value in enumerate(values) if value == max(values)]
            expected.append(1 / len(places) if 0 in places else 0.0)
        found = r_precision(similarity, right, names, candidates=candidates, seed=3)
        assert found.dtype == torch.float64 and found.tolist() == expected

    def test_draws_fairly_and_without_repetition(self):
        """With b of n other captions more similar, none of c - 1 is among them with probability C(n - b, c - 1) / C(n, c - 1)."""
        similarity = (
            torch.arange(20.0).flip(0)[None].repeat(3000, 1)
        )  # three captions before the right one
        names = [
            *range(3),
            *["own"] * 4,
            *range(3, 16),
        ]  # two more of its own name are more similar, and do not count
        found = r_precision(similarity, torch.full((3000,), 5), names, candidates=6)
        assert found.mean().item() == pytest.approx(math.comb(13, 5) / math.comb(16, 5), abs=0.03)

    def test_of_random_similarities_is_chance_and_of_perfect_ones_is_one(self):
        similarity = torch.rand(2000, 50, generator=torch.Generator().manual_seed(0))
        right, names = torch.arange(2000) % 50, list(range(50))
        found = r_precision(similarity, right, names, candidates=10)
        low, high = bootstrap_interval(found, range(2000))
        assert low < 0.1 < high and high - low < 0.04
        similarity[torch.arange(2000), right] = 1.1
        assert r_precision(similarity, right, names, candidates=50).min() == 1
        assert r_precision(-similarity, right, names, candidates=50).max() == 0

    def test_equal_similarities_give_chance_exactly(self):
        found = r_precision(torch.zeros(5, 9), torch.arange(5), list("abcdefghi"), candidates=4)
        assert found.tolist() == [0.25] * 5

    def test_candidates_do_not_depend_on_the_similarities(self):
        """Two models are asked the same questions: where only one similarity differs, so does only that image."""
        similarity, right, names = captions_of_names(0, images=40)
        before = r_precision(similarity, right, names, candidates=5)
        similarity[7, right[7]] = 2
        after = r_precision(similarity, right, names, candidates=5)
        assert after[7] == 1 and torch.equal(
            after[torch.arange(40) != 7], before[torch.arange(40) != 7]
        )

    def test_is_seeded_and_leaves_the_random_states_alone(self):
        similarity, right, names = captions_of_names(1, images=40)
        state = np.random.get_state()[1].tolist(), torch.get_rng_state()
        first, again, other = (
            r_precision(similarity, right, names, candidates=5, seed=s) for s in (0, 0, 1)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert np.random.get_state()[1].tolist() == state[0]
        assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"candidates": 5}, "4 captions of other names than 'b'; there are 3"),
        ({"candidates": 1}, "at least 2"),
        ({"names": ["a", "b"]}, "C names"),
        ({"right": torch.tensor([0, 1])}, "M right captions"),
        ({"right": torch.tensor([4])}, "positions among 4 captions"),
        ({"right": torch.tensor([-1])}, "positions among 4 captions"),
        ({"similarity": torch.zeros(4)}, r"\[M, C\]"),
        (
            {"similarity": torch.zeros(0, 4), "right": torch.zeros(0, dtype=torch.int64)},
            "at least one image",
        ),
        ({"similarity": torch.tensor([[0.0, 1.0, float("nan"), 0.0]])}, "NaN"),
    ],
)
def test_bad_input(changes, message):
    options = {
        "similarity": torch.rand(1, 4),
        "right": torch.tensor([1]),
        "names": ["a", "b", "c", "d"],
        "candidates": 3,
    }
    with pytest.raises(ValueError, match=message):
        r_precision(**{**options, **changes})
