"""The sampled softmax: exact when every video is drawn, unbiased in what it corrects, blind to accidental hits."""

from __future__ import annotations

import numpy as np
import torch

from candidate_gen.loss import full_softmax, sampled_softmax

NONE = torch.zeros(0, dtype=torch.int64)


def vectors(n: int, seed: int, dim: int = 6) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32))
    return torch.nn.functional.normalize(x, dim=-1)


def loss_of(users: torch.Tensor, videos: torch.Tensor, positive: list[int], uniform: torch.Tensor, **options) -> float:
    n = len(positive)
    settings = {
        "positive_N": torch.tensor(positive),
        "owner_N": torch.arange(n),
        "uniform_X": uniform,
        "prior_N": torch.zeros(n),
        "prior_X": torch.zeros(len(uniform)),
        "log_draws_N": torch.zeros(n),
        "log_draws_X": torch.zeros(len(uniform)),
        "temperature": 0.1,
    }
    return float(sampled_softmax(users, videos, **{**settings, **options})["loss"])


def test_all_videos_drawn_once_give_the_full_softmax() -> None:
    # One user whose positive is video 3, all 30 videos drawn uniformly: e^s over the sum of all 30.
    users, videos = vectors(1, 1), vectors(30, 2)
    logits = (users.numpy() @ videos.numpy().T).astype(np.float64)[0] / 0.1
    exact = np.log(np.exp(logits).sum()) - logits[3]
    assert abs(loss_of(users, videos, [3], torch.arange(30)) - exact) < 1e-5


def test_the_full_softmax_is_over_what_was_uploaded_less_what_the_owner_liked() -> None:
    # 6 videos by upload time 5 1 4 0 2 3. Rows 0 and 1 belong to one owner, who liked 1 and 4; row 2 to another.
    users, videos, catalogue = vectors(3, 1), vectors(6, 2), [5, 1, 4, 0, 2, 3]
    prior_NX = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 6)).astype(np.float32) * 0.1)
    positive, uploaded = [1, 4, 2], [4, 6, 5]
    at = [catalogue.index(p) for p in positive]
    prior_N = prior_NX[torch.arange(3), torch.tensor(at)]
    found = full_softmax(
        users,
        videos,
        positive_N=torch.tensor(positive),
        owner_N=torch.tensor([0, 0, 1]),
        catalogue_X=torch.tensor(catalogue),
        uploaded_N=torch.tensor(uploaded),
        prior_N=prior_N,
        prior_NX=prior_NX,
        temperature=0.1,
    )
    score = ((users @ videos[catalogue].T + prior_NX) / 0.1).double().numpy()
    against = [[5, 0], [5, 0, 2, 3], [5, 1, 4, 0]]  # row 0 asked when 5 1 4 0 were there, of which 1 and 4 are liked
    losses, hits = [], []
    for n, others in enumerate(against):
        columns = [catalogue.index(v) for v in others]
        total = np.exp(score[n, at[n]]) + np.exp(score[n, columns]).sum()
        losses.append(np.log(total) - score[n, at[n]])
        hits.append(score[n, at[n]] > score[n, columns].max())
    assert abs(float(found["loss"]) - np.mean(losses)) < 1e-5
    assert abs(float(found["hit_rate"]) - np.mean(hits)) < 1e-6


def test_a_prior_is_added_to_the_cosine_of_its_own_video() -> None:
    # One user, positive 2 and negatives 0 and 4: cosines of zero leave exp(prior / temperature) alone.
    users, videos = torch.zeros(1, 6), vectors(5, 2)
    prior_X, prior_N = torch.tensor([0.1, -0.2]), torch.tensor([0.3])
    found = loss_of(users, videos, [2], torch.tensor([0, 4]), prior_N=prior_N, prior_X=prior_X)
    assert abs(found - np.log((np.exp(3.0) + np.exp(1.0) + np.exp(-2.0)) / np.exp(3.0))) < 1e-5


def test_a_sampled_copy_of_the_positive_is_no_negative() -> None:
    users, videos = vectors(1, 1), vectors(5, 2)
    alone = loss_of(users, videos, [2], torch.tensor([0, 4]))
    assert loss_of(users, videos, [2], torch.tensor([0, 2, 4, 2])) == alone


def test_what_the_same_owner_liked_is_no_negative_but_another_owners_is() -> None:
    users, videos = vectors(2, 1), vectors(5, 2)
    same = loss_of(users, videos, [1, 3], NONE, owner_N=torch.tensor([0, 0]))
    other = loss_of(users, videos, [1, 3], NONE, owner_N=torch.tensor([0, 1]))
    assert same == 0.0  # nothing is left to compare with: -log(e^s / e^s)
    assert other > 0.0


def test_importance_weights_estimate_the_sum_over_all_videos_without_bias() -> None:
    # Videos are drawn m_v times in expectation; each draw stands for 1/m_v, so the mean of e^loss over many draws,
    # (e^s+ + sum of sampled e^s / m) / e^s+, must meet the full softmax's.
    users, videos, rng = vectors(1, 3), vectors(12, 4), np.random.default_rng(0)
    share = rng.dirichlet(np.ones(12))
    logits = (users @ videos.T)[0].numpy() / 0.5
    full = np.exp(logits).sum() / np.exp(logits[5])
    estimates = {True: [], False: []}
    for _ in range(1000):
        drawn = rng.choice(12, 40, p=share)
        log_draws = torch.from_numpy(np.log(40 * share[drawn]).astype(np.float32))
        for correct in (True, False):
            loss = loss_of(
                users, videos, [5], torch.from_numpy(drawn), log_draws_X=log_draws, temperature=0.5, correct=correct
            )
            estimates[correct].append(np.exp(loss))
    assert abs(np.mean(estimates[True]) / full - 1) < 0.03
    assert abs(np.mean(estimates[False]) / full - 1) > 0.5


def test_corrected_scores_learn_how_popular_a_video_is_and_uncorrected_ones_unlearn_it() -> None:
    # Positives are video 0 in 2 of 10 cases, videos 1 .. 40 in 2 of 100 each. The full softmax is solved by
    # score_0 - score_1 = log(0.2 / 0.02) = 2.3; in-batch negatives alone punish video 0 for being everywhere.
    share, gaps = np.array([0.2] + [0.02] * 40), {}
    for correct in (True, False):
        scores = torch.nn.Parameter(torch.zeros(41, 1))
        optimizer, rng = torch.optim.Adam([scores], 0.05), np.random.default_rng(0)
        for _ in range(150):
            positive = rng.choice(41, 64, p=share)
            optimizer.zero_grad()
            sampled_softmax(
                torch.ones(64, 1),
                scores,
                positive_N=torch.from_numpy(positive),
                owner_N=torch.arange(64),
                uniform_X=NONE,
                prior_N=torch.zeros(64),
                prior_X=torch.zeros(0),
                log_draws_N=torch.from_numpy(np.log(64 * share[positive]).astype(np.float32)),
                log_draws_X=torch.zeros(0),
                temperature=1.0,
                correct=correct,
            )["loss"].backward()
            optimizer.step()
        gaps[correct] = float((scores[0] - scores[1:].mean()).detach())
    assert abs(gaps[True] - np.log(10)) < 0.4
    assert gaps[False] < gaps[True] - 1.0
