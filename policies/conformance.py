"""The conformance suite: runs any policy, also a user's own, through generated worlds and says what it breaks.

`check_policy(policy)` comes back empty for a policy that keeps the contract of `policies.policy`; else it holds one
finding per kind of fault, with the first world in which it showed. Calls of clocks, files and global random numbers
are seen as they are made (`sys.setprofile`); calls that C code makes by itself are not, nor is what depends on the
hash seed of the process. A policy that never returns is not stopped: give the test a timeout.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import gc
import io
import pickle
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType

import numpy as np

from orchestrator.policies.codec import dumps
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import Plan, is_same
from orchestrator.policies.policy import Policy
from orchestrator.policies.sample_fleets import after, fleet_world
from orchestrator.policies.sample_worlds import snapshots
from orchestrator.policies.snapshot import Snapshot

_NUM_AGAIN = 50
"""Worlds that are decided a second time, in reverse, after all others."""
_MINUTES = 14
"""Eight doublings, a pause, a tier, a division: each at most once a minute."""
_EVERY = 4
"""In one of so many worlds time goes on until the policy has to be at rest."""
_CLOCKS = frozenset({"now", "utcnow", "today"})
_SYSTEM = frozenset({"posix", "nt", "_posixsubprocess", "_socket", "select", "mmap"})
_HARMLESS = frozenset({"fspath"})
_BUILTINS = frozenset({"print", "input", "open", "breakpoint"})


class Fault(StrEnum):
    """What a policy can do wrong."""

    RAISES = "raises"
    ILLEGAL = "illegal plan"
    CLOCK = "reads a clock"
    IO = "input or output"
    RANDOM = "random"
    STATE = "hidden state"
    ORDER = "order of trials"
    MUTATES = "changes its argument"
    THRASH = "thrash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of fault of a policy.

    Attributes:
        fault: the kind.
        seed: `snapshot.seed` of the first world in which it showed.
        num_worlds: in how many worlds it showed.
        text: one line on what was seen in that world.
    """

    fault: Fault
    seed: int
    num_worlds: int
    text: str

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.text} (first in the world of seed {self.seed}; {self.num_worlds} worlds)"


def sample(num_fixed: int = 200, num_fleets: int = 50) -> Iterator[Snapshot]:
    """Worlds of trials that stay where they are, then worlds in which some may be placed and resized."""
    yield from snapshots(num_fixed)
    yield from (fleet_world(seed) for seed in range(num_fleets))


def check_policy(
    policy: Policy, worlds: Iterable[Snapshot] | None = None, *, rests: bool = True, minutes: int = _MINUTES
) -> tuple[Finding, ...]:
    """What the policy breaks of the contract, one finding per kind of fault; empty if it conforms.

    Args:
        policy: any object with `decide(snapshot)`.
        worlds: where it is tried; by default `sample()`. A policy that is not made for all of them gets its own choice.
        rests: whether it leaves an unchanged world alone; False for a policy that weighs everything anew each time.
        minutes: decisions, one a minute in which nothing happens, after which a policy that rests changes nothing
            more; 0 leaves this out.
    """
    found: dict[Fault, Finding] = {}
    tried = tuple(sample() if worlds is None else worlds)
    attributes = _attributes(policy)
    answers = []
    for index, world in enumerate(tried):
        answer, problems = _decide(policy, world)
        answers.append(answer)
        if answer is not None:
            problems += _repeats(policy, world, answer)
        if answer is not None and rests and not check(world, answer):
            problems += _thrash(policy, world, answer, minutes if index % _EVERY == 0 else 0)
        _note(found, world, problems)
    for world, answer in reversed(list(zip(tried, answers, strict=True))[:_NUM_AGAIN]):
        if answer is not None and _text(_quiet(policy, world)) != _text(answer):
            _note(found, world, [(Fault.STATE, "after other worlds it decides otherwise in this one")])
    changed = [
        name for name, value in _attributes(policy).items() if name not in attributes or attributes[name] != value
    ]
    if changed and tried:
        _note(found, tried[0], [(Fault.STATE, f"decide changes its attributes {', '.join(sorted(changed))}")])
    return tuple(found[fault] for fault in Fault if fault in found)


_Problems = list[tuple[Fault, str]]


def _note(found: dict[Fault, Finding], world: Snapshot, problems: _Problems) -> None:
    """Keep the first text of each kind, and count worlds."""
    for fault, text in dict(reversed(problems)).items():
        before = found.get(fault)
        if before is None:
            found[fault] = Finding(fault=fault, seed=world.seed, num_worlds=1, text=text)
        else:
            found[fault] = dataclasses.replace(before, num_worlds=before.num_worlds + 1)


