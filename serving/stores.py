"""Which store an address names: a path is an SQLite file of this server's own, redis://... is shared by many."""

from __future__ import annotations

from pathlib import Path

from serving.store import EventStore, SqliteStore, StoreConfig

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def open_store(address: Path | str, shortlist_share: float = 1.0) -> EventStore:
    """Raises ValueError for an address that names no store, StoreUnavailableError for one that does not answer.

    `shortlist_share`: see `StoreConfig`."""
    if is_redis(address):
        from serving.redis_store import RedisConfig, RedisStore  # a store of one's own needs no Redis client

        return RedisStore(str(address), RedisConfig(shortlist_share=shortlist_share))
    if "://" in str(address):
        known = ", ".join(REDIS_SCHEMES)
        raise ValueError(f"--store {address}: give a path of an SQLite file, or an address that begins with {known}")
    return SqliteStore(Path(address), StoreConfig(shortlist_share=shortlist_share))


def is_redis(address: Path | str) -> bool:
    """Whether the address is one of Redis."""
    return str(address).startswith(REDIS_SCHEMES)
