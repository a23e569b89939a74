"""Which store an address names: a path is an SQLite file of this server's own, redis://... is shared by many."""

from __future__ import annotations

from pathlib import Path

from serving.store import EventStore, SqliteStore

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def open_store(address: Path | str) -> EventStore:
    """Raises ValueError for an address that names no store, StoreUnavailableError for one that does not answer."""
    if is_redis(address):
        from serving.redis_store import RedisStore  # a server with a store of its own needs no Redis client

        return RedisStore(str(address))
    if "://" in str(address):
        known = ", ".join(REDIS_SCHEMES)
        raise ValueError(f"--store {address}: give a path of an SQLite file, or an address that begins with {known}")
    return SqliteStore(Path(address))


def is_redis(address: Path | str) -> bool:
    """Whether the address is one of Redis."""
    return str(address).startswith(REDIS_SCHEMES)
