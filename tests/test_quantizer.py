"""The codebook against brute force in float64, the gradients of the paper's losses, its upkeep."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.quantizer import Codebook
from sitlib.train.codebooks import reset_dead_codes, start_codes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 10_000))
def test_lookup_finds_the_nearest_code(num_codes, dim, seed):
    torch.manual_seed(seed)
    book, z = Codebook(num_codes, dim).double(), torch.randn(50, dim, dtype=torch.float64)
    out, unit = book(z), F.normalize(book.weight.detach(), dim=-1)
    assert torch.equal(out.codes, torch.cdist(F.normalize(z, dim=-1), unit).argmin(-1))
    torch.testing.assert_close(out.vectors, unit[out.codes])


def test_gradients_pass_straight_through_and_each_loss_moves_its_side_only():
    torch.manual_seed(0)
    book, z = Codebook(16, 4), torch.randn(8, 4, requires_grad=True)
    out, direction = book(z), torch.randn(8, 4)
    through = torch.autograd.grad((out.vectors * direction).sum(), z, retain_graph=True)[0]
    expected = torch.autograd.grad((F.normalize(z, dim=-1) * direction).sum(), z)[0]
    torch.testing.assert_close(through, expected)
    both, options = (z, book.weight), {"retain_graph": True, "allow_unused": True}
    of_z, of_book = torch.autograd.grad(out.commitment_loss.sum(), both, **options)
    assert of_z.any() and of_book is None
    of_z, of_book = torch.autograd.grad(out.codebook_loss.sum(), both, **options)
    assert of_z is None and of_book.any()


# -- in training -----------------------------------------------------------------------------------


def test_kmeans_finds_clusters_and_lowers_the_error_of_a_random_codebook():
    torch.manual_seed(0)
    centroids = F.normalize(torch.randn(6, 8), dim=-1)
    book = Codebook(24, 8)
    start_codes(book, (centroids[:, None] + 0.02 * torch.randn(6, 200, 8)).flatten(0, 1))
    similarity = centroids @ F.normalize(book.weight.detach(), dim=-1).T
    assert (similarity.amax(1) > 0.99).all() and (similarity.amax(0) > 0.99).all()
    z, book = torch.randn(4000, 8), Codebook(64, 8)  # uniform on the sphere: the hardest case
    before = book(z).commitment_loss.mean()
    start_codes(book, z)
    assert book(z).commitment_loss.mean() < 0.85 * before
    with pytest.raises(ValueError, match="at least 16 vectors"):
        start_codes(Codebook(16, 4), torch.randn(10, 4))


def test_dead_codes_restart_on_latents_without_a_history_and_live_ones_stay():
    torch.manual_seed(0)
    book, z = Codebook(32, 4), torch.randn(5, 4)
    codes, before = book(z).codes, book.weight.detach().clone()
    used = codes.unique()
    assert not any(reset_dead_codes(book, z, codes, after=3).any() for _ in range(2))
    moved = reset_dead_codes(book, z, codes, after=3).nonzero()[:, 0]
    assert sorted([*moved.tolist(), *used.tolist()]) == list(range(32))
    assert torch.equal(book.weight[used], before[used])
    closest = (F.normalize(z, dim=-1) @ book.weight[moved].T).amax(0)
    torch.testing.assert_close(closest, torch.ones(len(moved)))
    book.steps_unused.fill_(9)
    assert not reset_dead_codes(book, z, codes, after=0).any()
    book.codes_are_fixed = True
    assert not reset_dead_codes(book, z, codes, after=3).any()
