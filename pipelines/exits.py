"""What a command that failed says, and the exit code that scripts read: 1 it failed, 2 mend the input, 3 it refused."""

from __future__ import annotations

EXIT_FAILED, EXIT_INPUT, EXIT_REFUSED = 1, 2, 3


def exit_code(error: Exception) -> int | None:
    """Exit code of a failure that is the user's to mend; None for a bug, which keeps its traceback."""
    import grpc

    from features.artifacts import ArtifactError
    from features.durable import DiskError
    from features.validate import SchemaError
    from pipelines.execute import InputsChangedError
    from pipelines.gate import GateError
    from pipelines.ingest import IngestError
    from pipelines.replay.checks import ReplayInputError
    from pipelines.replay.compare import NotComparableError
    from pipelines.sequential.train import SequentialTrainingError
    from pipelines.training.telemetry import TelemetryError
    from pipelines.training.train import TrainingError
    from pipelines.workspace import WorkspaceBusyError
    from serving.golden import GoldenError
    from serving.store import StoreUnavailableError

    if isinstance(error, (GateError, NotComparableError)):
        return EXIT_REFUSED
    if isinstance(error, (SchemaError, IngestError, ReplayInputError, FileNotFoundError, ValueError)):
        return EXIT_INPUT
    failures = (
        ArtifactError,
        DiskError,
        GoldenError,
        StoreUnavailableError,
        TrainingError,
        InputsChangedError,
        WorkspaceBusyError,
        TimeoutError,
        SequentialTrainingError,
        TelemetryError,
        grpc.RpcError,
    )
    return EXIT_FAILED if isinstance(error, failures) else None


def message(error: Exception) -> str:
    """One line or a few; what a server answered is told as it said it."""
    import grpc

    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
