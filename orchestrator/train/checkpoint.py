"""Commit a trial's state so that it cannot be half written or silently damaged, and load it on any number of ranks.

A commit is a directory `step-<n>`: tensors as torch's distributed checkpoint (DCP) writes them, one file of generator
state per rank, and `manifest.json` with the size and SHA-256 of every file. `commit` returns once all of it is on disk
under its final name; `load` believes nothing before the manifest is verified (DCP's `.metadata` is a pickle).

DCP is used because it re-shards on load and is quick enough when given flat tensors. Measured on two CPU cores with
132,000 parameters and AdamW state (1.6 MB), medians of 8 in each of two runs: a commit takes 20 ms on one rank
(`no_dist`) and 64-67 ms on two over gloo, a load 20 ms and 67-72 ms, hashing and waiting for the disk included. Own
files of local shards took 6 ms to write and 5 ms to read: not worth owning the re-sharding.

Knows nothing of plans, slots or Ray; the training loop calls it at a step boundary, on every rank. Where there is more
than one rank, `group` must carry Python objects: a gloo group beside the one that trains.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from orchestrator.errors import CheckpointError, DamagedError, NoRoomError
from orchestrator.room import has_room, is_full, words
from orchestrator.train import best, flat_state, manifest, objects
from orchestrator.train.commit_directory import (
    UNFINISHED_NAME,
    commits_in,
    newest,
    newest_whole,
    step_of,
    verified,
    verify,
)
from orchestrator.train.fsdp import local_part
from orchestrator.train.manifest import FileEntry, Manifest

__all__ = ["KEEP_COMMITS", "commit", "commit_files", "load", "newest", "newest_whole", "step_of", "verified", "verify"]

KEEP_COMMITS = 2
"""Commits kept beside the best one: the newest, and the one before in case the newest turns out damaged."""

# DCP names its files `__<rank>_<number>.distcp`; generator state follows as `rng_rank<rank>.pt`.
_TENSOR_FILES = "__{rank}_*.distcp"
_RNG_FILE = "rng_rank{rank}.pt"
_BYTES_PER_FILE, _MAX_FILES = 32 * 2**20, 4
"""A rank's tensors go into so many files at most, each of so many bytes at least: they are written and hashed side by
side, which for one large file takes most of the time of a commit."""
_METADATA_FILE = ".metadata"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The ranks that write or read a checkpoint together."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None

    def gather(self, value: object) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(
        self,
        what: str,
        problem: BaseException | None,
        value: object = None,
        error: type[CheckpointError] = CheckpointError,
    ) -> list[Any]:
        """`value` of every rank, or the same error on every rank where any had a problem: none may go on alone."""
        told = None if problem is None else (_text(problem), isinstance(problem, NoRoomError) or is_full(problem))
        answers = self.gather((told, value))
        found = [(rank, *problem) for rank, (problem, _) in enumerate(answers) if problem is not None]
        if found:
            texts = "; ".join(f"rank {rank}: {text}" for rank, text, _ in found)
            raise (NoRoomError if any(has_no_room for _, _, has_no_room in found) else error)(f"{what}: {texts}")
        return [given for _, given in answers]


def _text(problem: BaseException) -> str:
    return str(problem) if isinstance(problem, CheckpointError | OSError) else f"{type(problem).__name__}: {problem}"


def commit(
    directory: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Path:
    """Make the state after step `extra["step"]` durable as `<directory>/step-<n>`; called by every rank together.

    The newest `KEEP_COMMITS` commits are kept. Commits of later steps belong to a course that was abandoned and are
    removed, as is what unfinished commits left; nothing is removed before the new commit is durable. A second commit
    of the same step with the same `extra` returns the first.

    Args:
        directory: the trial's own directory, shared by all ranks.
        model: its parameters must be finite.
        optimizer: between two steps, with the model's parameters.
        extra: JSON-able; holds `step` and what else the loop needs (sample position, learning-rate state). Only its
            mapping `objects` may hold anything that can be pickled; each rank has its own.
        rank: of this process.
        world_size: ranks that call.
        group: a group of exactly those ranks that carries objects; None for one rank.

    Returns:
        The directory of the commit.

    Raises:
        CheckpointError: on every rank, if any rank could not do its part. Nothing was committed then.
    """
    ranks = _Ranks(rank, world_size, group)
    proposal, pickled = None, b""
    problem: BaseException | None = None
    try:
        plain = {name: value for name, value in extra.items() if name != "objects"}
        pickled = objects.pickled(extra.get("objects", {}))
        proposal = _propose(directory, model, optimizer, plain, is_first=rank == 0)
    except (CheckpointError, OSError) as error:
        problem = _without_room(error, directory, 0)
    own_draft = None if proposal is None else proposal.draft
    try:
        draft = ranks.agree(f"cannot commit to {directory}", problem, own_draft)[0]
        assert proposal is not None  # a rank without one had a problem
        final = directory / f"step-{proposal.extra['step']}"
        if draft is None:
            return final
        record = Manifest(
            schema=manifest.SCHEMA,
            step=proposal.extra["step"],
            world_size=world_size,
            torch_version=str(torch.__version__),
            extra=proposal.extra,
            tensors=proposal.described,
            files=_write_parts(draft, proposal.tensors, pickled, ranks),
        )
        _finish(draft, final, record, ranks)
    except CheckpointError:
        if own_draft is not None:
            shutil.rmtree(own_draft, ignore_errors=True)
        raise
    return final


def commit_files(directory: Path, write: Callable[[Path], None], extra: Mapping[str, Any], num_bytes: int = 0) -> Path:
    """Make files of any kind durable as the commit `<directory>/step-<n>`; called by one rank. Retention as `commit`.

    Args:
        directory: the trial's own directory of commits.
        write: writes them into the folder that it is given, in folders too.
        extra: JSON-able; holds `step` and what else a later attempt needs.
        num_bytes: how many that is about: an error that hides that the disk is full is told from others by it.

    Raises:
        NoRoomError: there is no room on the disk. Nothing was committed then.
        CheckpointError: it could not be written, neither.
    """
    kept: dict[str, Any] = json.loads(manifest.canonical(dict(extra)))
    final = directory / f"step-{_step_of(kept)}"
    draft = None
    try:
        draft = _make_draft(final)
        write(draft)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        manifest.sync_files(files)
        for folder in {path.parent for path in files}:
            manifest.sync_directory(folder)
        record = Manifest(
            schema=manifest.SCHEMA,
            step=kept["step"],
            world_size=1,
            torch_version=str(torch.__version__),
            extra=kept,
            tensors={},
            files=tuple(manifest.describe(path, draft) for path in files),
        )
        _finish(draft, final, record, _Ranks(0, 1, None))
    except (CheckpointError, OSError, RuntimeError) as error:  # `torch.save` raises the last of a full disk
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        problem = _without_room(error, final, num_bytes)
        kind = NoRoomError if isinstance(problem, NoRoomError) else CheckpointError
        raise kind(f"cannot commit to {final}: {problem}") from error
    return final


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proposal:
    """What a rank brings to a commit; `draft` is where to write, from rank 0 only and None if there is no need."""

    extra: dict[str, Any]
    tensors: dict[str, Tensor]
    described: dict[str, Any]
    draft: Path | None


def _propose(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any], *, is_first: bool
) -> _Proposal:
    """Check everything that could make this rank refuse, before anything is written.

    Raises:
        CheckpointError: it refuses.
    """
    final = directory / f"step-{_step_of(extra)}"
    kept: dict[str, Any] = json.loads(manifest.canonical(dict(extra)))
    _refuse_non_finite(model)
    tensors, described = flat_state.flatten(model, optimizer)
    manifest.canonical(described)
    draft = _make_draft(final) if is_first and not _is_committed(final, kept) else None
    return _Proposal(extra=kept, tensors=tensors, described=described, draft=draft)


def load(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """Load a commit into `model` and `optimizer` in place, on any number of ranks; called by every rank together.

    Where it is damaged, the newest whole one before it in the same directory is loaded, and the log says what that
    costs. Generators are restored where the commit has a state of this rank number. A model that raised while loading
    may be half loaded: build it anew.

    Returns:
        The `extra` of the commit, with its `objects`; those of rank 0 where it has none of this rank.

    Raises:
        CheckpointError: on every rank, if it does not fit.
        DamagedError: on every rank, if the commit and all before it are damaged.
    """
    ranks = _Ranks(rank, world_size, group)
    what = f"cannot load {path}"
    problem: BaseException | None = None
    chosen = None
    try:
        chosen = newest_whole(path) if rank == 0 else None
    except CheckpointError as error:
        problem = error
    path, record = ranks.agree(what, problem, chosen, DamagedError)[0]
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    try:
        tensors, state = flat_state.targets(model, optimizer, record.tensors)
    except CheckpointError as error:
        problem = error
    ranks.agree(what, problem)
    try:
        with _quiet_about_one_process():
            load_tensors(tensors, storage_reader=FileSystemReader(path), process_group=group, no_dist=world_size == 1)
        flat_state.load_optimizer(model, optimizer, state, record.tensors)
        found = objects.read(path, {entry.name for entry in record.files}, rank)
        _restore_generators(path, record, rank)
    except (CheckpointError, CheckpointException, OSError, RuntimeError, ValueError) as error:
        problem = error
    ranks.agree(what, problem)
    return {**record.extra, **({"objects": found} if found else {})}


@contextmanager
def _quiet_about_one_process() -> Iterator[None]:
    """Silence DCP's warning that it works for one process: that is what was asked of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        yield


