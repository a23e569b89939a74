"""Dropout by row: the share that is dropped, and masks that do not depend on a row's place or company."""

from __future__ import annotations

import pytest
import torch

from ranking.dropout import RowDropout, keep_mask

P, ROWS, WIDTH = 0.1, 4000, 64


def mask(key_N: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return keep_mask(key_N, WIDTH, P)


def test_a_row_keeps_its_mask_in_any_order_and_company():
    keys = torch.randint(0, 2**40, (ROWS,))
    whole, order = mask(keys), torch.randperm(ROWS)[:500]
    assert torch.equal(mask(keys[order]), whole[order])


def test_the_share_dropped_is_p_in_all_rows_columns_and_steps():
    dropped = ~torch.stack([mask(torch.arange(ROWS), seed) for seed in range(20)])
    for dims, count in (((0, 1, 2), 20 * ROWS * WIDTH), ((0, 1), 20 * ROWS), ((0, 2), 20 * WIDTH)):
        within = 5 * (P * (1 - P) / count) ** 0.5
        assert (dropped.double().mean(dims) - P).abs().max() < within, dims


def test_neighbouring_rows_columns_and_steps_are_independent():
    """Of two independent masks both drop with probability p^2; 5 standard errors of 512,000 draws or more."""
    dropped = ~torch.stack([mask(torch.arange(ROWS), seed) for seed in range(2)])
    pairs = {
        "rows": (dropped[:, 1:], dropped[:, :-1]),
        "columns": (dropped[:, :, 1:], dropped[:, :, :-1]),
        "steps": (dropped[0], dropped[1]),
    }
    for name, (left, right) in pairs.items():
        both = (left & right).double()
        assert abs(both.mean() - P * P) < 5 * (P * P / both.numel()) ** 0.5, name


def test_expectation_is_kept_and_evaluation_drops_nothing():
    torch.manual_seed(0)
    dropout, x = RowDropout(P), torch.ones(ROWS, WIDTH)
    y = dropout(x, torch.arange(ROWS))
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - P)))}
    assert abs(y.mean() - 1) < 5 * (P / (1 - P) / y.numel()) ** 0.5
    assert torch.equal(dropout.eval()(x, None), x)
    with pytest.raises(ValueError, match="needs a key"):
        dropout.train()(x, None)
