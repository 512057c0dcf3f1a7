"""Siblings: fused modules of one parent that read one input (q, k, v; gate, up), computed in one
call of the op.

They are not known by name. Each parent's fused modules are observed: those that were called in a
row with the same tensor object form a group, and from then on the first member's call computes
every member's output and the others hand theirs out. Before an output is handed out, everything
that went into it is checked again: the identity and version of the input and of every parameter,
scaling and dropout, grad mode and autocast. At the first difference the module computes its own,
and the group is given up.

An output waits only while it can still be asked for: until it is handed out, until the first
member's next call, or until nothing that was computed from the first member's output is left (an
exception unwound the forward), whichever comes first.

Computing alone and computing as a group save different tensors and draw different dropout seeds, so
a checkpoint's recomputation must go the way its forward went. That way therefore changes only
outside of a backward, while no forward that may be recomputed is outstanding (`Siblings.settle`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.ops import lora_linear_group
from peftfast.patching.state import State, state_of
from peftfast.patching.surroundings import in_backward, is_released, modes, saving_is_hooked

if TYPE_CHECKING:
    from peftfast.patching.lora_call import LoraCall

_ANCHOR = "peftfast"
_MANY = 16
_UNCLAIMED_LIMIT = 2

Read = Callable[[nn.Module, Tensor], "LoraCall | str"]


class Siblings:
    """The fused modules of one parent; a copy or a pickle of it observes for itself."""

    def __init__(self) -> None:
        self._run: list[weakref.ref[nn.Module]] = []
        self._run_input: weakref.ref[Tensor] | None = None
        self._run_place = (0, 0)  # version of the input, thread
        self._waiting: list[Group] = []
        self._outstanding: list[weakref.ref[Any]] = []
        self._unmatched = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Siblings, ()

    def compute(
        self, module: nn.Module, state: State, call: LoraCall, x: Tensor, read: Read
    ) -> Tensor:
        """The output of `module` for x.

        `call` holds its operands, and `read` reads those of the other members.
        """
        if torch.is_inference_mode_enabled() or x.is_inference() or not state.owned_by(module):
            return call.output(x, state.impl)
        if state.group is not None and state.index > 0:
            handed = state.group.hand_out(state.index, x, call)
            if handed is not None:
                state.shared += 1
                return handed
        recomputing = in_backward()
        if not recomputing:
            if state.group is None:
                self._observe(module, x)
            if self._waiting:
                self.settle()
        group = state.group
        if group is not None and group.active and state.index == 0:
            calls = group.read_calls(call, x, state.impl, read)
            if calls is not None:
                return group.compute(calls, x, state.impl, recomputing)
        y = call.run(x, state.impl)
        self.record(y, call.drops(), recomputing)
        return call.finish(y)

    def settle(self) -> None:
        """Let groups formed or given up take effect, unless a forward may still be recomputed."""
        if self._unmatched or any(_awaits_backward(ref) for ref in self._outstanding):
            return
        self._outstanding.clear()
        for group in self._waiting:
            group.active = not group.stopped
        self._waiting.clear()

    def record(self, y: Tensor, drops: bool, recomputing: bool) -> None:
        """Note a computation that a checkpoint may repeat, or the repetition.

        A non-reentrant checkpoint's forward saves through hooks; it is outstanding while its node
        holds anything. A reentrant one's runs without grad, and nothing of it can be held on to,
        but there only the dropout seeds matter: calls that drop are counted, and their repetitions,
        which run inside a backward, counted off.
        """
        hooked = saving_is_hooked()
        if recomputing:
            if drops and not hooked and self._unmatched:
                self._unmatched -= 1
        elif not torch.is_grad_enabled():
            self._unmatched += drops
        elif hooked and y.grad_fn is not None:
            if len(self._outstanding) >= _MANY:
                self._outstanding = [ref for ref in self._outstanding if _awaits_backward(ref)]
            self._outstanding.append(weakref.ref(y.grad_fn))

    def give_up(self, group: Group, reason: str) -> None:
        if not group.stopped:
            group.stopped = reason
            self._waiting.append(group)

    def _observe(self, module: nn.Module, x: Tensor) -> None:
        """Lengthen the present run of calls with one input, or close it and begin another."""
        place = (x._version, get_ident())
        same = self._run_input is not None and self._run_input() is x and self._run_place == place
        if same and all(ref() is not module for ref in self._run):
            self._run.append(weakref.ref(module))
            return
        if len(self._run) > 1:
            self._form_group()
        self._run, self._run_input, self._run_place = [weakref.ref(module)], weakref.ref(x), place

    def _form_group(self) -> None:
        found = [(ref, state_of(member)) for ref in self._run if (member := ref()) is not None]
        members = [(ref, state) for ref, state in found if state is not None]
        if len(members) < 2:
            return
        group = Group(self, tuple(ref for ref, _ in members))
        for index, (_, state) in enumerate(members):
            state.group, state.index = group, index
        self._waiting.append(group)


class _Handout(NamedTuple):
    """The outputs that a first member's call left for the others, with all that they depend on."""

    x: weakref.ref[Tensor]
    version: int
    modes: tuple[Any, ...]
    outputs: dict[int, tuple[Tensor, LoraCall, list[Any]]]
    watch: weakref.ref[Any]