def _step_of(extra: Mapping[str, Any]) -> int:
    """The step in `extra`, checked."""
    step = extra.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
        raise CheckpointError(f"extra['step']={step!r} names no commit; allowed: an integer >= 0; pass the steps done")
    return step


def _refuse_non_finite(model: nn.Module) -> None:
    name = flat_state.first_non_finite(model)
    if name is not None:
        raise CheckpointError(
            f"parameter {name!r} is not finite; allowed: finite parameters; go back to the last commit"
        )


def _is_committed(final: Path, extra: dict[str, Any]) -> bool:
    """Whether `final` is a good commit of the same state already."""
    return final.exists() and not verify(final) and manifest.read(final).extra == extra


def _make_draft(final: Path) -> Path:
    """A new directory beside `final` to write in, on the same file system so that it can be renamed."""
    directory = final.parent
    if not directory.is_dir():
        directory.mkdir(parents=True)
        manifest.sync_directory(directory.parent)
    draft = directory / f"{final.name}.tmp-{uuid.uuid4().hex[:12]}"
    draft.mkdir()
    return draft


def _write_parts(draft: Path, tensors: dict[str, Tensor], pickled: bytes, ranks: _Ranks) -> tuple[FileEntry, ...]:
    """Write this rank's part of every file, durable, and gather what all ranks wrote."""
    problem: BaseException | None = None
    entries: list[FileEntry] = []
    try:
        num_files = _num_files(tensors)  # a thread each; that all are finite was read back, so no kernel is under way
        writer = FileSystemWriter(draft, sync_files=False, thread_count=num_files)
        with _quiet_about_one_process():
            save_tensors(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world_size == 1)
        rng = draft / _RNG_FILE.format(rank=ranks.rank)
        buffer = io.BytesIO()
        torch.save(flat_state.capture_generators(), buffer)
        rng.write_bytes(buffer.getvalue())
        own = [*draft.glob(_TENSOR_FILES.format(rank=ranks.rank)), rng]
        if pickled:
            own.append(draft / objects.FILE.format(rank=ranks.rank))
            own[-1].write_bytes(pickled)
        if ranks.rank == 0:
            own.append(draft / _METADATA_FILE)
        # Waiting for the disk and hashing what lies in memory by now go on side by side.
        with ThreadPoolExecutor(num_files + 1) as pool:
            synced = pool.submit(manifest.sync_files, own)
            entries = list(pool.map(manifest.describe, own))
            synced.result()
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        problem = _without_room(error, draft, _num_bytes(tensors) * ranks.world_size)
    gathered = ranks.agree(f"cannot write {draft}", problem, entries)
    return tuple(sorted((entry for part in gathered for entry in part), key=lambda entry: entry.name))


