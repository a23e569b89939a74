"""A simulated short-video feed: seeded, white-box, written as the canonical tables, with an exact oracle."""

from pipelines.world.config import (
    FAMILIES,
    LIVES,
    SCALES,
    LifeConfig,
    LoggerConfig,
    ResponseConfig,
    WorldConfig,
    read_config,
)
from pipelines.world.generate import WorldSummary, generate
from pipelines.world.oracle import World

__all__ = [
    "FAMILIES",
    "LIVES",
    "SCALES",
    "LifeConfig",
    "LoggerConfig",
    "ResponseConfig",
    "World",
    "WorldConfig",
    "WorldSummary",
    "generate",
    "read_config",
]
