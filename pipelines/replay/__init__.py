"""Offline replay: what another ranking policy would have earned on logged requests, with intervals, or a refusal."""

from pipelines.replay.checks import ReplayInputError
from pipelines.replay.report import ReplayReport
from pipelines.replay.run import replay
from pipelines.replay.show import print_report
from pipelines.replay.trust import Thresholds

__all__ = ["ReplayInputError", "ReplayReport", "Thresholds", "print_report", "replay"]
