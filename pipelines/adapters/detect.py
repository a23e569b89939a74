"""Which adapter reads a path: a mapping file, KuaiRand's own files, or canonical tables."""

from __future__ import annotations

from features.validate import SchemaError
from pipelines.adapters import Adapter
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.adapters.kuairand import KuaiRandAdapter
from pipelines.adapters.mapping import MappingAdapter
from pipelines.storage import Location, location


def open_adapter(source: str | Location) -> Adapter:
    """The adapter for a path or URL; raises SchemaError saying what it looked for when none fits."""
    path = location(source)
    if path.is_file() and path.suffix == ".toml":
        return MappingAdapter(path)
    if any((path / "events").glob("date=*")):
        return CanonicalAdapter(path)
    if any([*path.glob("log_*.csv"), *path.glob("data/log_*.csv")]):
        return KuaiRandAdapter(path)
    raise SchemaError(
        f"{path}: no adapter reads this. Give a mapping file (NAME.toml, see docs/bring-your-own-logs.md), a folder "
        "of KuaiRand's CSV files (log_*.csv, or data/log_*.csv), or one of canonical tables (events/date=YYYY-MM-DD/)"
    )
