"""Is replay right? Its estimates against known truth: bias and coverage over many logs, the order of ten policies.

    python -m benchmarks.replay_truth --seeds 200 --json docs/benchmarks/replay-truth.json
    python -m benchmarks.replay_truth --part ranking --scale small --json docs/benchmarks/replay-ranking.json

`estimators` draws logs of a world that can be enumerated (`log_world.py`) and runs replay's own code on each.
`ranking` generates simulated worlds, one a family of parameters, replays ten policies on each and compares with what
they are truly worth there (`pipelines/world/truth.py`). `exploration` lets a logger's exploration fall to nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from benchmarks.log_world import SLOTS, LogWorld
from benchmarks.machine import describe, line
from pipelines.replay import replay
from pipelines.replay.bootstrap import Resamples, Totals, interval, paired
from pipelines.replay.estimators import CLIPS, SlateSums, available, value, weigh
from pipelines.replay.keys import uniforms
from pipelines.replay.log import Window
from pipelines.replay.policies import LoggedRequests, Newest, Popular, Random
from pipelines.replay.reward_model import RewardModel
from pipelines.replay.sampling import Sampler, conditional, draw_slates
from pipelines.replay.slates import Floats, Shard
from pipelines.world import FAMILIES, LIVES, SCALES, World, WorldConfig, generate
from pipelines.world.truth import true_values

METRIC = "long_view"
SAMPLER = Sampler(temperature=1.0, epsilon=0.0, standardise=False)
SHOWN = ("replay", "ips", "snips", "rips", "snrips", "sips", "snsips", "dm", "dr", "snrips@10", "dr@10")


def judge(shard: Shard, target_V: Floats, resamples: int, rows_as_users: bool = False) -> dict[str, Floats]:
    """Every estimator and its resamples on one log, by the code that replay runs; or as if rows were independent."""
    values_C = np.tile(target_V, len(shard.requests.request_id))
    model = RewardModel(shard.rows.lazy(), (METRIC,))
    lift_C = model.lifts(shard, METRIC)
    found = conditional(values_C, shard.requests, shard.slates, SAMPLER, {METRIC: lift_C})
    drawn = draw_slates(values_C, shard.requests, shard.slates, SAMPLER)
    modelled = model.modelled(shard, METRIC, lift_C, found, drawn)
    slates, reward = shard.slates, shard.rewards[METRIC]
    ids = shard.user_ids_U
    if rows_as_users:
        slates, ids = replace(slates, user=np.arange(len(slates.slot))), np.arange(len(slates.slot))
    counts, sums = Resamples(resamples, 0).counts(ids), SlateSums(slates, len(ids))
    weights, logged, policy = weigh(slates, found.probability, found.greedy), Totals(), Totals()
    logged.add(counts, sums.logged({METRIC: reward}))
    policy.add(
        counts,
        sums.weights(weights, CLIPS)
        | sums.earned(weights, METRIC, reward, CLIPS)
        | sums.modelled(weights, METRIC, reward, modelled, CLIPS),
    )
    return {n: value(n, METRIC, policy, logged) for n in ("logged", *available(METRIC, policy, CLIPS))}


def estimators(seeds: int, console: Console) -> dict:
    """Bias, spread and coverage of every estimator over `seeds` logs of the enumerable world."""
    world = LogWorld()
    target_V = 0.9 * world.appeal_V()
    truth, logged_truth = world.true_value(target_V), world.true_value(world.logger_V(), world.logger_epsilon)
    found: dict[str, list[float]] = {}
    hits = {"users": [], "rows": [], "difference, users": []}
    for seed in range(seeds):
        shard = world.log(seed)
        by_users, by_rows = judge(shard, target_V, 400), judge(shard, target_V, 400, rows_as_users=True)
        for name in SHOWN:
            found.setdefault(name, []).append(float(by_users[name][0]))
        for how, drawn in (("users", by_users), ("rows", by_rows)):
            hits[how].append(_covers(drawn["snrips"], truth))
        difference = paired(by_users["snrips"], by_users["logged"])
        hits["difference, users"].append(_covers(difference, truth - logged_truth))
    table = Table(
        title=f"{seeds} logs of {world.requests:,} requests, {world.users} users; truth {truth:.4f}, "
        f"logger {logged_truth:.4f}"
    )
    rows = []
    for column in ("estimator", "mean error", "in standard errors", "spread"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name, estimates in found.items():
        errors = np.array(estimates) - truth
        se = errors.std(ddof=1) / np.sqrt(seeds)
        rows.append(
            {"estimator": name, "mean_error": errors.mean(), "z": errors.mean() / se, "spread": errors.std(ddof=1)}
        )
        table.add_row(name, f"{errors.mean():+.5f}", f"{errors.mean() / se:+.1f}", f"{errors.std(ddof=1):.4f}")
    console.print(table)
    coverage = {how: float(np.mean(h)) for how, h in hits.items()}
    console.print(
        "coverage of 95% intervals of snrips, resampling " + ", ".join(f"{k}: {v:.1%}" for k, v in coverage.items())
    )
    return {
        "truth": truth,
        "seeds": seeds,
        "estimators": rows,
        "coverage": coverage,
        "self_normalised_bias": bias(seeds, console),
    }


def bias(seeds: int, console: Console) -> list[dict]:
    """The bias of snrips as the log grows; logs of few requests, many of them, so that it shows."""
    rows = []
    for requests in (10, 20, 40, 80):
        world = LogWorld(requests=requests, users=requests)
        target_V = 0.9 * world.appeal_V()
        truth = world.true_value(target_V)
        errors = []
        for seed in range(20 * seeds):
            shard = world.log(seed)
            found = conditional(np.tile(target_V, requests), shard.requests, shard.slates, SAMPLER)
            w = weigh(shard.slates, found.probability, found.greedy).cascade.reshape(-1, SLOTS)
            r = shard.rewards[METRIC].reshape(-1, SLOTS)
            errors.append(((w * r).sum(0) / w.sum(0)).mean() - truth)
        se = np.std(errors, ddof=1) / np.sqrt(len(errors))
        rows.append(
            {"requests": requests, "logs": len(errors), "bias": float(np.mean(errors)), "standard_error": float(se)}
        )
    shown = ", ".join(f"{r['requests']}: {r['bias']:+.4f} (+-{r['standard_error']:.4f})" for r in rows)
    console.print(f"bias of snrips by requests: {shown}")
    return rows


def _covers(drawn: Floats, truth: float) -> bool:
    found = interval(drawn)
    return bool(found.low <= truth <= found.high)


class Believer:
    """Values candidates by the world's own chance of a signal, seen through noise."""

    def __init__(self, world: World, name: str, share: float, signal: str = METRIC) -> None:
        self.name, self._world, self._share, self._signal = name, world, share, signal

    def values(self, requests: LoggedRequests) -> Floats:
        """The logit's share, and of a fixed noise what is left."""
        counts = np.diff(requests.offsets)
        user_C, ts_C = np.repeat(requests.user_id, counts), np.repeat(requests.ts_ms, counts)
        p = self._world.oracle(user_C, requests.video_ids, ts_C)[self._signal]
        noise = uniforms(user_C ^ (requests.video_ids << 1), 17)
        return self._share * np.log(p / (1 - p)) + (1 - abs(self._share)) * 3.5 * (noise - 0.5)


