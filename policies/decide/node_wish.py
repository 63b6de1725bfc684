"""Which nodes are worth their price: how many of each type the cluster should have, one more or one fewer at a time.

What a node brings is counted in goodput: `Worth` says what all trials together make of so many nodes of each type. A
node is asked for when its goodput per price is at least `min_return` of that of the best first node, and let go when it
is clearly less, so that a wish neither grows with what it has already nor flickers. A cheaper node that could do the
work of a dearer one is asked for too, and the dearer goes once it is there. Nothing is asked for beyond the budget.
Used by policies; knows nothing of how nodes are asked for. `policies.decide.node_worth` says what nodes are worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from orchestrator.policies.plan import NodeWish
from orchestrator.policies.snapshot import NodeType, Snapshot

SLACK = 0.2
"""A node is let go at this much less than what it takes to ask for it."""
_LEAST = 0.05
"""A free node has to bring this part of what it would alone; a smaller gain is none that anybody could measure."""
_MAX_STEPS = 64
_EPSILON = 1e-9


class Worth(Protocol):
    """What nodes are worth to the trials of a snapshot."""

    def of(self, counts: Mapping[str, int]) -> float:
        """Goodput of all trials with so many nodes of each type beside the nodes that are of none, in speed-ups."""
        ...

    def alone(self, node_type: NodeType) -> float:
        """The same with one node of that type and nothing else."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTerms:
    """When a node is worth its price.

    Attributes:
        min_return: goodput per price of a node over that of the best first node, from which on it is asked for.
        cooldown_s: seconds after a change in which the number of nodes of a type does not change the other way.
    """

    min_return: float = 0.5
    cooldown_s: float = 120.0


def wishes(snapshot: Snapshot, worth: Worth, terms: NodeTerms) -> tuple[NodeWish, ...]:
    """A wish per type of node, in the order of the snapshot."""
    if not snapshot.node_types:
        return ()
    round_ = _Round(snapshot, worth, terms)
    round_.keep_to_the_budget()
    round_.ask()
    round_.let_go()
    return tuple(round_.wish(node_type) for node_type in snapshot.node_types)


