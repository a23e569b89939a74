"""Jobs on Ray Data, or one after the other in this process for file systems that no other process sees."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from features.validate import SchemaError
from pipelines.ingest.report import Progress
from pipelines.ingest.tables import IngestError
from pipelines.storage import StorageError

Work = Callable[[dict[str, Any]], dict[str, Any]]
_NAMED = {kind.__name__: kind for kind in (SchemaError, IngestError, StorageError)}


def run_on_ray(
    work: Work, jobs: list[dict[str, Any]], *, on_progress: Callable[[Progress], None] | None
) -> list[dict[str, Any]]:
    """Do the jobs on Ray Data, the largest first; results in the order of the jobs."""
    if not jobs:
        return []
    import ray.data  # not before the cluster has set Ray's environment

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    largest_first = sorted(range(len(jobs)), key=lambda index: -jobs[index]["bytes"])
    items = [{"index": index, "job": json.dumps(jobs[index])} for index in largest_first]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(partial(_do, work=work))
    results: dict[int, dict[str, Any]] = {}
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise _NAMED[result["kind"]](result["error"])
        results[row["index"]] = result
        _tell(on_progress, result, len(results), len(jobs))
    return [results[index] for index in range(len(jobs))]


def run_here(
    work: Work, jobs: list[dict[str, Any]], *, on_progress: Callable[[Progress], None] | None
) -> list[dict[str, Any]]:
    """Do the jobs one after the other."""
    results = []
    for job in jobs:
        results.append(work(job))
        _tell(on_progress, results[-1], len(results), len(jobs))
    return results


def _tell(on_progress: Callable[[Progress], None] | None, result: dict[str, Any], done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(label=result["label"], rows=result["rows"], done=done, total=total))


def _do(row: dict[str, Any], work: Work) -> dict[str, Any]:
    """A named error travels back as text: wrapped by Ray, its message would drown in remote tracebacks."""
    try:
        result = work(json.loads(row["job"]))
    except tuple(_NAMED.values()) as error:
        result = {"error": str(error), "kind": type(error).__name__}
    return {"index": row["index"], "result": json.dumps(result)}