def policies_of(world: World, history) -> list:
    shares = {"oracle": 1.0, "good": 0.75, "fair": 0.5, "weak": 0.25, "contrary": -0.5}
    believers = [Believer(world, name, share) for name, share in shares.items()]
    baits = [Believer(world, "clicks", 1.0, "click"), Believer(world, "haters", -1.0, "hate")]
    return [*believers, *baits, Popular(history), Newest(history), Random()]


def ranking(scale: str, families: list[str], life: str, console: Console, slots: int = 2) -> dict:
    """Kendall's tau between replayed and true values of ten policies, by family of worlds."""
    from pipelines.replay.log import CanonicalLog

    sampler, found = Sampler(temperature=1.0, epsilon=0.05), []
    for number, family in enumerate(families):
        # Another seed too: people and videos are others, so that no family repeats another's luck.
        config = replace(SCALES[scale], response=FAMILIES[family], life=LIVES[life], seed=SCALES[scale].seed + number)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "world"
            generate(config, folder)
            world = World(config)
            policies = policies_of(world, CanonicalLog(folder, (METRIC,), Window()).history)
            truth = true_values(world, folder, policies, METRIC, sampler=sampler, window=Window(slots=slots), draws=4)
            report = replay(folder, policies, metrics=(METRIC,), sampler=sampler, slots=slots)
        found.append(_order(family, report, truth, console))
    return {"scale": scale, "life": life, "slots": slots, "families": found}


