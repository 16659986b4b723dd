"""Every sample once an epoch, whoever reads it and wherever a run resumes; prefetching."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sitlib.data import DataError, open_images, prefetch, training_views
from sitlib.data.loader import EpochOrder
from workbook.paths import ROOT

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


def items(order: EpochOrder, seed: int, first: int, last: int) -> list[int]:
    """Items of a run, as views and codes take them."""
    places = (divmod(item, len(order)) for item in range(first, last))
    return [int(order.permutation(seed, 0, epoch)[place]) for epoch, place in places]


class TestEpochOrder:
    @settings(max_examples=100, deadline=None)
    @given(SHARDS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
    def test_every_item_once(self, sizes, window, seed, epoch):
        permutation = EpochOrder(sizes, window).permutation(seed, epoch)
        assert sorted(permutation.tolist()) == list(range(sum(sizes)))
        # of another process
        assert (permutation == EpochOrder(sizes, window).permutation(seed, epoch)).all()

    @settings(max_examples=60, deadline=None)
    @given(
        sizes=SHARDS,
        window=st.integers(1, 40),
        ranks=st.integers(1, 4),
        per_rank=st.integers(1, 4),
        killed_after=st.integers(0, 12),
        other_ranks=st.sampled_from([1, 2, 4]),
    )
    def test_ranks_and_restarts(self, sizes, window, ranks, per_rank, killed_after, other_ranks):
        """Rank r of R takes part R * t + r; a run resumes with another number of ranks."""
        order, batch = EpochOrder(sizes, window), ranks * per_rank
        steps = -(-2 * len(order) // batch)

        def run(first_step, last_step, ranks):
            size = batch // ranks
            parts = range(first_step * ranks, last_step * ranks)
            return sum((items(order, 7, part * size, (part + 1) * size) for part in parts), [])

        killed_after = min(killed_after, steps)
        other_ranks = other_ranks if batch % other_ranks == 0 else 1
        seen = run(0, killed_after, ranks) + run(killed_after, steps, other_ranks)
        assert seen == items(order, 7, 0, steps * batch)
        for epoch in range(2):
            of_epoch = seen[epoch * len(order) : (epoch + 1) * len(order)]
            assert sorted(of_epoch) == list(range(len(order)))

    def test_large_sets_stay_near(self):
        order = EpochOrder([100] * 50, window=500)
        first, second = (order.permutation(0, epoch) for epoch in range(2))
        for begin in range(0, 5000, 500):
            window = first[begin : begin + 500]
            assert len(set(window // 100)) == 5  # shards that are read at a time
            assert len(set(window[:100] // 100)) == 5  # and mixed
        assert set(first[:500] // 100) != set(second[:500] // 100)


class TestPrefetch:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_batches_come_in_order_whoever_makes_them(self, tmp_path, workers):
        (tmp_path / "train").mkdir()
        for n in range(20):
            Image.new("RGB", (10, 10), (n, 0, 0)).save(tmp_path / f"train/{n}.png")
        images = open_images(tmp_path)

        def make(step):
            return (*training_views(images, step, 4, 8, seed=1), os.getpid())

        state, pids = torch.random.get_rng_state(), set()
        for step, (views, _, keys, pid) in prefetch(make, 3, 17, workers=workers):
            halves = [training_views(images, 2 * step + rank, 2, 8, seed=1) for rank in range(2)]
            assert torch.equal(views, torch.cat([half[0] for half in halves]))  # of two processes
            assert keys == halves[0][2] + halves[1][2]
            pids.add(pid)
        assert step == 16 and len(pids) == max(1, workers)
        assert (os.getpid() in pids) == (workers == 0)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert list(prefetch(make, 5, 5, workers=workers)) == []

    @pytest.mark.parametrize("workers", [0, 2])
    def test_exceptions_reach_the_consumer_at_their_step(self, workers):
        def make(step):
            if step == 4:
                raise DataError("the image of step 4 is gone")
            return step

        seen = []
        with pytest.raises(DataError, match="^the image of step 4 is gone$"):
            for step, _ in prefetch(make, 0, 10, workers=workers):
                seen.append(step)
        assert seen == [0, 1, 2, 3]

    def test_leaving_the_loop_stops_the_thread(self):
        before, started = threading.active_count(), []
        steps = prefetch(started.append, 0, 10**9, depth=2)
        for step, _ in steps:
            if step == 3:
                break
        steps.close()
        deadline = time.time() + 5
        while threading.active_count() > before and time.time() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before and len(started) < 12

    def test_more_tensors_on_their_way_than_files_may_be_open(self):
        """96 tensors a step, as the paper's text models have them, each a file of shared memory."""
        program = """if True:
            import resource, torch
            from sitlib.data import prefetch
            resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            make = lambda step: [torch.full((4,), step) for _ in range(96)]
            steps = list(prefetch(make, 0, 8, workers=2))
            print(all(sum(int(t[0]) for t in tensors) == 96 * step for step, tensors in steps))
        """
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "True\n", done.stderr[-2000:]

    @pytest.mark.parametrize("options", [{"workers": -1}, {"depth": 0}])
    def test_refusals(self, options):
        with pytest.raises(ValueError, match="depth is .*, at least 1; workers is .*, at least 0"):
            next(prefetch(abs, 0, 1, **options))


@pytest.mark.parametrize(
    ("source", "expected", "means", "deviations"),
    [
        (
            "data/landscapes",
            "df27cee32f31daa0",
            [0.488, 0.489, 0.2315, 0.5359],
            [0.2416, 0.1734, 0.1224, 0.1026],
        ),
        (
            "data/emoji",
            "682d9de3f8dd488f",
            [0.5163, 0.7536, 0.5814, 0.7077],
            [0.3888, 0.2886, 0.3177, 0.2612],
        ),
    ],
)
def test_views_of_the_sets_of_the_repository_never_change(source, expected, means, deviations):
    """Trained results depend on them. Keys and labels are exact, pixels as far as decoders agree."""
    images = open_images(ROOT / source, "train")
    digest = hashlib.sha256()
    for step in (0, 3, 40, 200):
        for subset, seed in ((images, 0), (images.labeled(), 1)):
            _, labels, keys = training_views(subset, step, 16, 8, seed)
            digest.update(f"{keys} {labels.tolist()}".encode())
    assert digest.hexdigest()[:16] == expected
    views, *_ = training_views(images, 200, 4, 32, 0, min_crop=0.4)
    assert views.mean((1, 2, 3)).tolist() == pytest.approx(means, abs=5e-4)
    assert views.std((1, 2, 3)).tolist() == pytest.approx(deviations, abs=5e-4)
