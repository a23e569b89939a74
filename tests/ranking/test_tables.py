"""Coded tables: a row comes back to half a step, and FBGEMM's kernel and plain gathers read the same bytes alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranking.tables import LEVELS, Precision, TableLayout, Tables, decode_rows, encode_rows, row_bytes

WIDTHS, ROWS, DIM = (1, 4, 1), (700, 40, 90), 16


def floats() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(3)
    return [(name, torch.randn(rows, DIM) * 0.3) for name, rows in zip(("id", "tags", "author"), ROWS, strict=True)]


def slots(seed: int, n: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(-1, rows, (n, w)) for rows, w in zip(ROWS, WIDTHS, strict=True)], axis=1)


def by_hand(tables: list[tuple[str, torch.Tensor]], slots_NW: np.ndarray) -> np.ndarray:
    """Mean of the present rows of each feature, in float64."""
    out, starts = [], np.cumsum((0, *WIDTHS))
    for (_, table), start, end in zip(tables, starts, starts[1:], strict=False):
        values = table.double().numpy()
        bags = [values[bag[bag >= 0]] for bag in slots_NW[:, start:end]]
        out.append(np.stack([bag.mean(axis=0) if len(bag) else np.zeros(DIM) for bag in bags]))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_comes_back_to_half_a_step(precision: Precision) -> None:
    rows_RD = torch.cat([torch.randn(500, DIM), torch.full((2, DIM), 0.25), torch.zeros(1, DIM)])
    back = decode_rows(encode_rows(rows_RD, precision), precision)
    spread_R1 = rows_RD.amax(1, keepdim=True) - rows_RD.amin(1, keepdim=True)
    half_step_R1 = 0.5 * spread_R1 / LEVELS[precision]
    # Scale and bias are float16: the bias is off by 2^-11 of itself, the top code by 2^-11 of the spread.
    allowed_R1 = half_step_R1 + 2.0**-10 * (spread_R1 + rows_RD.abs().amax(1, keepdim=True))
    assert ((back - rows_RD).abs() <= allowed_R1).all()
    np.testing.assert_array_equal(back[-3:], rows_RD[-3:])  # rows of one value are exact


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_kernel_and_plain_gathers_give_the_mean_of_the_present_rows(precision: Precision) -> None:
    tables = Tables.encode(floats(), precision)
    decoded = [(name, decode_rows(encode_rows(table, precision), precision)) for name, table in floats()]
    slots_NW = slots(1)
    slots_NW[:3] = -1
    expected = by_hand(decoded, slots_NW)
    given = torch.from_numpy(slots_NW)
    np.testing.assert_allclose(tables.pooled(given, WIDTHS), expected, atol=1e-6)
    np.testing.assert_allclose(tables.pooled_plainly(given, WIDTHS), expected, atol=1e-6)
    assert not expected[:3].any()


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 64), ("fp16", 32), ("int8", 20), ("int4", 12)])
def test_bytes_of_a_row(precision: Precision, expected: int) -> None:
    assert row_bytes(DIM, precision) == expected == encode_rows(torch.randn(2, DIM), precision).shape[1]


def test_a_width_that_does_not_fill_its_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding_dim 6 does not fit int4 rows: choose a multiple of 4"):
        row_bytes(6, "int4")


def test_a_block_of_another_size_is_refused() -> None:
    layout = TableLayout(("id",), (10,), DIM, "int8")
    with pytest.raises(ValueError, match="should be 200 bytes of int8 rows, found 199"):
        Tables(layout, torch.zeros(199, dtype=torch.uint8), torch.device("cpu"))


def test_features_of_one_slot_each_are_looked_up_alike() -> None:
    given = [(name, table) for name, table in floats() if name != "tags"]
    tables, slots_N2 = Tables.encode(given, "int8"), torch.from_numpy(slots(2)[:, [0, 5]])
    np.testing.assert_allclose(tables.pooled(slots_N2, (1, 1)), tables.pooled_plainly(slots_N2, (1, 1)), atol=1e-7)
    slots_N2 = slots_N2.clamp(min=0)  # nothing absent
    np.testing.assert_allclose(tables.pooled(slots_N2, (1, 1)), tables.pooled_plainly(slots_N2, (1, 1)), atol=1e-7)
