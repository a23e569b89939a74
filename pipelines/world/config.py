"""How large the simulated world is, how its people respond, and how its logger chooses.

Every number that shapes the world stands here, and all of it is written to `world.json` beside the tables.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

DAY_MS = 86_400_000
HOUR_MS = 3_600_000

START_MS = 1_767_225_600_000
"""2026-01-01 00:00 UTC: the first moment of day 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseConfig:
    """What makes a viewer like a video, and what a viewer who likes it does."""

    topic_weight: float = 4.2
    """Affinity gained between no match (cosine 0) and a perfect match (cosine 1) of taste and topics."""
    topic_centre: float = 0.42
    """Cosine at which the match neither adds to nor takes from the affinity."""
    duration_weight: float = 0.45
    """Affinity lost per squared log-ratio between a video's duration and the viewer's favourite duration."""
    fan_bonus: float = 0.4
    """Affinity added for authors the viewer followed before the log began."""
    fresh_bonus: float = 0.6
    """Affinity added at the moment of upload; fades with `fresh_hours`."""
    fresh_hours: float = 36.0
    """Hours after which the bonus of a fresh video has fallen to 1/e."""

    examination_decay: float = 0.2
    """The viewer looks at slot s with probability (s + 1) ** -examination_decay; else the video is swiped past."""
    click_bias: float = -1.8
    """Logit of staying beyond `skip_ms` (a click) at affinity 0, for a viewer who looks."""
    click_slope: float = 1.6
    """Logit of a click per unit of affinity."""
    click_bait: float = 1.0
    """Logit of a click per unit of clickbait."""
    skip_ms: float = 2000.0
    """A view shorter than this is a skip."""
    skip_mean_ms: float = 900.0
    """Mean of the exponential from which skips are drawn (cut at `skip_ms`)."""
    patience_ms: float = 8_500.0
    """Mean further watch time at affinity 0 on an endless loop of a 20 s video, for a viewer who clicked."""
    patience_slope: float = 0.9
    """Log patience per unit of affinity."""
    patience_bait: float = -0.5
    """Log patience per unit of clickbait: it disappoints."""
    patience_duration: float = 0.5
    """Patience grows as duration to this power: below 1, so longer videos get more seconds and less completion."""
    rewatch_bias: float = -2.2
    """Logit of starting again after the end at affinity 0; slope 0.5."""
    long_view_ms: float = 18_000.0
    """A long view is a watch of at least min(duration, this): KuaiRand's rule."""

    reaction_logits: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "like": (-5.4, 1.0),
            "comment": (-6.4, 0.8),
            "share": (-6.8, 1.0),
            "profile_enter": (-5.2, 0.8),
            "follow": (-6.6, 0.9),
            "hate": (-6.1, -0.8),
        }
    )
    """Logit at affinity 0 and slope in affinity; given a click, except `hate`, which needs only a look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerConfig:
    """The logging policy: where candidates come from and how a page is drawn from them."""

    policy_id: str = "world-logger-v1"
    kind: Literal["plackett_luce", "epsilon_slot", "popularity", "deterministic"] = "plackett_luce"
    """How a page is drawn: from the softmax of the scores mixed with uniform choices; the best left, but for uniform
    choices; as the first, by long-view rates alone; or always the best left, which leaves nothing to learn from."""
    source_shares: dict[str, float] = field(
        default_factory=lambda: {"followed": 0.22, "personal": 0.42, "popular": 0.05, "fresh": 0.19, "uniform": 0.12}
    )
    """Share of the candidate draws by source."""
    oversample: float = 1.5
    """Draws per candidate wanted: duplicates, seen videos and empty draws fall away."""
    view_noise: float = 0.15
    """Standard deviation of the logger's error about each of a user's tastes: it is deliberately mediocre."""
    personal_tries: int = 4
    """The personal source keeps the best of so many draws, by the logger's own score."""
    match_weight: float = 3.0
    """Weight of the believed topic match in the logger's score."""
    rate_weight: float = 0.5
    """Weight of the log of the smoothed long-view rate so far."""
    followed_weight: float = 0.5
    """Score added for candidates from followed authors."""
    temperature: float = 0.5
    """Plackett-Luce temperature over the scores."""
    epsilon: float = 0.12
    """Probability, at every slot, of a uniform choice among the candidates left."""
    pool_power: float = 0.6
    """Exposure of the personal and popular sources grows as popularity to this power."""
    pool_age_days: float = 1.5
    """Time constant of the decay of that exposure with a video's age."""
    pool_age_floor: float = 0.1
    """What is left of that exposure for old videos."""
    fresh_hours: float = 36.0
    """The fresh source draws among uploads of the last so many hours."""
    followed_days: float = 7.0
    """The followed source draws among uploads of the last so many days."""
    memory: float = 0.75
    """Share of yesterday's counters that the logger keeps each day."""
    seen_buckets: int = 8192
    """Buckets of each user's seen-filter, a power of two. A seen video never returns; a clash hides a few more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LifeConfig:
    """What changes with time and with what was shown; by default nothing does."""

    drift: float = 0.0
    """Standard deviation of a day's step of each of a viewer's tastes. The logger believes the tastes of day 0."""
    drift_kept: float = 0.9
    """Share of yesterday's departure that is left: tastes come back to what the viewer is."""
    satiation: float = 0.0
    """Affinity lost for each video of the same topic just above in the page."""
    satiation_kept: float = 0.9
    """Share of that loss which is left one video further down."""
    leave_after_skip: float = 0.0
    """Chance that a video which was skipped, or not looked at, is the last of the page."""
    leave_after_stay: float = 0.0
    """Likewise for one that the viewer stayed for."""
    return_gain: float = 0.0
    """Tomorrow's visits grow by e to this for a viewer who stays for every video, against one who stays for none."""
    return_usual: float = 0.3
    """Share of videos stayed for that leaves visits as they are."""
    return_hate: float = 5.0
    """Videos stayed for that one hated video undoes."""
    return_memory: float = 0.5
    """Share of yesterday's mood that is kept."""

    def __post_init__(self) -> None:
        shares = (
            self.drift_kept,
            self.satiation_kept,
            self.leave_after_skip,
            self.leave_after_stay,
            self.return_memory,
        )
        if not all(0 <= share <= 1 for share in shares) or self.drift < 0:
            raise ValueError("LifeConfig: drift must be at least 0; *_kept, leave_* and return_memory lie in 0 .. 1")

    @property
    def leaves(self) -> bool:
        """Whether pages may end early."""
        return max(self.leave_after_skip, self.leave_after_stay) > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """One world. Same config, same bytes."""

    seed: int = 7
    n_users: int = 1500
    n_authors: int = 400
    n_videos: int = 4000
    n_days: int = 8
    stock_days: int = 14
    """Uploads start so many days before day 0, at the same rate as after it."""
    requests_per_user_day: float = 2.4
    max_requests_per_day: int = 12
    page_size: int = 6
    n_candidates: int = 40
    candidate_days: int = 2
    """The candidate sets of the last so many days are written to `candidates.parquet`."""
    topics: int = 16
    content_dim: int = 32
    content_noise: float = 0.08
    """Standard deviation of each coordinate's noise; the part that tells topics apart has norm about 1."""
    mean_follows: float = 8.0
    ineligible_share: float = 0.03
    response: ResponseConfig = field(default_factory=ResponseConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    life: LifeConfig = field(default_factory=LifeConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.page_size <= self.n_candidates:
            raise ValueError(
                f"WorldConfig.page_size is {self.page_size}: give 1 to n_candidates ({self.n_candidates}), "
                "a page is drawn from its candidates"
            )
        if self.topics < 4:
            raise ValueError(f"WorldConfig.topics is {self.topics}: give at least 4, users like up to 3 of them")
        buckets = self.logger.seen_buckets
        if buckets < 8 or buckets & (buckets - 1):
            raise ValueError(f"LoggerConfig.seen_buckets is {buckets}: give a power of two of at least 8")


def described(config: WorldConfig | LoggerConfig) -> dict[str, Any]:
    """The config as JSON has it. A logger of the first kind, and a world without a life, are described as they were
    before there were others, so that worlds written before and after are the same bytes."""
    fields = asdict(config)
    if isinstance(config, WorldConfig) and config.life == LifeConfig():
        del fields["life"]
    logger = fields["logger"] if isinstance(config, WorldConfig) else fields
    if logger["kind"] == LoggerConfig.__dataclass_fields__["kind"].default:
        del logger["kind"]
    return fields


def read_config(world_json: Path) -> WorldConfig:
    """The config of a generated dataset, from the `world.json` beside its tables."""
    fields = json.loads(Path(world_json).read_text())["config"]
    response, logger, life = fields.pop("response"), fields.pop("logger"), fields.pop("life", {})
    response["reaction_logits"] = {name: (bias, slope) for name, (bias, slope) in response["reaction_logits"].items()}
    return WorldConfig(
        **fields, response=ResponseConfig(**response), logger=LoggerConfig(**logger), life=LifeConfig(**life)
    )


SCALES: dict[str, WorldConfig] = {
    "tiny": WorldConfig(n_users=400, n_authors=60, n_videos=800, n_days=5),
    "smoke": WorldConfig(),
    "small": WorldConfig(
        n_users=10_000, n_authors=4_000, n_videos=50_000, n_days=14, requests_per_user_day=3.0, mean_follows=10.0
    ),
    "full": WorldConfig(
        n_users=100_000, n_authors=60_000, n_videos=1_000_000, n_days=14, requests_per_user_day=3.0, mean_follows=15.0
    ),
}
"""The `--scale` dial."""

FAMILIES: dict[str, ResponseConfig] = {
    "plain": ResponseConfig(),
    "steep": ResponseConfig(examination_decay=0.6),
    "bait": ResponseConfig(click_bait=2.0, patience_bait=-1.2),
    "fickle": ResponseConfig(topic_weight=2.4, duration_weight=0.9, fresh_bonus=1.2),
}
"""Worlds whose people respond differently: lower slots are hardly seen; clickbait pays and disappoints; tastes matter
less than length and freshness. What holds in one of them only is a property of the simulator."""

LIVES: dict[str, LifeConfig] = {
    "still": LifeConfig(),
    "cascade": LifeConfig(leave_after_skip=0.25, leave_after_stay=0.05),
    "restless": LifeConfig(drift=0.05, satiation=0.7, leave_after_skip=0.15, leave_after_stay=0.03, return_gain=1.5),
}
"""Worlds in which more or less happens: nothing; people leave, sooner after a skip; and everything at once."""