class _Round:
    """One decision on nodes."""

    def __init__(self, snapshot: Snapshot, worth: Worth, terms: NodeTerms) -> None:
        self._types = {node_type.name: node_type for node_type in snapshot.node_types}
        self._worth, self._terms, self._now_s = worth, terms, snapshot.now_s
        self._budget = math.inf if snapshot.max_cost_per_hour is None else snapshot.max_cost_per_hour
        self._before = {wish.node_type: wish for wish in snapshot.plan.nodes}
        self.counts = {name: min(each.max_nodes, self._start(each)) for name, each in self._types.items()}
        self._first = dict(self.counts)
        self._alone = {name: worth.alone(each) for name, each in self._types.items()}
        paid = [
            self._alone[name] / each.price_per_hour
            for name, each in self._types.items()
            if each.price_per_hour and (each.max_nodes or each.nodes)
        ]
        self._best = max(paid, default=0.0)
        self._value = worth.of(self.counts)
        self._reasons: dict[str, str] = {}

    def keep_to_the_budget(self) -> None:
        """Let go of what costs too much, the least useful first, whatever has changed a moment ago."""
        while self._cost(self.counts) > self._budget + _EPSILON:
            paid = [name for name, each in self._types.items() if self.counts[name] and each.price_per_hour]
            name = min(paid, key=lambda each: (self._loss(each) / self._types[each].price_per_hour, each))
            cost = self._cost(self.counts)
            self._step(name, -1)
            self._reasons[name] = f"lets go, {cost:g} an hour is more than the budget of {self._budget:g}"

    def ask(self) -> None:
        """Ask for nodes while one more of some type is worth it, the best return first."""
        for _ in range(_MAX_STEPS):
            options = [(self._return(name, self._gain(name)), name) for name in self._types if self._may(name, +1)]
            worthy = [(ratio, name) for ratio, name in options if ratio >= 1]
            if not worthy:
                self._ask_for_a_cheaper_one()
                return
            best = max(ratio for ratio, _ in worthy)
            # At the same return one that stays is better than one that may be taken away.
            close = [name for ratio, name in worthy if ratio >= best * (1 - _EPSILON)]
            name = min(close, key=lambda each: (self._types[each].is_spot, each))
            gain = self._gain(name)
            self._step(name, +1)
            self._reasons[name] = f"asks for {self.counts[name]}: {self._words(name, gain)}"

    def _ask_for_a_cheaper_one(self) -> None:
        """Ask for a node that could do the work of a dearer one."""
        best: tuple[float, str, str] | None = None
        for dear, cheap in itertools.permutations(self._types, 2):
            saved = self._types[dear].price_per_hour * (1 - SLACK) - self._types[cheap].price_per_hour
            if saved <= 0 or not self.counts[dear] or not self._may(cheap, +1):
                continue
            without = {**self.counts, dear: self.counts[dear] - 1}
            instead = {**without, cheap: without[cheap] + 1}
            enough = self._value * (1 - _LEAST)
            is_needed = self._worth.of(without) < enough  # else the dearer one can go at once
            if is_needed and self._worth.of(instead) >= enough and (best is None or saved > best[0]):
                best = (saved, cheap, dear)
        if best is not None:
            _, cheap, dear = best
            self._step(cheap, +1)
            price = f"{self._types[cheap].price_per_hour:g} an hour instead of {self._types[dear].price_per_hour:g}"
            self._reasons[cheap] = f"asks for {self.counts[cheap]}: it does the work of one {dear} for {price}"

    def let_go(self) -> None:
        """Let go of nodes whose goodput is not worth their price, the worst return first."""
        for _ in range(_MAX_STEPS):
            options = []
            for name, each in self._types.items():
                if not self._may(name, -1) or not each.price_per_hour or self._replaces_a_dearer_one(name):
                    continue
                loss = self._loss(name)
                # What is left counts too: better a poor return than none, until something better is there.
                if (self._left(name) > 0 or self._value <= 0) and self._return(name, loss) < 1 - SLACK:
                    options.append((self._return(name, loss), name, loss))
            if not options:
                return
            _, name, loss = min(options)
            self._step(name, -1)
            self._reasons[name] = f"keeps {self.counts[name]}: {self._words(name, loss)}"

    def wish(self, node_type: NodeType) -> NodeWish:
        """What came of it for one type."""
        name, before = node_type.name, self._before.get(node_type.name)
        count, old = self.counts[name], self._first[name]
        is_same = before is not None and before.num_nodes == count
        return NodeWish(
            node_type=name,
            num_nodes=count,
            cost_per_hour=count * node_type.price_per_hour,
            reason=self._reasons.get(name) or self._rest(name),
            since_s=before.since_s if before is not None and is_same else self._now_s,
            grows=before.grows if before is not None and is_same else count >= old,
        )

    def _start(self, node_type: NodeType) -> int:
        """Nodes wished for so far: those of the plan in force, or else those that are there."""
        before = self._before.get(node_type.name)
        return len(node_type.nodes) if before is None else before.num_nodes

    def _cost(self, counts: Mapping[str, int]) -> float:
        return math.fsum(counts[name] * each.price_per_hour for name, each in self._types.items())

    def _may(self, name: str, step: int) -> bool:
        """Whether there may be one more or one fewer of a type, apart from what it is worth."""
        if not 0 <= self.counts[name] + step <= self._types[name].max_nodes:
            return False
        if step > 0 and self._cost(self.counts) + self._types[name].price_per_hour > self._budget + _EPSILON:
            return False
        before = self._before.get(name)
        if before is None:
            return step > 0  # what is there at first stays for a while: not all trials may have come yet
        turns = before.grows != (step > 0) or (self.counts[name] - self._first[name]) * step < 0
        return not turns or self._now_s - before.since_s >= self._terms.cooldown_s

    def _step(self, name: str, step: int) -> None:
        self.counts[name] += step
        self._value = self._worth.of(self.counts)

    def _replaces_a_dearer_one(self, name: str) -> bool:
        """Whether it is rather a dearer node that is not needed, now or once this one is there."""
        price, enough = self._types[name].price_per_hour, self._value * (1 - _LEAST)
        return any(
            self.counts[dear] > 0
            and each.price_per_hour * (1 - SLACK) > price
            and self._worth.of({**self.counts, dear: self.counts[dear] - 1}) >= enough
            for dear, each in self._types.items()
        )

    def _gain(self, name: str) -> float:
        return self._worth.of({**self.counts, name: self.counts[name] + 1}) - self._value

    def _loss(self, name: str) -> float:
        """What one node fewer takes away."""
        return self._worth.of(self._basis(name)) - self._left(name)

    def _left(self, name: str) -> float:
        """What is left with one node fewer."""
        basis = self._basis(name)
        return self._worth.of({**basis, name: basis[name] - 1})

    def _basis(self, name: str) -> dict[str, int]:
        """The nodes against which one of a type is weighed: where it is there, those that are there as well."""
        if self.counts[name] > len(self._types[name].nodes):
            return self.counts
        return {key: min(count, len(self._types[key].nodes)) for key, count in self.counts.items()}

    def _return(self, name: str, gained: float) -> float:
        """What a node of a type brings over what it has to; at least 1 is worth it."""
        price = self._types[name].price_per_hour
        needed = price * self._best * self._terms.min_return if price else self._alone[name] * _LEAST
        if not needed > 0 or not gained > 0:
            return 0.0
        return gained / needed

    def _words(self, name: str, gained: float) -> str:
        """What one node brings, in words."""
        price = self._types[name].price_per_hour
        if not price or not self._best:
            return f"the last brings {gained:.2f} speed-ups at {price:g} an hour"
        ratio = gained / price / self._best
        return f"the last brings {gained:.2f} speed-ups at {price:g} an hour, {ratio:.2f} of the best return"

    def _rest(self, name: str) -> str:
        """Why the number of nodes of a type is what it was."""
        count, each = self.counts[name], self._types[name]
        if count == each.max_nodes:
            return f"wants {count}, the most there may be"
        gain = self._gain(name)
        if self._return(name, gain) < 1:
            part = f"{gain / each.price_per_hour / self._best:.2f}" if each.price_per_hour and self._best else "0.00"
            return f"wants {count}: one more would bring {gain:.2f} speed-ups, {part} of the best return"
        if self._cost(self.counts) + each.price_per_hour > self._budget + _EPSILON:
            return f"wants {count}: one more would cost {each.price_per_hour:g} an hour, beyond {self._budget:g} in all"
        return f"wants {count}: another is worth it, but the number changed less than {self._terms.cooldown_s:g} s ago"
