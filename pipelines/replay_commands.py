"""`reelrank replay` and `reelrank replay compare`. Heavy imports happen inside, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

replay_app = typer.Typer(invoke_without_command=True)
HELP = """Would another policy have done better on the logged requests? Estimates with intervals, or an honest refusal.

A log answers if every shown video has the probability it was shown with (`propensity`), and every request its
candidate set. Each policy's values become slates by sampling (--temperature); logged rows are then weighed by how
much more or less often the policy would have shown them.

Read the weights before the estimate: ESS is how many equally weighted rows the log amounts to, the mean weight
must be about 1, and "no support" is what the policy shows and the logger never does. A policy the log cannot
answer for is refused, with what would mend it: usually fewer --slots, since weights multiply down the slate.

Exit codes: 0 every policy was judged; 2 the log breaks its contract (row and reason named); 3 a policy was refused,
a guardrail is broken or a self-check failed.

Examples:

reelrank replay --events LOG --policy random --policy bundle:live --registry REGISTRY --slots 2 --html replay.html

reelrank replay --events open-bandit/bts/men --policy random --metric click

reelrank replay compare monday.json tuesday.json
"""


@replay_app.callback(help=HELP)
def replay(
    context: typer.Context,
    events: Annotated[
        Path | None,
        typer.Option(
            "--events",
            help="The log: a folder of canonical tables (events/ and candidates.parquet), an Open Bandit campaign "
            "(.../bts/men), or KuaiRand's log_random_*.csv.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="What to judge; repeatable. logged, random, popularity, newest, bundle:VERSION (or bundle:live) by "
            "--temperature, feed:VERSION with its own rules and exploration, file:PATH with scores a candidate or "
            "probabilities of what was shown.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A signal, watch_s, quick_skip, fresh or unconnected; the first decides."),
    ] = None,
    registry: Annotated[Path | None, typer.Option("--registry", help="For bundle:VERSION, feed:VERSION.")] = None,
    slots: Annotated[int | None, typer.Option(help="Judge the first slots of each slate only.")] = None,
    days: Annotated[float | None, typer.Option(help="Judge the last days of the log only.")] = None,
    temperature: Annotated[
        float, typer.Option(help="Policies sample by value / temperature, in spreads of the request's values.")
    ] = 1.0,
    estimator: Annotated[str, typer.Option(help="Heads the table: ips, snips, rips or snrips.")] = "snrips",
    clip: Annotated[float, typer.Option(help="Weights above it are cut to it; inf cuts none.")] = 100.0,
    resamples: Annotated[int, typer.Option(min=2, help="Bootstrap resamples of users.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples: the same seed, the same interval.")] = 0,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run that made the bundle: its counters as of then.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the report as JSON: `replay compare` reads it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one HTML page, charts inside, no network.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML, for CI.")] = None,
) -> None:
    """See HELP."""
    if context.invoked_subcommand is not None:
        return
    if events is None or not policy:
        missing = "--events" if events is None else "--policy"
        raise typer.BadParameter(f"{missing} is missing; see `reelrank replay --help`")
    from pipelines.console import output
    from pipelines.replay import print_report
    from pipelines.replay import replay as replay_log
    from pipelines.replay.bundle import factories
    from pipelines.replay.html import write_html
    from pipelines.replay.junit import write_junit
    from pipelines.replay.sampling import Sampler

    report = replay_log(
        events,
        policy,
        metrics=tuple(metric) if metric else None,
        slots=slots,
        days=days,
        sampler=Sampler(temperature=temperature),
        resamples=resamples,
        seed=seed,
        estimator=estimator,
        clip=clip,
        factories=factories(registry, run),
        on_progress=lambda text: typer.echo(text, err=True),
    )
    print_report(report, output())
    if out is not None:
        report.write(out)
    if html is not None:
        write_html(report, html)
    if junit is not None:
        write_junit(report, junit)
    raise typer.Exit(report.exit_code)


@replay_app.command(name="compare")
def replay_compare(
    first: Annotated[Path, typer.Argument(help="A report that `reelrank replay --out` wrote.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another one, of the same log and seed.", show_default=False)],
) -> None:
    """Two reports side by side, with paired differences; refused (exit code 3) unless both judged the same log."""
    from pipelines.console import output
    from pipelines.replay.compare import compare

    output().print(compare(first, second))
