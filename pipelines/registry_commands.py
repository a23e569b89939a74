"""`reelrank registry ...`: what is published, what differs, what is live. Heavy imports happen inside the commands, so
that `--help` answers at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from features.artifacts import Registry
    from features.remote import RemoteRegistry

registry_app = typer.Typer(
    help="Published bundles: list, show, diff, roll back, prune; push to and pull from an object store.",
    no_args_is_help=True,
)
Where = Annotated[
    str, typer.Option("--registry", help="A folder, or a URL that fsspec reads: s3://bucket/path, gs://.., file:///..")
]
Local = Annotated[Path, typer.Option("--registry", help="The local registry.")]
Version = Annotated[str, typer.Argument(help="A published version, or `live`.", show_default=False)]


@registry_app.command(name="list")
def list_versions(registry: Where) -> None:
    """Every version with its day, size and recipe; which one is live, and how it came there."""
    from pipelines.registry_tables import print_versions

    print_versions(_open(registry))


@registry_app.command()
def show(version: Version, registry: Where) -> None:
    """What a version was made of, how the gate judged it, and its figures."""
    from pipelines.registry_tables import print_version

    where = _open(registry)
    print_version(where, _named(where, version))


@registry_app.command()
def diff(a: Version, b: Version, registry: Where) -> None:
    """What differs between two versions: figures, recipe and feed, feature schema, sizes of files."""
    from pipelines.registry_tables import print_difference

    where = _open(registry)
    print_difference(where, _named(where, a), _named(where, b))


@registry_app.command()
def rollback(registry: Where) -> None:
    """Make the previously live bundle live again; running servers follow within a second."""
    typer.echo(f"live: {_open(registry).rollback()}")


@registry_app.command()
def prune(
    registry: Where,
    keep: Annotated[int, typer.Option(min=0, help="The newest so many stay.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove old versions; never the live one, the one that rollback goes to, or one that is being published."""
    where = _open(registry)
    gone = where.prune(keep, dry_run=dry_run)
    for version in gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {version}")
    left = len(where.list()) - (len(gone) if dry_run else 0)
    typer.echo(f"{left} versions {'would stay' if dry_run else 'stay'}, live: {where.live()}")


@registry_app.command()
def push(
    remote: Annotated[str, typer.Argument(help="URL of the remote registry.", show_default=False)],
    registry: Local,
    version: Annotated[str, typer.Option(help="Which one. Default: the live one.")] = "live",
    force: Annotated[
        bool, typer.Option("--force", help="Make it live there whatever it was judged against (noted in its history).")
    ] = False,
) -> None:
    """Upload a version and make it live there, if what is live there is what it was judged against."""
    from features.artifacts import Registry
    from features.remote import RemoteRegistry

    local, there = Registry(registry), RemoteRegistry(remote)
    chosen = _named(local, version)
    if_live = ... if force else local.describe(chosen).meta.get("judged_against")
    typer.echo(f"live on {remote}: {there.push(local, chosen, if_live=if_live)}")


@registry_app.command()
def pull(
    remote: Annotated[str, typer.Argument(help="URL of the remote registry.", show_default=False)],
    registry: Local,
    version: Annotated[
        str | None, typer.Option(help="Fetch this one and leave LIVE alone. Default: what is live there, made live.")
    ] = None,
    every: Annotated[float | None, typer.Option(help="Do so again every so many seconds, for ever.")] = None,
) -> None:
    """Fetch a version into a local registry, every byte verified; a server on it follows within a second."""
    from features.artifacts import Registry
    from features.remote import RemoteRegistry

    local, there = Registry(registry), RemoteRegistry(remote)
    while True:
        before = local.live()
        fetched = there.pull(local, version)
        if every is None or fetched != before:
            typer.echo(f"{fetched} is in {registry}, live: {local.live()}")
        if every is None:
            return
        time.sleep(every)


def _open(where: str) -> Registry | RemoteRegistry:
    from features.remote import open_registry

    return open_registry(where)


def _named(where: Registry | RemoteRegistry, version: str) -> str:
    from features.artifacts import ArtifactError

    if version != "live":
        return version
    live = where.live()
    if live is None:
        raise ArtifactError(f"nothing is live there; published: {json.dumps(where.list())}")
    return live
