"""Who may be shown a video, and when: the plain reference that bitmaps, tests and new uploads are held to.

V video rows, N rows asked about, W rows with an availability window. Region codes and language tags are compared
without regard to case, `_` as `-`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.schema import LIMITS

T = TypeVar("T", bound=Hashable)
NO_BEGIN_MS, NO_END_MS = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_SEPARATOR = "\x1f"
_PIECE = 1 << 20
"""Videos read together."""
_NAMES = ("region_names", "language_names", "min_ages", "safety_levels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Viewer:
    """Who is watching. What is not known is read as the limit that shows the least, but for the language: age, safety
    and region protect somebody (a child, a licence), a language only suits."""

    region: str | None = None
    """None, or a region that no video names: only videos without regions."""
    languages: tuple[str, ...] = ()
    """BCP 47 tags; `pt` also stands for `pt-BR`, not the reverse (RFC 4647, basic filtering). Empty: any language."""
    age_years: int | None = None
    """None: 0."""
    max_safety_level: int | None = None
    """Of the videos shown. None: 0."""

    def or_else(self, other: Viewer) -> Viewer:
        """What is not known, from the other."""
        return replace(
            self,
            region=self.region or other.region,
            languages=self.languages or other.languages,
            age_years=other.age_years if self.age_years is None else self.age_years,
            max_safety_level=other.max_safety_level if self.max_safety_level is None else self.max_safety_level,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """The limits of V videos by row: 4 bytes a video, one more each from 256 languages and from 256 sets of regions on,
    and 24 more for a video with an availability window."""

    region_set: np.ndarray
    """(V,) unsigned: 0 everywhere, else a set of regions."""
    language: np.ndarray
    """(V,) unsigned: 0 none, else 1 + index into `language_names`."""
    min_age: np.ndarray
    """(V,) uint8, years."""
    safety_level: np.ndarray
    """(V,) uint8."""
    window_rows: np.ndarray
    """(W,) int64, ascending: rows that are not always available."""
    window_from_ms: np.ndarray
    window_until_ms: np.ndarray
    """(W,) int64: available from the first instant up to, and not at, the second."""
    member_set: np.ndarray
    member_region: np.ndarray
    """The sets, as pairs: region `region_names[member_region[i]]` belongs to set `member_set[i]`."""
    region_names: tuple[str, ...]
    language_names: tuple[str, ...]
    min_ages: tuple[int, ...]
    """The distinct ones, ascending, from 0."""
    safety_levels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.region_set)

    @classmethod
    def of(cls, videos: pa.Table, first_row: int = 0) -> Attributes:
        """From canonical videos in the order of their rows; rows before `first_row` have no limits (the bundle's row 0,
        the unknown video)."""
        return cls.unlimited(first_row).append(videos)

    @classmethod
    def unlimited(cls, n_rows: int) -> Attributes:
        """Of videos that everybody may be shown at any time."""
        codes = {name: np.zeros(n_rows, np.uint8) for name in ("region_set", "language", "min_age", "safety_level")}
        lists = ("window_rows", "window_from_ms", "window_until_ms", "member_set", "member_region")
        names = {"region_names": (), "language_names": (), "min_ages": (0,), "safety_levels": (0,)}
        return cls(**codes, **{name: np.zeros(0, np.int64) for name in lists}, **names)

    def append(self, videos: pa.Table) -> Attributes:
        """These rows, then those of canonical videos that have passed `features.validate`; columns that are not there
        limit nothing. Copies this object's arrays: made for few rows, such as uploads since a bundle was made."""
        given = {
            field.name: videos[field.name]
            if field.name in videos.column_names
            else pa.chunked_array([pa.nulls(len(videos), field.type)])
            for field in LIMITS
        }
        set_codes, language_codes = self._sets(), {"": 0} | {tag: 1 + i for i, tag in enumerate(self.language_names)}
        region_set = _coded(given["regions"], _regions, set_codes)
        language = _coded(given["language"], folded, language_codes)
        names = dict.fromkeys([*self.region_names, *(name for regions in set_codes for name in sorted(regions))])
        place = {name: i for i, name in enumerate(names)}
        pairs = [(code, place[name]) for regions, code in set_codes.items() for name in sorted(regions)]
        member_set, member_region = np.array(pairs, np.int64).reshape(-1, 2).T.copy()
        min_age, safety = (_numbers(given[name], 0).astype(np.uint8) for name in ("min_age", "safety_level"))
        from_ms = _numbers(given["available_from_ms"], NO_BEGIN_MS)
        until_ms = _numbers(given["available_until_ms"], NO_END_MS)
        windowed = np.flatnonzero((from_ms != NO_BEGIN_MS) | (until_ms != NO_END_MS))
        return Attributes(
            region_set=np.concatenate([self.region_set, region_set]),
            language=np.concatenate([self.language, language]),
            min_age=np.concatenate([self.min_age, min_age]),
            safety_level=np.concatenate([self.safety_level, safety]),
            window_rows=np.concatenate([self.window_rows, windowed + len(self)]),
            window_from_ms=np.concatenate([self.window_from_ms, from_ms[windowed]]),
            window_until_ms=np.concatenate([self.window_until_ms, until_ms[windowed]]),
            member_set=member_set,
            member_region=member_region,
            region_names=tuple(names),
            language_names=tuple(language_codes)[1:],
            min_ages=tuple(np.union1d(self.min_ages, min_age).tolist()),
            safety_levels=tuple(np.union1d(self.safety_levels, safety).tolist()),
        )

    def _sets(self) -> dict[frozenset[str], int]:
        """Code of each set of regions; everywhere is the empty set."""
        members: dict[int, set[str]] = {0: set()}
        for code, region in zip(self.member_set.tolist(), self.member_region.tolist(), strict=True):
            members.setdefault(code, set()).add(self.region_names[region])
        return {frozenset(regions): code for code, regions in members.items()}

    def permits(self, viewer: Viewer, rows_N: np.ndarray, now_ms: int) -> np.ndarray:
        """(N,) bool: may each be shown to the viewer at the instant?"""
        return ~np.logical_or.reduce(list(self.broken(viewer, rows_N, now_ms).values()))

    def broken(self, viewer: Viewer, rows_N: np.ndarray, now_ms: int) -> dict[str, np.ndarray]:
        """A mask (N,) a limit, True where it forbids the row."""
        from_ms_N, until_ms_N = self.windows_of(rows_N)
        return {"unavailable": (from_ms_N > now_ms) | (until_ms_N <= now_ms), **self.unfit(viewer, rows_N)}

    def unfit(self, viewer: Viewer, rows_N: np.ndarray) -> dict[str, np.ndarray]:
        """`broken` without the limits in time."""
        return {
            "region": ~self.sets_open_to(viewer)[self.region_set[rows_N]],
            "language": ~self.languages_for(viewer)[self.language[rows_N]],
            "age": self.min_age[rows_N] > (viewer.age_years or 0),
            "safety": self.safety_level[rows_N] > (viewer.max_safety_level or 0),
        }

    def windows_of(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 first instant and (N,) first instant after; NO_BEGIN_MS and NO_END_MS where there is none."""
        if not len(self.window_rows):
            return np.full(len(rows_N), NO_BEGIN_MS), np.full(len(rows_N), NO_END_MS)
        at = np.minimum(np.searchsorted(self.window_rows, rows_N), len(self.window_rows) - 1)
        has = self.window_rows[at] == rows_N
        return (
            np.where(has, self.window_from_ms[at], NO_BEGIN_MS),
            np.where(has, self.window_until_ms[at], NO_END_MS),
        )

    def sets_open_to(self, viewer: Viewer) -> np.ndarray:
        """(sets + 1,) bool by value of `region_set`."""
        open_S = np.zeros(int(self.member_set.max(initial=0)) + 1, bool)
        open_S[0] = True
        if viewer.region and (region := folded(viewer.region)) in self.region_names:
            open_S[self.member_set[self.member_region == self.region_names.index(region)]] = True
        return open_S

    def languages_for(self, viewer: Viewer) -> np.ndarray:
        """(languages + 1,) bool by value of `language`."""
        ranges = {folded(tag) for tag in viewer.languages}
        fits = (not ranges or any(_extends(tag, wanted) for wanted in ranges) for tag in self.language_names)
        return np.array([True, *fits])

    def save(self, folder: Path) -> None:
        """Write `limits_NAME.npy` for each array and `limits.json` into an existing folder."""
        for field in fields(self):
            if field.name not in _NAMES:
                np.save(folder / f"limits_{field.name}.npy", getattr(self, field.name), allow_pickle=False)
        (folder / "limits.json").write_text(json.dumps({name: getattr(self, name) for name in _NAMES}))

    @classmethod
    def load(cls, folder: Path) -> Attributes:
        """Memory-map what `save` wrote."""
        saved: dict[str, Any] = {
            field.name: np.asarray(np.load(folder / f"limits_{field.name}.npy", mmap_mode="r", allow_pickle=False))
            for field in fields(cls)
            if field.name not in _NAMES
        }
        saved |= {name: tuple(names) for name, names in json.loads((folder / "limits.json").read_text()).items()}
        return cls(**saved)


def folded(code: str) -> str:
    """A region code or language tag as it is compared."""
    return code.strip().lower().replace("_", "-")


def _extends(tag: str, wanted: str) -> bool:
    return tag == wanted or tag.startswith(f"{wanted}-")


def _regions(joined: str) -> frozenset[str]:
    return frozenset(map(folded, joined.split(_SEPARATOR))) - {""}


def _coded(column: pa.ChunkedArray, read: Callable[[str], T], codes: dict[T, int]) -> np.ndarray:
    """Each video's code, in the narrowest type that holds them all; new values get the next codes.

    A piece at a time: the text of a whole catalogue would not fit an Arrow string column.
    """
    parts = [np.zeros(0, np.uint8)]
    for chunk in column.chunks:
        for start in range(0, len(chunk), _PIECE):
            piece = chunk.slice(start, _PIECE)
            if pa.types.is_nested(piece.type):
                piece = pc.call_function("binary_join", [piece, pa.scalar(_SEPARATOR)])
            spellings = piece.fill_null("").dictionary_encode()
            found = [codes.setdefault(read(text), len(codes)) for text in spellings.dictionary.to_pylist()]
            narrow = np.array(found, np.min_scalar_type(max(found)))
            parts.append(narrow[spellings.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def _numbers(column: pa.ChunkedArray, null: int) -> np.ndarray:
    return column.cast(pa.int64()).fill_null(null).to_numpy()
