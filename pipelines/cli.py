"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 failed (the message says what and how to mend it), 2 wrong input or usage, 3 refused: the gate
or replay answered, and the answer is no.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cluster import CALM_THREADS
from pipelines.exits import EXIT_INPUT, EXIT_REFUSED, exit_code, message
from pipelines.registry_commands import registry_app
from pipelines.replay_commands import replay_app
from pipelines.run_commands import Device, Overrides, Run, evaluate, index_build, ingest, publish, run, train

app = typer.Typer(
    name="reelrank",
    help="Recommendation and ranking for short-video feeds: logs in, feed out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

index_app = typer.Typer(help="Build the FAISS index of a run, or plan one of any size.", no_args_is_help=True)
app.add_typer(index_app, name="index")
app.add_typer(replay_app, name="replay")
app.add_typer(registry_app, name="registry")

Ca = Annotated[Path | None, typer.Option("--ca", help="PEM of whoever signed the server's certificate; turns TLS on.")]
Cert = Annotated[Path | None, typer.Option("--cert", help="This client's certificate, where the server asks for one.")]
Key = Annotated[Path | None, typer.Option("--key", help="Its key.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File whose first token is sent.")]


@app.command()
def demo(
    scale: Annotated[str, typer.Option(help="Size of the simulated world: tiny, smoke, small or full.")] = "smoke",
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/demo-SCALE.")] = None,
) -> None:
    """The whole funnel on a simulated world: generate, train, publish, serve, fetch feeds, replay, report."""
    from pipelines.demo import run_demo

    run_demo(scale, out or Path("runs") / f"demo-{scale}")


for command in (run, ingest, train, evaluate, publish):
    app.command()(command)
index_app.command(name="build")(index_build)


@index_app.command(name="plan")
def index_plan(
    videos: Annotated[str, typer.Option(help="Videos to hold, e.g. 300e6 or 300M.")],
    ram: Annotated[str, typer.Option(help="Memory the search may take, e.g. 24GiB.")],
    dim: Annotated[int, typer.Option(help="Width of the vectors.")] = 64,
    directions: Annotated[
        int | None, typer.Option(help="Principal directions that lists and codes keep. Default: all.")
    ] = None,
    disk: Annotated[str | None, typer.Option(help="Disk for the index and the vectors it is built from.")] = None,
    recall: Annotated[float, typer.Option(help="Share of the exact best k among the 10 k handed on.")] = 0.9,
    k: Annotated[int, typer.Option(help="The best so many of a query count.")] = 100,
    p50: Annotated[str, typer.Option(help="Median latency, one query at a time on one thread, e.g. 5ms.")] = "5ms",
    cores: Annotated[int, typer.Option(help="Cores that build.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare index designs for a catalogue's size: memory, recall, latency, build time; picks one, or says no."""
    from candidate_gen.plan import PlanRequest, plan
    from pipelines import index_plan as shown
    from pipelines.console import output
    from pipelines.units import BYTES, COUNTS, MILLISECONDS, parse

    width = dim if directions is None else directions
    for option, value, wants, good in (
        ("--dim", dim, "a multiple of 4", dim >= 4 and dim % 4 == 0),
        ("--directions", width, f"a multiple of 4, at most {dim}", 4 <= width <= dim and width % 4 == 0),
        ("--recall", recall, "a share between 0 and 1", 0 < recall < 1),
        ("--k", k, "1 or more", k > 0),
        ("--cores", cores, "1 or more", cores > 0),
    ):
        if not good:
            raise ValueError(f"{option} {value}: give {wants}")
    request = PlanRequest(
        videos=round(parse(videos, COUNTS, "--videos")),
        dim=dim,
        directions=directions,
        ram_bytes=int(parse(ram, BYTES, "--ram")),
        disk_bytes=None if disk is None else int(parse(disk, BYTES, "--disk")),
        recall=recall,
        k=k,
        p50_ms=parse(p50, MILLISECONDS, "--p50"),
        cores=cores,
    )
    found = plan(request)
    if as_json:
        typer.echo(shown.as_json(found))
    else:
        shown.print_plan(found, output())
    if found.pick is None:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
@app.command()
def serve(
    registry: Annotated[Path, typer.Option("--registry", help="Where bundles are published.")],
    store: Annotated[
        str, typer.Option("--store", help="SQLite file of live events, made when missing; or redis://HOST:PORT/DB.")
    ] = "live.sqlite",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 lets the system choose.")] = 50051,
    insecure_public: Annotated[
        bool, typer.Option("--insecure-public", help="Allow an address that other machines reach, without TLS.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM chain of the server; turns TLS on.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option("--client-ca", help="Only clients whose certificate it signed may connect (mTLS).")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="File of bearer tokens, one a line; every call must bring one.")
    ] = None,
    web: Annotated[
        int | None,
        typer.Option("--web", help="Also a page for people, on this port of the same address; 0: any."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Prometheus metrics on this port; 0 lets the system choose.")
    ] = None,
    metrics_host: Annotated[str, typer.Option("--metrics-host", help="Address of the metrics.")] = "127.0.0.1",
    otlp: Annotated[str | None, typer.Option("--otlp", help="OTLP/HTTP collector that gets traces.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Requests computed at once; each takes a core.")] = 2,
    scorer: Annotated[
        str,
        typer.Option(
            help="How the ranker computes: plain, or compiled in fp32, bf16 or int8; auto: compiled, as is best here. "
            "Compiled once a shape of ranker, while plain answers; kept in ~/.cache/reelrank."
        ),
    ] = "auto",
    log_candidates: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of requests whose candidates are logged, for replay; 1.3 kB each."),
    ] = 1.0,
    device: Device = "cpu",
) -> None:
    """Serve the live bundle over gRPC and follow LIVE: publish and rollback need no restart."""
    from serving.scorer import scorer_named
    from serving.security import ServerSecurity
    from serving.server import serve as serve_forever
    from serving.server_config import ServerConfig

    serve_forever(
        registry,
        store,
        ServerConfig(
            host=host,
            port=port,
            security=ServerSecurity(
                cert_file=tls_cert,
                key_file=tls_key,
                client_ca_file=client_ca,
                token_file=tokens,
                insecure_public=insecure_public,
            ),
            web_port=web,
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            otlp=otlp,
            threads=threads,
            scorer=scorer_named(scorer),
            shortlist_share=log_candidates,
            device=device,
        ),
        on_ready=lambda address, version: print(f"serving on {address} (bundle {version})", flush=True),
        on_page=lambda url: print(f"page on {url}", flush=True),
    )


@app.command()
def feed(
    user: Annotated[int, typer.Option(help="User id.")],
    address: Annotated[str, typer.Option(help="Where `reelrank serve` listens.")] = "127.0.0.1:50051",
    k: Annotated[int, typer.Option(help="Videos.")] = 10,
    surface: Annotated[str, typer.Option(help="Surface; empty takes the bundle's first.")] = "",
    now_ms: Annotated[int, typer.Option(help="Instant of the request, for logs of the past; 0 is the clock.")] = 0,
    region: Annotated[str | None, typer.Option(help="Where the viewer is, e.g. DE.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="One of the viewer's, e.g. pt-BR. Repeatable.")] = None,
    age: Annotated[int | None, typer.Option(help="Years. Not given: as the bundle says, by default 0.")] = None,
    safety: Annotated[int | None, typer.Option(help="Highest safety level to be shown, 0 to 9.")] = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    token_file: TokenFile = None,
) -> None:
    """Fetch a feed from a running server and print why each video is in it."""
    from features.eligibility import Viewer
    from pipelines.show import print_feed
    from serving.security import ClientSecurity

    viewer = Viewer(region=region, languages=tuple(language or ()), age_years=age, max_safety_level=safety)
    security = ClientSecurity(ca_file=ca, cert_file=cert, key_file=key, token_file=token_file)
    print_feed(address, user, k, surface, now_ms, viewer, security)


@app.command()
def upload(
    videos: Annotated[Path, typer.Argument(help="Parquet file of canonical videos.", show_default=False)],
    address: Annotated[str, typer.Option(help="Where `reelrank serve` listens.")] = "127.0.0.1:50051",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    token_file: TokenFile = None,
) -> None:
    """Send videos to a running server: each may be shown from its acknowledgement on. Sending them again is safe."""
    from pipelines.console import Stages
    from pipelines.upload import upload as send
    from serving.security import ClientSecurity

    security = ClientSecurity(ca_file=ca, cert_file=cert, key_file=key, token_file=token_file)
    outcome, left_out = send(videos, address, Stages(), security)
    typer.echo(f"{outcome.added:,} new videos, {outcome.replaced:,} known ones replaced, {left_out.total():,} left out")
    if left_out:
        raise typer.Exit(EXIT_INPUT)


@app.command()
def remove(
    ids: Annotated[list[int], typer.Argument(help="Video ids; negative ones after `--`.", show_default=False)],
    address: Annotated[str, typer.Option(help="Where `reelrank serve` listens.")] = "127.0.0.1:50051",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    token_file: TokenFile = None,
) -> None:
    """Remove videos from a running server: none is shown to any request after this returns."""
    from pipelines.upload import remove as send
    from serving.security import ClientSecurity

    outcome = send(ids, address, ClientSecurity(ca_file=ca, cert_file=cert, key_file=key, token_file=token_file))
    typer.echo(f"{outcome.removed:,} videos removed, {outcome.unknown:,} not known (and kept out from now on)")


@app.command(name="export-events")
def export_events(
    store: Annotated[
        str, typer.Option("--store", help="The store that `reelrank serve` writes: a file, or redis://..")
    ],
    out: Annotated[Path, typer.Option(help="Folder for events/date=YYYY-MM-DD/ and candidates.parquet.")],
) -> None:
    """Write served and logged events as canonical tables, with their propensities and the candidates they were drawn
    from: training and replay data."""
    from serving.export import export_events as export
    from serving.stores import is_redis

    if not is_redis(store) and not Path(store).exists():
        raise FileNotFoundError(f"{store} is not there: `reelrank serve --store` makes it")
    typer.echo(f"{export(store, out):,} events in {out / 'events'}")


@app.command()
def sequential(
    data: Annotated[
        Path, typer.Option("--data", help="Interactions: Parquet, CSV, TSV, MovieLens' ratings.dat or S3-Rec's lines.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", help="ml-1m, amazon-beauty or kuairand-pure.")] = "ml-1m",
    user: Annotated[str | None, typer.Option("--user", help="Column of users. Default: the recipe's.")] = None,
    item: Annotated[str | None, typer.Option("--item", help="Column of items.")] = None,
    order: Annotated[str | None, typer.Option("--order", help="Column to sort by; '' keeps the file's order.")] = None,
    where: Annotated[str | None, typer.Option("--where", help="COLUMN=VALUE: other rows are left out.")] = None,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train so many seeds; mean and spread are reported.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run. Default: runs/sequential-RECIPE.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from the last epoch.")] = False,
    validation_only: Annotated[
        bool, typer.Option("--validation-only", help="Leave the test items unscored, to choose settings by.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Next-item prediction on a public benchmark: leave-one-out, exact ranking over the whole catalogue."""
    import shutil

    from pipelines.console import Stages, output
    from pipelines.sequential.recipes import sequential_recipe
    from pipelines.sequential.run import print_result, run_benchmark

    chosen = sequential_recipe(recipe, tuple(overrides or ()), user=user, item=item, order=order, where=where)
    folder = out or Path("runs") / f"sequential-{recipe}"
    result = run_benchmark(
        data, chosen, folder, Stages(), seeds=seeds, device=device, fresh=fresh, score_test=not validation_only
    )
    print_result(result, output())
    if json_out is not None:
        shutil.copyfile(folder / "result.json", json_out)


@app.command()
def report(run: Run) -> None:
    """Write the HTML report of a run again from its run.json."""
    import json

    from pipelines.report import write_report

    path = run / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: `reelrank run` or `reelrank demo` writes it")
    write_report(json.loads(path.read_text()), run / "report.html")
    typer.echo(run / "report.html")


@app.command()
def recipes() -> None:
    """List the named recipes."""
    from pipelines.recipes import RECIPES

    for name, make in RECIPES.items():
        typer.echo(f"{name:<16}{(make.__doc__ or '').splitlines()[0]}")


@app.command()
def doctor() -> None:
    """Versions, import paths, CPU features, GPU, memory, disk; says what is wrong and how to mend it."""
    from pipelines.doctor import diagnose, print_checks

    raise typer.Exit(print_checks(diagnose()))


def main() -> None:
    """Entry point: turns expected failures into one clear message and an exit code."""
    for name, setting in CALM_THREADS.items():
        os.environ.setdefault(name, setting)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # a warning that importing torchrec causes
    try:
        app()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        typer.secho(message(error), fg=typer.colors.RED, err=True)
        raise SystemExit(code) from error


if __name__ == "__main__":
    main()
