"""What `patch` keeps on a module: one plain object in its `__dict__`, which owns no tensor."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peftfast.patching.four_bit import Checked
    from peftfast.patching.siblings import Group, Siblings

KEY = "_peftfast"


class State:
    """The record on a module whose class was swapped.

    Copies and pickles carry the settings only: counters start at zero, and siblings are observed
    anew.

    Attributes:
        impl: the implementation asked for, passed to the op at each call.
        memory: the policy by which the op saves tensors for the backward.
        plan: what was found of a part of the model that its fused forward needs, if anything.
        unchecked: why the module was not compared with its own forward when it was patched; ""
            where it was.
        hits: eager calls that the fused op answered.
        shared: those of `hits` whose output an earlier sibling's call had computed.
        delegations: eager calls left to the module's own forward, by reason.
        checked: what was found of the module's 4-bit weight, if it has one.
        siblings: shared by the fused modules of one parent; None where there is only one.
        group, index: the module's place among siblings that read one input, once that was observed.
    """

    def __init__(
        self, impl: str, unchecked: str = "", memory: str = "recompute", plan: Any = None
    ) -> None:
        self.impl = impl
        self.memory = memory
        self.plan = plan
        self.unchecked = unchecked
        self.siblings: Siblings | None = None
        self._start()

    def _start(self) -> None:
        self.hits = 0
        self.shared = 0
        self.delegations: dict[str, int] = {}
        self.checked: Checked | None = None
        self.group: Group | None = None
        self.index = 0
        self._owner: weakref.ref[nn.Module] | None = None

    def owned_by(self, module: nn.Module) -> bool:
        """Whether `module` is the one that this record is on, not a DataParallel replica of it."""
        if self._owner is None:
            self._owner = weakref.ref(module)
        return self._owner() is module

    def delegated(self, reason: str) -> None:
        self.delegations[reason] = self.delegations.get(reason, 0) + 1

    def __getstate__(self) -> dict[str, Any]:
        names = ("impl", "unchecked", "memory", "plan", "siblings")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__dict__.update(settings)
        self._start()


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """The record on a module that could be fused and was not: excluded, or its op differs."""

    reason: str


def state_of(module: nn.Module) -> State | None:
    """The record of a fused module; None where the module is not fused."""
    record = module.__dict__.get(KEY)
    return record if isinstance(record, State) else None


def left_alone(module: nn.Module) -> LeftAlone | None:
    record = module.__dict__.get(KEY)
    return record if isinstance(record, LeftAlone) else None
