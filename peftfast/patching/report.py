"""`report`: every tuner layer, 4-bit linear, bottleneck and part around them, fused with which op,
or not and why.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from torch import nn

from peftfast.patching.state import State, left_alone
from peftfast.patching.survey import Candidate, claimed_children, require_module, survey

_WIDTH = 160
_BESIDE_PATH = 110  # columns that the rest of a row needs


@dataclasses.dataclass(frozen=True)
class FusedModule:
    """A module that runs a fused op.

    Attributes:
        path: its name in the model.
        op: the op of `peftfast.ops`.
        impl: the implementation asked for.
        memory: the policy by which tensors are saved for the backward.
        siblings: the paths of the modules computed in one call with it, in the order of their
            calls; empty where there are none, or none were observed yet.
        hits: eager calls that the fused op answered (compiled calls are not counted).
        delegations: eager calls left to the layer's own forward, by reason.
        note: what else to know: not compared with its own forward, or siblings given up; "" as a
            rule.
    """

    path: str
    op: str
    impl: str
    memory: str
    siblings: tuple[str, ...]
    hits: int
    delegations: dict[str, int]
    note: str


@dataclasses.dataclass(frozen=True)
class NotFusedModule:
    """A module that runs its own forward, and why."""

    path: str
    type: str
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `report` found.

    `str()` is a table; modules that differ in layer numbers only share a row.
    """

    fused: list[FusedModule]
    not_fused: list[NotFusedModule]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        paths = [e.path for e in self.fused] + [e.path for e in self.not_fused]
        longest = max(map(len, paths), default=0)
        width = max(_WIDTH, longest + _BESIDE_PATH)
        console = Console(
            file=text, width=width, color_system=None, markup=False, highlight=False, emoji=False
        )
        for table in (_fused_table(self.fused), _not_fused_table(self.not_fused)):
            if table is not None:
                console.print(table)
        if not self.fused and not self.not_fused:
            console.print("No PEFT tuner layer, no 4-bit linear and no bottleneck in this model.")
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def report(model: nn.Module) -> PatchReport:
    """Which modules of `model` are fused, and why others are not.

    Args:
        model: any module; its PEFT tuner layers and the attention modules with a prefix of PEFT's
            are listed, patched or not, the linears of bitsandbytes that no tuner layer is on,
            bottleneck adapters, and, where a LoRA layer, a prefix or a bottleneck can be fused, the
            norms, gated MLPs, activations, dropouts and attention modules around.

    Raises:
        TypeError: `model` is not a module.
    """
    candidates = survey(require_module(model))
    paths = {id(candidate.module): candidate.path for candidate in candidates}
    patched = any(candidate.state is not None for candidate in candidates)
    plans = {c.path: c.state.plan for c in candidates if c.state is not None}
    claimed = claimed_children(candidates, plans)
    fused, not_fused = [], []
    for candidate in candidates:
        if candidate.path in claimed:
            continue
        if candidate.state is not None and candidate.handler is not None:
            fused.append(_fused(candidate, candidate.state, candidate.op, paths))
        else:
            kind = f"{type(candidate.module).__module__}.{type(candidate.module).__qualname__}"
            not_fused.append(NotFusedModule(candidate.path, kind, _reasons(candidate, patched)))
    if any(candidate.is_method and candidate.fusable for candidate in candidates):
        from peftfast.patching import head

        memory = next((entry.memory for entry in fused), "recompute")
        with_loss, without = head.entries(model, memory)
        fused += with_loss
        not_fused += without
    return PatchReport(fused, not_fused)


def _fused(candidate: Candidate, state: State, op: str, paths: dict[int, str]) -> FusedModule:
    notes = [f"not compared with its own forward: {state.unchecked}"] if state.unchecked else []
    siblings: tuple[str, ...] = ()
    if state.group is not None and state.group.stopped:
        notes.append(f"siblings given up: {state.group.stopped}")
    elif state.group is not None and state.group.calls:
        members = [ref() for ref in state.group.members]
        siblings = tuple(paths.get(id(m), "(outside this model)") for m in members if m is not None)
    return FusedModule(
        candidate.path,
        op,
        state.impl,
        state.memory,
        siblings,
        state.hits,
        dict(state.delegations),
        "; ".join(notes),
    )


def _reasons(candidate: Candidate, patched: bool) -> tuple[str, ...]:
    if candidate.unsupported:
        return candidate.unsupported
    record = left_alone(candidate.module)
    reasons = () if record is None else (record.reason,)
    if reasons or candidate.obstacles:
        return reasons + candidate.obstacles
    return (
        ("added after patch; call peftfast.patch again",)
        if patched
        else ("peftfast.patch was not called",)
    )


def _fused_table(entries: list[FusedModule]) -> Any:
    if not entries:
        return None
    columns = ("module", "count", "op", "impl", "with siblings", "ran", "not run", "note")
    policies = ", ".join(dict.fromkeys(repr(entry.memory) for entry in entries))
    table = _table(f"fused ({len(entries)}), memory={policies}", columns)

    def alike(entry: FusedModule) -> Hashable:
        names = tuple(entry.delegations)
        how = entry.op, entry.impl, entry.memory
        return _masked(entry.path), *how, _names(entry), names, entry.note

    for group in _grouped(entries, alike):
        first = group[0]
        left = {reason: sum(e.delegations[reason] for e in group) for reason in first.delegations}
        table.add_row(
            _heading(group),
            str(len(group)),
            first.op,
            first.impl,
            _names(first),
            str(sum(entry.hits for entry in group)),
            "\n".join(f"{count}: {reason}" for reason, count in left.items()),
            first.note,
        )
    return table


def _not_fused_table(entries: list[NotFusedModule]) -> Any:
    if not entries:
        return None
    table = _table(f"not fused ({len(entries)})", ("module", "count", "type", "why"))
    for group in _grouped(entries, lambda entry: (_masked(entry.path), entry.type, entry.reasons)):
        first = group[0]
        table.add_row(_heading(group), str(len(group)), first.type, "\n".join(first.reasons))
    return table


def _table(title: str, columns: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        number = column in ("count", "ran")
        table.add_column(
            column,
            overflow="fold",
            justify="right" if number else "left",
            no_wrap=column == "module",
        )
    return table


Entry = TypeVar("Entry", FusedModule, NotFusedModule)


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[list[Entry]]:
    groups: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _heading(group: list[Any]) -> str:
    path = group[0].path
    return (path if len(group) == 1 else _masked(path)) or "(the model itself)"


def _masked(path: str) -> str:
    """The path with its numbers masked: the same for corresponding modules of a model's layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _names(entry: FusedModule) -> str:
    return " + ".join(path.rpartition(".")[2] for path in entry.siblings)