class Group:
    """Siblings in the order of their calls.

    `active` says whether they are to be computed together; `stopped`, why they never will be again;
    `calls`, how often they were.
    """

    def __init__(self, siblings: Siblings, members: tuple[weakref.ref[nn.Module], ...]) -> None:
        self.members = members
        self.active = False
        self.stopped = ""
        self.calls = 0
        self._siblings = siblings
        self._handouts: dict[int, _Handout] = {}  # by thread
        self._unclaimed = 0

    def read_calls(
        self, first: LoraCall, x: Tensor, impl: str, read: Read
    ) -> list[LoraCall] | None:
        """Every member's operands; None where a member would not run fused just as the first does.

        A pre-hook of a later member runs before that member's call, and may set anything.
        """
        calls = [first]
        for ref in self.members[1:]:
            member = ref()
            state = None if member is None else state_of(member)
            if member is None or state is None or state.group is not self or state.impl != impl:
                return None
            call = "has pre-hooks" if member._forward_pre_hooks else read(member, x)
            if isinstance(call, str) or call.compress != first.compress:
                return None
            calls.append(call)
        return calls

    def compute(self, calls: list[LoraCall], x: Tensor, impl: str, recomputing: bool) -> Tensor:
        """The first member's output; the others' wait to be handed out in this thread."""
        thread = get_ident()
        if self._handouts.pop(thread, None) is not None:
            self._count_unclaimed()
        first, *others = lora_linear_group(
            x,
            [call.weight for call in calls],
            [call.bias() for call in calls],
            [call.lora_a for call in calls],
            [call.lora_b for call in calls],
            [call.scaling for call in calls],
            dropout_p=[call.dropout_p for call in calls],
            compress=calls[0].compress,
            impl=impl,
        )
        self._siblings.record(first, any(call.drops() for call in calls), recomputing)
        first, watch = self._watch(calls[0].finish(first), x, thread)
        outputs = {
            index: (call.finish(y), call, _versions(call))
            for index, (y, call) in enumerate(zip(others, calls[1:], strict=True), start=1)
        }
        self.calls += 1
        self._handouts[thread] = _Handout(weakref.ref(x), x._version, modes(x), outputs, watch)
        return first

    def hand_out(self, index: int, x: Tensor, call: LoraCall) -> Tensor | None:
        """The output that waits for member `index`, if nothing that it depends on has changed."""
        thread = get_ident()
        handout = self._handouts.get(thread)
        if handout is None or index not in handout.outputs:
            return None
        y, computed, versions = handout.outputs.pop(index)
        if not handout.outputs:
            self._handouts.pop(thread, None)
            self._unclaimed = 0
        if reason := _difference(handout, computed, versions, x, call):
            self._siblings.give_up(self, reason)
            return None
        return y

    def _watch(self, first: Tensor, x: Tensor, thread: int) -> tuple[Tensor, weakref.ref[Any]]:
        """Watch for the end of this forward.

        Returns the first output, and a reference whose death drops the others. All outputs share
        one autograd node, which they keep alive and which keeps x. So the first output gets a node
        of its own (a view), and what dies with that node is watched: it lives while anything
        computed from the first output does. Without a graph, x itself is watched.
        """
        group = weakref.ref(self)

        def drop(_: object) -> None:
            alive = group()
            if alive is not None and alive._handouts.pop(thread, None) is not None:
                alive._count_unclaimed()

        if first.grad_fn is None:
            return first, weakref.ref(x, drop)
        first = first.view_as(first)
        anchor = _Anchor()
        node: Any = first.grad_fn
        node.metadata[_ANCHOR] = anchor
        return first, weakref.ref(anchor, drop)

    def _count_unclaimed(self) -> None:
        """Outputs that nobody asked for: once may be an exception; twice in a row, it is habit."""
        self._unclaimed += 1
        if self._unclaimed >= _UNCLAIMED_LIMIT:
            self._siblings.give_up(self, "outputs computed together were not all asked for")


class _Anchor:
    __slots__ = ("__weakref__",)


def _difference(
    handout: _Handout, computed: LoraCall, versions: list[Any], x: Tensor, call: LoraCall
) -> str | None:
    if handout.x() is not x:
        return "the calls did not see one input"
    if handout.version != x._version:
        return "the input was changed in place between the calls"
    if handout.modes != modes(x):
        return "grad mode or autocast changed between the calls"
    same = len(computed.sources) == len(call.sources) and all(
        one is other for one, other in zip(computed.sources, call.sources, strict=True)
    )
    if not same or computed.settings != call.settings or versions != _versions(call):
        return "a weight or an adapter changed between the calls"
    return None


def _versions(call: LoraCall) -> list[Any]:
    """Version and requires_grad of every parameter that a call reads."""
    with torch._C.DisableTorchFunctionSubclass():  # 4-bit parameters have a slow one
        return [
            (0 if source.is_inference() else source._version, source.requires_grad)
            for source in call.sources
        ]


def _awaits_backward(ref: weakref.ref[Any]) -> bool:
    node = ref()
    return node is not None and not is_released(node)
