"""Blending: each video once, quotas kept, nothing wasted while there is room, a reason for every item."""

from __future__ import annotations

import numpy as np
import pytest

from candidate_gen.blend import BlendConfig, Quota, allot, blend
from candidate_gen.sources import Retrieved

AUTHOR = np.arange(1000) % 7
QUOTAS = (
    Quota(source="followed", share=0.25, at_most=30),
    Quota(source="ann", share=0.5),
    Quota(source="fresh", share=0.25, at_least=10),
)


def retrieved(*rows: int) -> Retrieved:
    return Retrieved(np.array(rows, np.int64), np.linspace(1, 0, len(rows), dtype=np.float32))


def blended(k: int, **sources: Retrieved):
    return blend(sources, author_id=AUTHOR, followed_authors=np.array([2, 5]), config=BlendConfig(k=k, quotas=QUOTAS))


def test_a_video_that_several_sources_found_counts_for_the_first_and_names_the_others() -> None:
    pool = blended(10, fresh=retrieved(4, 9, 1), ann=retrieved(3, 4), followed=retrieved(9))
    assert sorted(pool.rows_K) == [1, 3, 4, 9]
    reasons = {int(row): pool.reason(i) for i, row in enumerate(pool.rows_K)}
    assert reasons == {9: "followed, also fresh", 3: "ann", 4: "ann, also fresh", 1: "fresh"}
    assert dict(zip(pool.rows_K, pool.connected_K, strict=True)) == {1: False, 3: False, 4: False, 9: True}
    assert pool.score_K[list(pool.rows_K).index(4)] == 0.0  # the score of the source it counts for


def test_a_video_deep_in_one_list_does_not_lose_its_place_at_the_top_of_another() -> None:
    """followed 25, ann 50, fresh 25 of 100: ann holds fresh's best at its place 200, far beyond its quota."""
    deep = [*range(100, 300), 7, 8, 9]
    pool = blended(
        100, followed=retrieved(*range(30, 60)), ann=retrieved(*deep), fresh=retrieved(7, 8, *range(400, 500))
    )
    reasons = {int(row): pool.reason(i) for i, row in enumerate(pool.rows_K)}
    assert (reasons[7], reasons[8]) == ("fresh, also ann", "fresh, also ann")
    assert 9 not in reasons
    assert np.bincount(pool.source_K).tolist() == [25, 50, 25]


@pytest.mark.parametrize("seed", range(5))
def test_pools_of_random_lists_are_those_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        k = int(rng.integers(0, 120))
        lists = {q.source: rng.permutation(150)[: rng.integers(0, 120)].tolist() for q in QUOTAS}
        pool = blended(k, **{name: retrieved(*rows) for name, rows in lists.items()})
        taken: dict[int, str] = {}
        limits = [min(len(lists[q.source]), q.at_most or 10**9) for q in QUOTAS]
        for target in (allot(np.array([len(rows) for rows in lists.values()]), QUOTAS, k), limits):
            for quota, most in zip(QUOTAS, target, strict=True):
                for row in lists[quota.source]:
                    if row not in taken and list(taken.values()).count(quota.source) < most and len(taken) < k:
                        taken[row] = quota.source
        assert {int(row): pool.sources[s] for row, s in zip(pool.rows_K, pool.source_K, strict=True)} == taken
        for s, name in enumerate(pool.sources):
            of_source = pool.rows_K[pool.source_K == s].tolist()
            assert of_source == [row for row in lists[name] if row in of_source]
            assert np.array_equal(pool.found_by_KS[:, s], np.isin(pool.rows_K, lists[name]))


def test_shares_hold_when_every_source_has_plenty() -> None:
    pool = blended(
        100, followed=retrieved(*range(200)), ann=retrieved(*range(200, 400)), fresh=retrieved(*range(400, 600))
    )
    assert np.bincount(pool.source_K).tolist() == [25, 50, 25]
    assert set(pool.rows_K) == {*range(25), *range(200, 250), *range(400, 425)}  # the best of each


def test_what_one_source_lacks_the_others_fill_up_to_their_limits() -> None:
    pool = blended(100, followed=retrieved(*range(200)), ann=retrieved(500, 501), fresh=retrieved(*range(600, 620)))
    assert np.bincount(pool.source_K).tolist() == [30, 2, 20]  # followed stops at 30, the rest is all there is
    assert len(blended(100)) == 0
    assert len(blended(0, ann=retrieved(1))) == 0


def test_guarantees_come_before_shares() -> None:
    available = np.array([100, 100, 100])
    assert allot(available, QUOTAS, 12).tolist() == [2, 0, 10]  # 10 guaranteed, then 25% of 12 would be 3: 2 are left
    assert allot(available, QUOTAS, 6).sum() == 6
    for k in range(0, 200, 7):
        take = allot(available, QUOTAS, k)
        assert take.sum() == min(k, 230)
        assert take[0] <= 30


def test_any_cut_of_the_pool_still_holds_every_source() -> None:
    pool = blended(
        40, followed=retrieved(*range(20)), ann=retrieved(*range(100, 150)), fresh=retrieved(*range(200, 250))
    )
    assert pool.source_K[:3].tolist() == [0, 1, 2]
    assert set(pool.source_K[:6]) == {0, 1, 2}


def test_mistakes_in_the_quotas_are_named() -> None:
    with pytest.raises(ValueError, match="no quota for source"):
        blended(5, trending=retrieved(1))
    with pytest.raises(ValueError, match=r"share 1\.5"):
        Quota(source="ann", share=1.5)
    with pytest.raises(ValueError, match="at_least"):
        Quota(source="ann", share=0.5, at_least=5, at_most=2)
    with pytest.raises(ValueError, match="names a source twice"):
        BlendConfig(quotas=(Quota(source="ann", share=0.5), Quota(source="ann", share=0.5)))