def _num_files(tensors: Mapping[str, Tensor]) -> int:
    """How many files this rank's tensors are worth, on the cores it may use."""
    return max(1, min(_MAX_FILES, len(os.sched_getaffinity(0)), _num_bytes(tensors) // _BYTES_PER_FILE))


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of this rank's part of the tensors."""
    local = map(local_part, tensors.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _without_room(error: BaseException, draft: Path, needed_bytes: int) -> BaseException:
    """An error of writing, or that there is no room: torch's writer of tensors hides why the disk refused them."""
    if isinstance(error, CheckpointError) and not is_full(error):
        return error
    if is_full(error) or not has_room(draft.parent, needed_bytes):
        return NoRoomError(words(draft.parent, needed_bytes))
    return error


def _finish(draft: Path, final: Path, record: Manifest, ranks: _Ranks) -> None:
    """Write the manifest, give the draft its final name, and clear away what it replaces."""
    problem: BaseException | None = None
    if ranks.rank == 0:
        try:
            manifest.write_synced(draft / manifest.MANIFEST_NAME, manifest.encode(record))
            manifest.sync_directory(draft)
            if final.exists():
                final.rename(final.parent / f"{final.name}.old-{uuid.uuid4().hex[:12]}")
            draft.rename(final)
            manifest.sync_directory(final.parent)
        except (CheckpointError, OSError) as error:
            problem = _without_room(error, draft, 0)
        else:
            _clear_away(final, record.step)
    ranks.agree(f"cannot commit {final}", problem)


def _clear_away(final: Path, step: int) -> None:
    """Remove unfinished commits, commits of later steps, and all but the newest `KEEP_COMMITS` and the best one."""
    directory = final.parent
    commits = sorted(commits_in(directory), reverse=True)
    behind = [path for number, path in commits if number <= step]
    found = best.read(directory)
    kept = {*behind[:KEEP_COMMITS], *(path for path in behind if found is not None and path.name == found.commit)}
    unfinished = [path for path in directory.iterdir() if UNFINISHED_NAME.fullmatch(path.name)]
    for path in [*(path for _, path in commits if path not in kept), *unfinished]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            # The commit itself is safe; the next one tries again.
            _log.warning("checkpoint.not_removed %s: %s", path, error)


def _restore_generators(path: Path, record: Manifest, rank: int) -> None:
    """Restore this rank's generators where the commit has them."""
    name = _RNG_FILE.format(rank=rank)
    if any(entry.name == name for entry in record.files):
        flat_state.restore_generators(torch.load(path / name, weights_only=True, map_location="cpu"))
