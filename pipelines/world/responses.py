"""How a viewer responds to a video: affinity, the exact chance of every signal, and one draw of them.

The oracle and the generator share `engagement`, so what is drawn and what is promised cannot drift apart. A viewer
looks or swipes past; who looks skips or stays (a click); who stays leaves at a constant hazard (so every chance has a
closed form), stops at the end, or starts again; reactions are logistic in the affinity. B impressions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.world.config import HOUR_MS, ResponseConfig, WorldConfig
from pipelines.world.population import Population

_NEEDS_ONLY_A_LOOK = ("hate",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engagement:
    """The parameters of one impression's outcome."""

    look_B: np.ndarray
    """P(examined)."""
    stay_B: np.ndarray
    """P(watch of at least skip_ms | examined)."""
    patience_ms_B: np.ndarray
    """Mean further watch time after skip_ms on an endless video."""
    rewatch_B: np.ndarray
    """P(starts again | watched to the end)."""
    duration_ms_B: np.ndarray
    reaction_B: dict[str, np.ndarray]
    """P(reaction | stayed), or given a look alone for hate."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def examination(slot_B: np.ndarray, config: ResponseConfig) -> np.ndarray:
    """P(the viewer looks at the slot); 1 at slot 0, multiplies the chance of every signal."""
    return (np.asarray(slot_B, dtype=np.float64) + 1.0) ** -config.examination_decay


def is_fan(world: Population, user_B: np.ndarray, author_B: np.ndarray) -> np.ndarray:
    return contains(world.fan_keys, user_B * len(world.authors.ids) + author_B)


def contains(sorted_keys: np.ndarray, key_B: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(key_B.shape, dtype=bool)
    place_B = np.minimum(np.searchsorted(sorted_keys, key_B), len(sorted_keys) - 1)
    return sorted_keys[place_B] == key_B


def affinity(
    world: Population, config: ResponseConfig, user_B: np.ndarray, video_B: np.ndarray, ts_ms_B: np.ndarray
) -> np.ndarray:
    """How much the user (row) would like the video (row) at the time; a deterministic function, about -2 to 3."""
    users, videos = world.users, world.videos
    match_B = world.taste(user_B, videos.topic_V[video_B], ts_ms_B) * videos.topic_weight_V[video_B]
    match_B = match_B + world.taste(user_B, videos.second_topic_V[video_B], ts_ms_B) * videos.second_weight_V[video_B]
    stretch_B = np.log(videos.duration_ms_V[video_B]) - users.log_duration_U[user_B]
    age_ms_B = np.maximum(ts_ms_B - videos.upload_ts_ms_V[video_B], 0)
    return (
        config.topic_weight * (match_B - config.topic_centre)
        + videos.quality_V[video_B]
        - config.duration_weight * np.minimum(stretch_B**2, 3.0)
        + config.fan_bonus * is_fan(world, user_B, videos.author_V[video_B])
        + config.fresh_bonus * np.exp(-age_ms_B / (config.fresh_hours * HOUR_MS))
    )


def engagement(
    world: Population,
    config: WorldConfig,
    user_B: np.ndarray,
    video_B: np.ndarray,
    ts_ms_B: np.ndarray,
    slot_B: np.ndarray,
    tired_B: np.ndarray | float = 0.0,
) -> Engagement:
    """Rows of users and videos, times, slots and the affinity lost to what was shown above in; everything an outcome
    depends on out."""
    videos = world.videos
    return engagement_at(
        config.response,
        affinity(world, config.response, user_B, video_B, ts_ms_B) - tired_B,
        videos.clickbait_V[video_B],
        videos.duration_ms_V[video_B],
        is_fan(world, user_B, videos.author_V[video_B]),
        slot_B,
    )


def engagement_at(
    r: ResponseConfig,
    affinity_B: np.ndarray,
    clickbait_B: np.ndarray,
    duration_ms_B: np.ndarray,
    fan_B: np.ndarray,
    slot_B: np.ndarray,
) -> Engagement:
    """All that matters once the affinity is known; `fan_B`: followed the author before the log began."""
    reaction_B = {name: sigmoid(bias + slope * affinity_B) for name, (bias, slope) in r.reaction_logits.items()}
    # Nobody follows twice. A follow made during the log changes what is shown, not what is liked, so that the
    # oracle needs the seed alone; the follow table keeps the first of repeated follows.
    reaction_B["follow"] = reaction_B["follow"] * ~fan_B
    return Engagement(
        look_B=examination(slot_B, r),
        stay_B=sigmoid(r.click_bias + r.click_slope * affinity_B + r.click_bait * clickbait_B),
        patience_ms_B=r.patience_ms
        * np.exp(r.patience_slope * affinity_B + r.patience_bait * clickbait_B)
        * (duration_ms_B / 20_000.0) ** r.patience_duration,
        rewatch_B=sigmoid(r.rewatch_bias + 0.5 * affinity_B),
        duration_ms_B=duration_ms_B.astype(np.float64),
        reaction_B=reaction_B,
    )


def probabilities(e: Engagement, config: ResponseConfig) -> dict[str, np.ndarray]:
    """The exact chance of every signal, and `watch_ms`, the expected watch (before rounding down to whole ms)."""
    click_B = e.look_B * e.stay_B
    threshold_ms_B = np.minimum(e.duration_ms_B, config.long_view_ms)
    long_B = np.exp(-(threshold_ms_B - config.skip_ms) / e.patience_ms_B)
    finish_B = np.exp(-(e.duration_ms_B - config.skip_ms) / e.patience_ms_B)
    stayed_ms_B = config.skip_ms + e.patience_ms_B * (1 - finish_B) + finish_B * e.rewatch_B * e.duration_ms_B / 2
    cut = np.exp(-config.skip_ms / config.skip_mean_ms)
    skipped_ms = config.skip_mean_ms - config.skip_ms * cut / (1 - cut)
    chances = {"click": click_B, "long_view": click_B * long_B}
    for name, given_B in e.reaction_B.items():
        chances[name] = given_B * (e.look_B if name in _NEEDS_ONLY_A_LOOK else click_B)
    chances["watch_ms"] = click_B * stayed_ms_B + (1 - click_B) * skipped_ms
    return chances


def draw(e: Engagement, config: ResponseConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One outcome per impression: int8 signals and int64 `watch_ms`."""
    B = len(e.look_B)
    look_B = rng.random(B) < e.look_B
    stay_B = look_B & (rng.random(B) < e.stay_B)
    cut = np.exp(-config.skip_ms / config.skip_mean_ms)
    skipped_ms_B = -config.skip_mean_ms * np.log1p(-rng.random(B) * (1 - cut))
    stayed_ms_B = config.skip_ms + e.patience_ms_B * rng.standard_exponential(B)
    again_B = rng.random(B) < e.rewatch_B
    ended_ms_B = e.duration_ms_B * (1 + again_B * rng.random(B))
    stayed_ms_B = np.where(stayed_ms_B < e.duration_ms_B, stayed_ms_B, ended_ms_B)
    watch_ms_B = np.where(stay_B, stayed_ms_B, skipped_ms_B)
    long_B = stay_B & (stayed_ms_B >= np.minimum(e.duration_ms_B, config.long_view_ms))
    outcome = {"watch_ms": np.floor(watch_ms_B).astype(np.int64), "click": stay_B, "long_view": long_B}
    for name, given_B in e.reaction_B.items():
        outcome[name] = (rng.random(B) < given_B) & (look_B if name in _NEEDS_ONLY_A_LOOK else stay_B)
    return {name: value_B if name == "watch_ms" else value_B.astype(np.int8) for name, value_B in outcome.items()}
