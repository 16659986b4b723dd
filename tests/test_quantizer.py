"""The codebook against brute force in float64, and the gradients that the paper's losses must give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.quantizer import Codebook


def nearest_by_distance(z, codes):
    """Index of the code with the smallest Euclidean distance after normalizing both."""
    z, codes = F.normalize(z.double(), dim=-1), F.normalize(codes.double(), dim=-1)
    return torch.cdist(z, codes).argmin(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 10_000))
def test_lookup_finds_the_nearest_code(num_codes, dim, seed):
    torch.manual_seed(seed)
    book, z = Codebook(num_codes, dim).double(), torch.randn(50, dim, dtype=torch.float64)
    out = book(z)
    assert torch.equal(out.codes, nearest_by_distance(z, book.weight.detach()))
    torch.testing.assert_close(out.vectors, F.normalize(book.weight, dim=-1)[out.codes])
    torch.testing.assert_close(out.vectors.norm(dim=-1), torch.ones(50, dtype=torch.float64))


def test_gradients_pass_straight_through_and_each_loss_moves_its_side_only():
    torch.manual_seed(0)
    book, z = Codebook(16, 4), torch.randn(8, 4, requires_grad=True)
    out = book(z)
    direction = torch.randn(8, 4)
    through = torch.autograd.grad((out.vectors * direction).sum(), z, retain_graph=True)[0]
    expected = torch.autograd.grad((F.normalize(z, dim=-1) * direction).sum(), z)[0]
    torch.testing.assert_close(through, expected)
    grads = torch.autograd.grad(
        out.commitment_loss.sum(), (z, book.weight), retain_graph=True, allow_unused=True
    )
    assert grads[0].abs().sum() > 0 and grads[1] is None
    grads = torch.autograd.grad(out.codebook_loss.sum(), (z, book.weight), allow_unused=True)
    assert grads[0] is None and grads[1].abs().sum() > 0


def test_kmeans_start_finds_separate_clusters():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(6, 8), dim=-1)
    z = (centres[:, None] + 0.02 * torch.randn(6, 200, 8)).flatten(0, 1)
    book = Codebook(24, 8)
    book.initialize(z)
    similarity = centres @ F.normalize(book.weight.detach(), dim=-1).T
    assert (similarity.max(dim=1).values > 0.99).all()
    assert (similarity.max(dim=0).values > 0.99).all()


def test_kmeans_lowers_the_quantization_error_of_a_random_codebook():
    torch.manual_seed(0)
    z, book = torch.randn(4000, 8), Codebook(64, 8)
    before = book(z).commitment_loss.mean()
    book.initialize(z)
    assert (
        book(z).commitment_loss.mean() < 0.85 * before
    )  # uniform on the sphere: the hardest case for any codebook


def test_kmeans_needs_enough_vectors():
    with pytest.raises(ValueError, match="at least 16 vectors"):
        Codebook(16, 4).initialize(torch.randn(10, 4))


def test_dead_codes_restart_on_outputs_and_live_ones_stay():
    torch.manual_seed(0)
    book, z = Codebook(32, 4), torch.randn(5, 4)
    used = book(z).codes.unique()
    before = book.weight.detach().clone()
    for step in range(3):
        moved = book.reset_dead_codes(z, book(z).codes, after=3).nonzero()[:, 0]
        assert len(moved) == (0 if step < 2 else 32 - len(used))
    assert not set(moved.tolist()) & set(used.tolist())
    assert torch.equal(book.weight[used], before[used])
    closest = (F.normalize(z, dim=-1) @ book.weight[moved].T).max(dim=0).values
    torch.testing.assert_close(closest, torch.ones(len(moved)))
    assert not book.reset_dead_codes(z, book(z).codes, after=0).any()


def test_rotation_turns_the_gradient_by_the_angle_between_output_and_code():
    torch.manual_seed(0)
    book = Codebook(8, 3, gradient="rotation").double()
    z = F.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1).requires_grad_()
    out = book(z)
    chosen = book.lookup(out.codes).detach()
    torch.testing.assert_close(out.vectors, chosen)
    for i in range(5):  # Rodrigues' rotation that takes z to its code, an independent formula
        axis = torch.linalg.cross(z[i].detach(), chosen[i])
        x, y, w = axis
        skew = torch.tensor([[0, -w, y], [w, 0, -x], [-y, x, 0]], dtype=torch.float64)
        rotation = (
            torch.eye(3, dtype=torch.float64) + skew + skew @ skew / (1 + z[i].detach() @ chosen[i])
        )
        direction = torch.randn(3, dtype=torch.float64)
        grad = torch.autograd.grad(out.vectors[i] @ direction, z, retain_graph=True)[0][i]
        tangent = (
            rotation.T @ direction
        )  # z is normalized first: only what is tangent to the sphere comes through
        torch.testing.assert_close(grad, tangent - (tangent @ z[i].detach()) * z[i].detach())


def test_moving_averages_follow_the_outputs_that_chose_a_code():
    torch.manual_seed(0)
    book = Codebook(6, 4, learning="ema", decay=0.9)
    assert not book.weight.requires_grad
    start, z = book.weight.detach().clone(), torch.randn(40, 4)
    unit = F.normalize(z, dim=-1)
    codes, sums = book(z).codes, start.clone()
    book.ema_update(z, codes)
    for code in range(6):  # one code after the other, in plain words
        mine = unit[codes == code]
        if len(mine):
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
    torch.testing.assert_close(book.weight, F.normalize(sums, dim=-1))
    before = book(z).commitment_loss.mean()
    for _ in range(30):
        book.ema_update(z, book(z).codes)
    assert book(z).commitment_loss.mean() < before
    unchosen = sorted(set(range(6)) - set(codes.tolist()))
    assert torch.isfinite(book.weight).all() and torch.equal(book.weight[unchosen], start[unchosen])


def test_a_code_that_restarts_has_no_history():
    torch.manual_seed(0)
    book, z = Codebook(32, 4, learning="ema"), torch.randn(5, 4)
    codes = book(z).codes
    book.ema_update(z, codes)
    moved = book.reset_dead_codes(z, codes, after=1)
    assert moved.any()
    torch.testing.assert_close(book.chosen_sum[moved], book.weight[moved])
