"""A bitmap for every limit that videos have, so that what a kind of viewer may be shown is a few ANDs.

V video rows, B bitmaps: one a region (with what is open everywhere), one a language, one for each distinct minimum age
and safety level but the highest. They are V / 8 bytes each, made at publishing and memory-mapped; a request touches
none of them while its kind of viewer is kept (see `candidate_gen.allowed`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from candidate_gen.bits import count_set
from features.eligibility import Attributes, Viewer, folded

LIMITS = ("region", "language", "age", "safety")
"""In the order in which a video that breaks several is counted."""
_FILE = "viewer_bits.npy"
_CHUNK = 1 << 22
"""Rows packed together; a multiple of 8."""

Kind = tuple[tuple[int, ...], ...]
"""Viewers with the same limits: of each of LIMITS the bitmaps of which one must be set; none if nobody is barred."""


@dataclass(frozen=True, slots=True)
class ViewerBitmaps:
    """The bitmaps of a catalogue."""

    attributes: Attributes
    bits_BV: np.ndarray
    """(B, ceil(V / 8)) uint8."""

    @classmethod
    def write(cls, folder: Path, attributes: Attributes) -> None:
        """Make `viewer_bits.npy` in an existing folder, some rows at a time."""
        tables = [(column, table) for column, of_column in _tables(attributes) for table in of_column]
        n_rows = len(attributes)
        shape = (len(tables), -(-n_rows // 8))
        if 0 in shape:  # nothing can be mapped of an empty file
            np.save(folder / _FILE, np.zeros(shape, np.uint8), allow_pickle=False)
            return
        bits_BV = np.lib.format.open_memmap(folder / _FILE, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, n_rows, _CHUNK):
            stop = min(start + _CHUNK, n_rows)
            for b, (column, table) in enumerate(tables):
                passing = table[getattr(attributes, column)[start:stop]]
                bits_BV[b, start // 8 : -(-stop // 8)] = np.packbits(passing, bitorder="little")
        bits_BV.flush()

    @classmethod
    def load(cls, folder: Path, attributes: Attributes) -> ViewerBitmaps:
        """Memory-map what `write` made; raises ValueError when it was made of other videos."""
        bits_BV = np.load(folder / _FILE, mmap_mode="r", allow_pickle=False)
        expected = (sum(len(of_column) for _, of_column in _tables(attributes)), -(-len(attributes) // 8))
        if bits_BV.shape != expected:
            raise ValueError(f"{folder / _FILE}: bitmaps of shape {bits_BV.shape}, expected {expected}; publish again")
        return cls(attributes, np.asarray(bits_BV))

    def kind_of(self, viewer: Viewer) -> Kind:
        """The limits that hold for the viewer."""
        a = self.attributes
        first_language = 1 + len(a.region_names) if a.region_names else 0
        first_age = first_language + (1 + len(a.language_names) if a.language_names else 0)
        first_safety = first_age + len(a.min_ages) - 1
        region, fits = folded(viewer.region or ""), a.languages_for(viewer)
        place = 1 + a.region_names.index(region) if region in a.region_names else 0
        return (
            (place,) if a.region_names else (),
            () if fits.all() else tuple((first_language + np.flatnonzero(fits)).tolist()),
            _step(a.min_ages, viewer.age_years or 0, first_age),
            _step(a.safety_levels, viewer.max_safety_level or 0, first_safety),
        )

    def narrow(self, bits: np.ndarray, kind: Kind) -> tuple[np.ndarray, int, np.ndarray]:
        """The rows of a bitmap that such viewers may be shown, their count, and how many each limit took (4,).

        Without limits it is the same bitmap; otherwise each limit costs a pass over V / 8 bytes.
        """
        left, taken = count_set(bits), []
        for choice in kind:
            before = left
            if choice:
                bits = bits & reduce(np.bitwise_or, (self.bits_BV[b] for b in choice))
                left = count_set(bits)
            taken.append(before - left)
        return bits, left, np.array(taken)


def first_broken(limits: Attributes, viewer: Viewer, rows_N: np.ndarray) -> np.ndarray:
    """(N,) int64: 0 where the viewer may be shown the row, else 1 + the place in LIMITS of the first to forbid it."""
    code_N, unfit = np.zeros(len(rows_N), np.int64), limits.unfit(viewer, rows_N)
    for code, name in reversed(list(enumerate(LIMITS, start=1))):
        code_N[unfit[name]] = code
    return code_N


def _step(thresholds: tuple[int, ...], reached: int, first: int) -> tuple[int, ...]:
    """The bitmap of the highest threshold reached; none where that is the last, which bars nobody."""
    place = bisect_right(thresholds, reached) - 1
    return () if place == len(thresholds) - 1 else (first + place,)


def _tables(a: Attributes) -> list[tuple[str, list[np.ndarray]]]:
    """For each of LIMITS a column of the attributes, and for each of its bitmaps which values of the column are set."""
    regions = [Viewer(), *(Viewer(region=name) for name in a.region_names)] if a.region_names else []
    languages = np.eye(1 + len(a.language_names), dtype=bool) if a.language_names else []
    value = np.arange(256)
    return [
        ("region_set", [a.sets_open_to(viewer) for viewer in regions]),
        ("language", list(languages)),
        ("min_age", [value <= age for age in a.min_ages[:-1]]),
        ("safety_level", [value <= level for level in a.safety_levels[:-1]]),
    ]
