"""What a candidate must show before it may be published, and why each threshold is where it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Thresholds of the gate's rules.

    Against the live bundle a rule refuses only what is shown: the whole 95% interval of the difference, resampled over
    users, must lie beyond the tolerance. A tolerance covers what two trainings that differ by their seed alone differ
    by; `python -m benchmarks.gate` measures that spread beside the thresholds.
    """

    max_gauc_drop: float = 0.01
    """GAUC of a task, live less candidate. Ten seeds of the world `tiny` have a deviation of .004, so two of them
    differ by .005."""
    max_log_loss_rise: float = 0.03
    """Log loss of a task over the live bundle's, less 1. Beside GAUC, it sees what the value model multiplies: the
    probabilities. Ten seeds of `tiny` have a deviation of 1.3%, so two of them differ by 1.9%."""
    max_recall_drop: float = 0.1
    """Share of the live bundle's recall@k that may be lost, at each k of the recipe. Candidates that retrieval misses
    are lost to everything after it, but several sources find most of them: a tenth of one source is little."""
    min_recall_over_popularity: float = 1.0
    """Two-tower recall over popularity's, at the first k: below it, a list for everybody is the better source."""
    min_gauc_over_popularity: float = 0.0
    """How far the ranker's GAUC of long_view must lie above that of a smoothed popularity on the same rows."""
    max_error_cut: float = 0.5
    """Share of the live bundle's ranking errors (1 - GAUC) that must be left. To halve them from one day to the next
    is too good to be true: an input has seen the label."""
    max_error_cut_over_baseline: float = 0.3
    """The same without a live bundle, for long_view: the errors left of the better one of popularity and a
    factorisation machine. Good rankers of the worlds `tiny` and `smoke` leave .63 and .77 of them."""
    max_calibration_error: float = 0.15
    """Mean prediction over mean label may differ from 1 by this, or by two standard errors where that is more
    (of the positives on the test days and of those on the validation days, which the calibration was fitted on)."""
    min_positives: int = 200
    """A task with fewer test positives is not judged: its calibration on either day is mostly chance."""
    max_table_loss: float = 0.003
    """What coded tables may add to a task's normalised entropy over the float tables they were made from. int8 adds
    .00002 in the worlds; half a percent of a good model's entropy is a bad trade for memory."""
    min_index_recall: float = 0.95
    """Share of the exact top that the index returns, of its own vectors and of vectors that the bundle's own video
    tower gives now; below it the index, not the model, decides the feed."""
    min_lists: float = 1.5
    """Distinct videos in all users' top k, in lists of k: 1 is one list for everybody, the towers say nothing."""
    min_coverage_of_live: float = 0.6
    """Share of the live bundle's coverage (distinct videos in all users' top k) that must be left. Retrieval that
    narrows by more starves the videos that tomorrow's model is to learn from."""
    max_gini_rise: float = 0.1
    """How much more unequal authors' exposure in users' top k may be than the live bundle's, as a Gini coefficient
    (0: all alike, 1: one has it all)."""
    max_training_age_days: int = 14
    """Days from the last day trained or chosen on to the log's end; more, and the bundle serves a world gone by."""
    max_slowdown: float = 1.5
    """Processor time of a whole feed, retrieval and ranking and all, over the live bundle's: the median of the ratios
    of the same requests, asked in turn in one process. A bundle that takes half as long again needs half as many
    machines again."""
    resamples: int = 1000
    """Of the bootstrap over users."""
    seed: int = 20260101
    """Of the bootstrap, and of whatever is sampled."""
    at_most_users: int = 20_000
    """Users whose test impressions are scored; more make the intervals narrower than any tolerance needs."""
    at_most_queries: int = 2_000
    """Users of the test days who are asked for by retrieval."""
    at_most_videos: int = 500_000
    """Videos among which retrieval is compared: all of a smaller catalogue, else a sample with every relevant one."""
    timed_requests: int = 40
    """Feeds timed of each bundle, after a few to warm up."""
    clean_process_timeout_s: float = 600.0
    """For a process of its own to load the bundle and answer its golden requests."""