def _order(family: str, report, truth: dict[str, float], console: Console) -> dict:
    judged = report.policies[1:]
    rows, tau = [], {}
    for name in ("snrips@100", "snips@100", "rips", "dr", "dm"):
        estimates = [p.metrics[METRIC][name].value.estimate for p in judged]
        tau[name] = float(kendalltau(estimates, [truth[p.policy] for p in judged]).statistic)
    table = Table(
        title=f"{family}: {report.rows:,} rows; Kendall's tau " + ", ".join(f"{k} {v:.2f}" for k, v in tau.items())
    )
    for column in ("policy", "truth", "snrips@100 [95%]", "dr", "ESS", ""):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for p in sorted(judged, key=lambda p: -truth[p.policy]):
        v, t = p.metrics[METRIC]["snrips@100"].value, truth[p.policy]
        inside = v.low <= t <= v.high
        rows.append({"policy": p.policy, "truth": t, "estimate": v.estimate, "low": v.low, "high": v.high,
                     "covered": inside, "dr": p.metrics[METRIC]["dr"].value.estimate,
                     "ess": p.diagnostics.effective_sample_size, "refused": p.refused})  # fmt: skip
        mark = ("" if inside else "outside") + (" refused" if p.refused else "")
        table.add_row(p.policy, f"{t:.4f}", f"{v.estimate:.4f} [{v.low:.4f}, {v.high:.4f}]", f"{rows[-1]['dr']:.4f}",
                      f"{p.diagnostics.effective_sample_size:,.0f}", mark)  # fmt: skip
    console.print(table)
    return {"family": family, "rows": report.rows, "kendall_tau": tau, "policies": rows}


def exploration(console: Console, config: WorldConfig | None = None) -> list[dict]:
    """The random policy judged from loggers that show the best but for a share epsilon of the slots."""
    base = config or SCALES["smoke"]
    rows = []
    for epsilon in (0.5, 0.2, 0.1, 0.05, 0.02, 0.0):
        logger = replace(base.logger, kind="epsilon_slot" if epsilon else "deterministic", epsilon=epsilon)
        with tempfile.TemporaryDirectory() as scratch:
            generate(replace(base, logger=logger), Path(scratch) / "world")
            report = replay(Path(scratch) / "world", [Random()], metrics=(METRIC,), slots=1, resamples=100)
        d = report.policies[1].diagnostics
        rows.append({"epsilon": epsilon, "rows": d.rows, "ess": d.effective_sample_size, "mean_weight": d.mean_weight,
                     "refused": report.policies[1].refused})  # fmt: skip
    table = Table(title="the random policy, as the logger stops exploring (first slot)")
    for column in ("epsilon", "rows", "ESS", "mean weight", "refused for"):
        table.add_column(column)
    for r in rows:
        why = "; ".join(reason.split(" (mend")[0] for reason in r["refused"])
        table.add_row(f"{r['epsilon']:g}", f"{r['rows']:,}", f"{r['ess']:,.0f}", f"{r['mean_weight']:.3f}", why)
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("estimators", "ranking", "exploration"), default="estimators")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--scale", default="smoke", choices=tuple(SCALES))
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), help="Default: all of them.")
    parser.add_argument("--life", default="still", choices=tuple(LIVES), help="Of `ranking`.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, machine = Console(width=140), describe(("numpy", "polars", "scipy"))
    if arguments.part == "estimators":
        found = estimators(arguments.seeds, console)
    elif arguments.part == "ranking":
        found = ranking(arguments.scale, arguments.family or list(FAMILIES), arguments.life, console)
    else:
        found = exploration(console)
    console.print(line(machine))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, arguments.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
