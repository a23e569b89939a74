"""The truth behind the log: the exact chance of every signal for any user, video, time and slot.

For tests and for measuring how far a model is from perfect; nothing that trains or serves may read it. B pairs.
"""

from __future__ import annotations

import numpy as np

from pipelines.world.config import WorldConfig
from pipelines.world.ids import IdIndex
from pipelines.world.life import reach, satiation
from pipelines.world.population import populate
from pipelines.world.responses import affinity, engagement, probabilities


class World:
    """Rebuilt from the config (and so the seed) alone; reads no table."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.population = populate(config)
        self.user_rows = IdIndex(self.population.users.ids, "user ids").rows
        self.video_rows = IdIndex(self.population.videos.ids, "video ids").rows

    def affinity(self, user_ids: np.ndarray, video_ids: np.ndarray, ts_ms: np.ndarray) -> np.ndarray:
        """Affinity of each (user, video) pair at its time. Arrays of one shape, or shapes that broadcast."""
        user_B, video_B, ts_ms_B = self._pairs(user_ids, video_ids, ts_ms)
        return affinity(self.population, self.config.response, user_B, video_B, ts_ms_B)

    def oracle(
        self, user_ids: np.ndarray, video_ids: np.ndarray, ts_ms: np.ndarray, slot: np.ndarray | int | None = None
    ) -> dict[str, np.ndarray]:
        """P = 1 of every task of the ranker, and the expected `watch_ms`, float64. A quick skip is no click here.

        Without slots: for a viewer who looks, which is slot 0. With slots: times the slot's examination. Nothing above
        has tired the viewer: see `page_oracle`.
        """
        user_B, video_B, ts_ms_B = self._pairs(user_ids, video_ids, ts_ms)
        slot_B = np.broadcast_to(np.asarray(0 if slot is None else slot), user_B.shape)
        parameters = engagement(self.population, self.config, user_B, video_B, ts_ms_B, slot_B)
        chances = probabilities(parameters, self.config.response)
        return chances | {"quick_skip": 1.0 - chances["click"]}

    def page_oracle(
        self, user_ids: np.ndarray, video_ids_BS: np.ndarray, ts_ms_BS: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The same for whole pages: chances (B, S) of a viewer who gets there, with what the videos above have done to
        them, and the chance (B, S) to get there."""
        user_BS, video_BS, ts_BS = self._pairs(user_ids[:, None], video_ids_BS, ts_ms_BS)
        life, n_slots = self.config.life, video_BS.shape[1]
        tired_BS = satiation(self.population.videos.topic_V[video_BS], life)
        slot_BS = np.broadcast_to(np.arange(n_slots), video_BS.shape)
        parameters = engagement(self.population, self.config, user_BS, video_BS, ts_BS, slot_BS, tired_BS)
        chances = probabilities(parameters, self.config.response)
        return chances | {"quick_skip": 1.0 - chances["click"]}, reach(chances["click"], life)

    def _pairs(
        self, user_ids: np.ndarray, video_ids: np.ndarray, ts_ms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        user_B, video_B = self.user_rows(user_ids), self.video_rows(video_ids)
        user_B, video_B, ts_ms_B = np.broadcast_arrays(user_B, video_B, np.asarray(ts_ms, dtype=np.int64))
        return user_B, video_B, ts_ms_B