def _decide(policy: Policy, world: Snapshot) -> tuple[Plan | None, _Problems]:
    """One decision under watch: what it returned (None if it raised) and what it did beside."""
    before, states = dumps(world), _random_states()
    watch = _Watch()
    try:
        with watch:
            answer = policy.decide(world)
    except Exception as error:
        return None, [*watch.seen, (Fault.RAISES, f"{type(error).__name__}: {error}")]
    problems = list(watch.seen)
    if _random_states() != states:
        problems.append((Fault.RANDOM, "it draws from the global random numbers; allowed: snapshot.seed"))
    if dumps(world) != before:
        problems.append((Fault.MUTATES, "the snapshot is not what it was"))
    violations = check(world, answer)
    if violations:
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        problems.append((Fault.ILLEGAL, f"{violations[0].text}{more}"))
    return answer, problems


def _repeats(policy: Policy, world: Snapshot, answer: Plan) -> _Problems:
    """The same world again, and in another order: the answer has to be the same to the byte."""
    if _text(_quiet(policy, world)) != _text(answer):
        return [(Fault.STATE, "asked twice about the same world it decides otherwise")]
    rng = random.Random(world.seed)
    shuffled = dataclasses.replace(
        world,
        trials=tuple(rng.sample(world.trials, len(world.trials))),
        devices=tuple(rng.sample(world.devices, len(world.devices))),
    )
    if _text(_quiet(policy, shuffled)) != _text(answer):
        return [(Fault.ORDER, "with trials and devices in another order it decides otherwise")]
    return []


def _thrash(policy: Policy, world: Snapshot, first: Plan, minutes: int) -> _Problems:
    """With its plan in force and nothing else changed, the next plan is the same; later, there comes an end."""
    second = _quiet(policy, after(world, first))
    if not isinstance(second, Plan) or not is_same(first, second):
        return [(Fault.THRASH, "in an unchanged world its second plan is not its first")]
    plan = first
    for minute in range(1, minutes + 1):
        world = after(world, plan, seconds=60.0)
        answer = _quiet(policy, world)
        violations = check(world, answer)
        if violations or not isinstance(answer, Plan):
            return [(Fault.ILLEGAL, f"{minute} minutes later: {violations[0].text}")]
        if minute == minutes and not is_same(plan, answer):
            return [(Fault.THRASH, f"after {minutes} minutes in which nothing happened it still changes settings")]
        plan = answer
    return []


def _quiet(policy: Policy, world: Snapshot) -> object:
    """A decision nobody watches; the error where it raised."""
    try:
        return policy.decide(world)
    except Exception as error:
        return error


def _text(answer: object) -> str:
    """The bytes of a plan; of anything else, what it is."""
    try:
        return dumps(answer) if isinstance(answer, Plan) else f"{type(answer).__name__}: {answer}"
    except (ValueError, TypeError, AttributeError) as error:
        return f"no JSON: {error}"


def _attributes(policy: object) -> dict[str, object]:
    """Copies of the policy's attributes, as far as they can be copied."""
    names = set(getattr(policy, "__dict__", ()))
    for kind in type(policy).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names |= {slots} if isinstance(slots, str) else set(slots)
    found = {}
    for name in names:
        try:
            found[name] = copy.deepcopy(getattr(policy, name))
        except Exception:  # not set, or of a kind that cannot be copied
            continue
    return found


def _random_states() -> tuple[object, bytes]:
    """The states of the two global generators of random numbers."""
    return random.getstate(), pickle.dumps(np.random.get_state())


class _Watch:
    """Sees calls into clocks, files, sockets, processes and threads that Python code of this thread makes.

    The garbage collector rests meanwhile: its callbacks, which are others', would be taken for the policy's calls.
    """

    def __init__(self) -> None:
        self.seen: _Problems = []

    def __enter__(self) -> None:
        self._before, self._collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self._on_event)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        if self._collects:
            gc.enable()

    def _on_event(self, frame: FrameType, event: str, arg: object) -> None:
        if event != "c_call":
            return
        fault = _fault_of(arg)
        if fault is not None and not _is_importing(frame):
            module, name = getattr(arg, "__module__", None), getattr(arg, "__name__", "?")
            where = f"line {frame.f_lineno} of {frame.f_code.co_name}"
            self.seen.append((fault, f"{where} calls {f'{module}.' if module else ''}{name}"))


def _fault_of(function: object) -> Fault | None:
    """What a call of a C function means for a policy, None if nothing."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    owner = getattr(function, "__self__", None)
    if module == "time" or (name in _CLOCKS and isinstance(owner, type) and issubclass(owner, datetime.date)):
        return Fault.CLOCK
    if owner is getattr(random.random, "__self__", None) and owner is not None:
        return Fault.RANDOM
    is_file = isinstance(owner, io.IOBase) and not isinstance(owner, io.StringIO | io.BytesIO)
    is_system = module in _SYSTEM and name not in _HARMLESS
    is_builtin = module in {"builtins", "io", "_io"} and name in _BUILTINS
    if is_file or is_system or is_builtin or name in {"start_new_thread", "fromfile", "tofile"}:
        return Fault.IO
    return None


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: what that reads is no input of the policy."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
