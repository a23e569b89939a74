"""What a command that failed says, and the exit code that scripts read: 1 it failed, 2 mend the input, 3 it refused.

Errors are known by their names: importing all that might raise one would take seconds before a mistyped option is told.
"""

from __future__ import annotations

from typing import Any

EXIT_FAILED, EXIT_INPUT, EXIT_REFUSED = 1, 2, 3

REFUSED = ("pipelines.gate.verdict.GateError", "pipelines.replay.compare.NotComparableError")
INPUT = (
    "features.validate.SchemaError",
    "pipelines.ingest.tables.IngestError",
    "pipelines.replay.checks.ReplayInputError",
    "builtins.FileNotFoundError",
    "builtins.ValueError",
)
FAILED = (
    "features.durable.DiskError",
    "features.manifest.ArtifactError",
    "pipelines.execute.InputsChangedError",
    "pipelines.sequential.train.SequentialTrainingError",
    "pipelines.training.telemetry.TelemetryError",
    "pipelines.training.train.TrainingError",
    "pipelines.workspace.WorkspaceBusyError",
    "serving.golden.GoldenError",
    "serving.store.StoreUnavailableError",
    "builtins.TimeoutError",
    "grpc.RpcError",
)


def exit_code(error: Exception) -> int | None:
    """Exit code of a failure that is the user's to mend; None for a bug, which keeps its traceback."""
    for names, code in ((REFUSED, EXIT_REFUSED), (INPUT, EXIT_INPUT), (FAILED, EXIT_FAILED)):
        if _names(error).intersection(names):
            return code
    return None


def message(error: Exception) -> str:
    """One line or a few; what a server answered is told as it said it."""
    answer: Any = error
    if _names(error) >= {"grpc.RpcError", "grpc.Call"}:
        return f"{answer.code().name}: {answer.details()}"
    return f"{type(error).__name__}: {error}"


def _names(error: Exception) -> set[str]:
    """Of its class and all that it is."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
