"""The synthetic router gives the published cache hit rates."""

from collections import OrderedDict

import numpy as np
import pytest

from moestream.checkpoint.routing import SyntheticRouter

WARM_UP = 200


def lru_hit_rate(ids, slots):
    cache = OrderedDict()
    hits = total = 0
    for row, experts in enumerate(ids.tolist()):
        for expert in experts:
            hit = expert in cache
            cache[expert] = None
            cache.move_to_end(expert)
            if len(cache) > slots:
                cache.popitem(last=False)
            if row >= WARM_UP:
                hits += hit
                total += 1
    return hits / total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_published_hit_rates(seed):
    ids = SyntheticRouter(512, 10, 1, seed).ids(0, 3000)
    assert lru_hit_rate(ids, 64) == pytest.approx(0.67, abs=0.03)
    assert lru_hit_rate(ids, 128) == pytest.approx(0.81, abs=0.03)


def test_uniform_is_the_worst_case():
    """Each of an LRU's slots holds a given expert with equal chance: the hit rate is its share of the experts."""
    ids = SyntheticRouter(512, 10, 1, uniform=True).ids(0, 3000)
    assert lru_hit_rate(ids, 128) == pytest.approx(0.25, abs=0.02)


def test_a_static_hot_list_is_of_little_use():
    ids = SyntheticRouter(512, 10, 1).ids(0, 8000)
    hot = np.argsort(-np.bincount(ids[:4000].ravel(), minlength=512))[:64]
    assert np.isin(ids[4000:], hot).mean() < 0.4


@pytest.mark.parametrize(("experts", "k"), [(512, 10), (128, 8), (8, 8), (5, 1)])
def test_rows_are_distinct_and_in_range(experts, k):
    router = SyntheticRouter(experts, k, 2)
    ids = np.concatenate([router.ids(1, rows) for rows in (1, 100, 0, 64)])
    assert ids.dtype == np.int32
    assert ids.shape == (165, k)
    assert ids.min() >= 0
    assert ids.max() < experts
    assert all(len(set(row)) == k for row in ids.tolist())


def test_trace_does_not_depend_on_how_it_is_asked_for():
    whole, pieces = SyntheticRouter(64, 4, 2, seed=3), SyntheticRouter(64, 4, 2, seed=3)
    whole.ids(0, 10)
    joined = np.concatenate([pieces.ids(1, n) for n in (1, 1, 62, 70, 16)])
    np.testing.assert_array_equal(whole.ids(1, 150), joined)
    assert (whole.ids(0, 150) != joined).any()


@pytest.mark.parametrize("recall", [0.59, 0.7, 0.89])
def test_predictions_come_true_at_the_recall_and_change_no_trace(recall):
    router = SyntheticRouter(64, 6, 2, seed=3, recall=recall)
    plain = SyntheticRouter(64, 6, 2, seed=3)
    right = []
    for rows in [1] * 300 + [70] * 20:
        for layer in range(2):
            guessed = router.predict(layer, rows)
            true = router.ids(layer, rows)
            assert np.array_equal(true, plain.ids(layer, rows))
            assert guessed.dtype == np.int32
            assert all(len(set(row)) == 6 for row in guessed.tolist())
            right.append((guessed[:, :, None] == true[:, None, :]).any(axis=2))
    by_rank = np.concatenate(right).mean(axis=0)
    assert by_rank.mean() == pytest.approx(recall, abs=0.02)
    assert by_rank[0] > 0.9
    assert by_rank[0] > by_rank[-1]
