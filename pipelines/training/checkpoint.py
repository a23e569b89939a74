"""Checkpoints of a training run: tensors by torch.distributed.checkpoint, position and history as JSON beside them.

    FOLDER/step-000000400/{*.distcp, .metadata, cursor.json}    FOLDER/kept.json names the last and the k best

A checkpoint appears under its name only when complete, and counts once `kept.json` names it. Any number of workers may
read it: every tensor is stored under its unsharded name and shape. It is written from a copy while training goes on,
where memory holds one. It is the trainer's own, local and trusted: what serving reads is exported.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import psutil
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipelines.training.cursor import Cursor
from pipelines.training.learner import NonFiniteStateError
from pipelines.training.snapshot import Snapshot, Tensors, held, held_bytes
from pipelines.training.workers import told_by_workers

ONE_FILE_BYTES = 2**30
"""State of a worker up to which its part of a checkpoint is one file: the writer keeps a copy of every shard until its
file is complete, so large ones get a file each."""
COPY_SHARE = 1 / 4
"""Of the free memory, which a copy of the state may take."""


DISK_REFUSALS = frozenset({errno.ENOSPC, errno.EROFS, errno.EDQUOT})
"""Full, read-only, over quota."""


class CheckpointError(RuntimeError):
    """Training state or a model could not be written; what was there before is intact."""

    @classmethod
    def of(cls, what: str, folder: Path, reason: object, intact: str) -> CheckpointError:
        """Says where, why, what is left and what to do."""
        free_mib = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 2**20
        return cls(
            f"{what} could not be written to {folder}: {reason}. {free_mib:,.0f} MiB are free there. {intact}. "
            "Make room or make the folder writable, and run the same command again: it goes on from there"
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """The checkpoints that count, by name."""

    last: str
    best: tuple[tuple[str, float], ...]
    """Those of the least validation losses, with these; the best first."""


class Checkpoints:
    """The last and the best checkpoints of a run; `save`, `load`, `wait` and the end of the `with` block are for all
    workers together."""

    def __init__(self, folder: Path, *, keep_best: int = 1, background: bool | None = None) -> None:
        self.folder, self.keep_best, self._background = folder, keep_best, background
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """The write under way is completed, also after an error; what it meets then is not the first error."""
        try:
            self.wait()
        except Exception:
            if failed is None:
                raise
        finally:
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def save(self, tensors: Tensors, cursor: Cursor) -> None:
        """Write the state: in the background, where this worker and all others have room for a copy. First waits for
        the write under way. Raises CheckpointError or NonFiniteStateError, for a background write at the next call of
        any method."""
        self.wait()
        if self._group is None:  # its own: collectives of two threads in one group would meet each other's
            self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        if self._background is None:
            self._background = all(told_by_workers(_room_for_copy(held_bytes(tensors)), self._group))
        if self._background:
            self._writing = self._thread.submit(self._write, self._snapshot.take(tensors), cursor)
        else:
            self._write(tensors, cursor)

    def check(self) -> None:
        """Raise what a background write has met, without waiting for one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until no write is under way; raises what it met."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def kept(self) -> Kept | None:
        """What counts; None before the first checkpoint."""
        file = self.folder / "kept.json"
        if not file.exists():
            return None
        fields = json.loads(file.read_text())
        return Kept(fields["last"], tuple((name, loss) for name, loss in fields["best"]))

    def find(self, which: Literal["last", "best"]) -> Path | None:
        """Folder of the last or the best checkpoint; None where there is none."""
        kept = self.kept()
        if kept is None:
            return None
        if which == "last":
            return self.folder / kept.last
        return self.folder / kept.best[0][0] if kept.best else None

    def load(self, checkpoint: Path, tensors: Tensors) -> None:
        """Fill a learner's tensors in place, whatever their sharding was when saved; the checkpoint may be another
        run's with tables and layers of the same shapes."""
        load(dict(tensors), checkpoint_id=checkpoint)

    def clear(self) -> None:
        """Forget everything; called by all workers together."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        dist.barrier()

    def _write(self, tensors: Tensors, cursor: Cursor) -> None:
        """Beside, then rename, then name it in kept.json, then drop what that names no more."""
        name = f"step-{cursor.steps_done:09d}{'-end' if cursor.epoch_just_closed else ''}"
        beside = self.folder / f".{name}.partial"
        try:
            self._each_does(lambda: _require_finite(tensors))
            self._first_does(lambda: _fresh(beside))
            one_file = held_bytes(tensors) < ONE_FILE_BYTES
            save(
                dict(tensors),
                storage_writer=FileSystemWriter(beside, single_file_per_rank=one_file),
                process_group=self._group,
            )
            self._first_does(lambda: self._commit(beside, name, cursor))
        except (CheckpointException, OSError) as failed:
            if dist.get_rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
            kept = self.kept()
            intact = "No checkpoint came before" if kept is None else f"The checkpoint before, {kept.last}, is intact"
            raise CheckpointError.of(f"checkpoint {name}", self.folder, _reason(failed), intact) from failed

    def _commit(self, beside: Path, name: str, cursor: Cursor) -> None:
        _write_synced(beside / "cursor.json", cursor.to_json())
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a run that died before kept.json named it
        beside.rename(self.folder / name)
        before, closed = self.kept(), cursor.epoch_just_closed
        best = [] if before is None else [entry for entry in before.best if entry[0] != name]
        if closed is not None:
            best = sorted([*best, (name, closed.validation_loss)], key=lambda entry: entry[1])[: self.keep_best]
        now = self.folder / ".kept.partial"
        _write_synced(now, json.dumps(asdict(Kept(name, tuple(best)))))
        os.replace(now, self.folder / "kept.json")
        _sync(self.folder)
        named = {name, *(other for other, _ in best)}
        for folder in [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]:
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _first_does(self, action: Callable[[], None]) -> None:
        """The first worker alone; what it meets is raised by all."""
        self._each_does(action if dist.get_rank() == 0 else lambda: None)

    def _each_does(self, action: Callable[[], None]) -> None:
        met: Exception | None = None
        try:
            action()
        except (OSError, NonFiniteStateError) as error:
            met = error
        for error in told_by_workers(met, self._group):
            if error is not None:
                raise error


def _require_finite(tensors: Tensors) -> None:
    """A sum is NaN or infinite if any number is: one pass over memory, beside training."""
    bad = sorted({name for name, tensor in held(tensors) if not torch.isfinite(tensor.sum(dtype=torch.float32))})
    if bad:
        raise NonFiniteStateError(
            f"{', '.join(bad[:5])} ({len(bad)} tensors) hold NaN or infinity: not checkpointed. The checkpoint before "
            "is from before that; lower lr_sparse or lr_dense and start over from it"
        )


def _room_for_copy(size_bytes: int) -> bool:
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return size_bytes * workers_here <= COPY_SHARE * psutil.virtual_memory().available


def _reason(failed: BaseException) -> str:
    """The cause in one line; torch gathers what each worker met, and says of a full disk that a write failed."""
    causes = [cause for cause, _ in failed.failures.values()] if isinstance(failed, CheckpointException) else [failed]
    cause = next((c for c in causes if isinstance(c, OSError)), causes[0])
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_synced(file: Path, text: str) -> None:
    with file.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
