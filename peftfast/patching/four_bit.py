"""The weight of a bitsandbytes 4-bit linear as an `NF4Weight`, or why its own forward must run.

What bitsandbytes' `Linear4bit` computes (0.49 and 0.50), with C its compute_dtype:

    y = (x.to(C) W^T + b.to(C)).to(x.dtype)

C, where it was not given, is the dtype of the first input, if that is float32 or bfloat16; and a
bias of another dtype becomes one of C's for good (in 0.49 of x's). A patched linear does the same
to both.

Looking at the values of a weight's tables and scales costs a pass over them, and on a GPU a wait.
So what was checked is kept, with everything that was looked at, and counts only for as long as all
of that is still the same; `Checked` says how that is told. It keeps no memory alive that the linear
has given up: it goes when the parameter does, and before anything is moved (`Releasing`).
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from packaging.version import Version
from torch import Tensor, nn

from peftfast.ops.nf4 import NF4Weight
from peftfast.patching.bases import KINDS, Base, Kind
from peftfast.patching.inputs import SHORT_DTYPES
from peftfast.patching.probe import shallow
from peftfast.patching.state import KEY, State

TYPES: tuple[type[nn.Module], ...] = (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)

_PARAMETERS = (Params4bit, nn.Parameter)  # pickle makes one of the other
_BIAS_AS_INPUT = Version(bnb.__version__) < Version("0.50.0.dev0")
REPACKED = "weight is in bitsandbytes' packing for CPUs (`state_dict()` of its layer undoes it)"


class Checked:
    """The weight of a 4-bit linear, held to its rules, or which of them it breaks.

    Attributes:
        quant_state, state_id: the parameter's, as it was, and its id: torch.compile guards by that.
        outcome: the weight, sharing the parameter's memory; the reason why not; or None, once the
            memory was released.
        sound: whether there was no such reason.
    """

    def __init__(self, base: Any, owner: State | None) -> None:
        param = base._parameters["weight"]
        self.quant_state = param.quant_state
        self.state_id = id(self.quant_state)
        self._attributes = _attributes(self.quant_state)  # held, so that no other has their ids
        self._ids = tuple(map(id, self._attributes))
        self._tensors = [value for value in self._attributes if isinstance(value, Tensor)]
        self._marks = self._marks_now(param)
        self._param: weakref.ref[Any] = weakref.ref(
            param, None if owner is None else _forget_in(owner)
        )
        self.outcome: NF4Weight | str | None = _examined(base)
        self.sound = isinstance(self.outcome, NF4Weight)

    def holds(self, param: Any) -> bool:
        """Whether nothing that was looked at has changed.

        The parameter, its memory and its quant_state must be the same, every attribute of that
        the same object, and its tensors unwritten since. The old memory is held, so another tensor
        can't have its address.
        """
        return (
            param.quant_state is self.quant_state
            and self._param() is param
            and self.outcome is not None
            and tuple(map(id, _attributes(self.quant_state))) == self._ids
            and self._marks_now(param) == self._marks
        )

    def _marks_now(self, param: Any) -> list[int]:
        """Where the parameter's data lies, and where and of which version every other tensor is."""
        with torch._C.DisableTorchFunctionSubclass():
            marks = [param.data_ptr(), param.numel()]
        for tensor in self._tensors:
            marks += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        return marks

    def read(self, compute_dtype: torch.dtype | None) -> NF4Weight | str:
        outcome = self.outcome
        assert outcome is not None
        if isinstance(outcome, NF4Weight) and outcome.compute_dtype is not compute_dtype:
            outcome = self.outcome = outcome.with_compute_dtype(compute_dtype)
        return outcome

    def release(self) -> None:
        """Hold no memory of the weight any more."""
        self.outcome = None
        self._attributes, self._tensors = (), []


def _examined(base: Any) -> NF4Weight | str:
    if getattr(base._parameters["weight"].quant_state, "packing_format_for_cpu", False):
        return REPACKED
    try:
        weight = NF4Weight.from_bnb(base._parameters["weight"])
    except (TypeError, ValueError) as error:
        return f"weight can't be read: {error}"
    needed = [base.out_features, base.in_features]
    if list(weight.shape) != needed:
        return f"weight was quantised as {list(weight.shape)}; [out, in] is {needed}"
    return weight


class Releasing(nn.Module):
    """A mixin of fused classes: the memory of a weight is not held while tensors are moved."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(KEY)
        if isinstance(state, State) and state.checked is not None:
            state.checked.release()
        return super()._apply(*args, **kwargs)


def read_weight(base: Any, x: Tensor | None, state: State | None) -> NF4Weight | str:
    """The weight over which `base` computes, or why its own forward must run ("weight is ...").

    Args:
        base: one of `TYPES`, or a fused class of theirs.
        x: the input, by which bitsandbytes settles a compute_dtype that was not given; None where
            there is none yet.
        state: where to keep what was checked; None: nowhere.
    """
    if _has_lost_state(base):
        base = view(base) if x is None else base
        fix_4bit_weight_quant_state_from_module(base)
    param = base._parameters["weight"]
    if type(param) not in _PARAMETERS:
        return f"weight is a {type(param).__name__}"
    quant_state = getattr(param, "quant_state", None)
    if quant_state is None:
        return "weight has no quant_state: it is not quantised yet"
    if not isinstance(quant_state, QuantState):
        return f"weight has a {type(quant_state).__name__} for a quant_state"
    compute_dtype = _compute_dtype(base, x)
    if compute_dtype not in (None, *SHORT_DTYPES):
        return f"weight is to be computed with in {compute_dtype}"
    if torch.compiler.is_compiling():
        return _traced(param, quant_state, compute_dtype, state)
    checked = None if state is None else state.checked
    if checked is None or not checked.holds(param):
        checked = Checked(base, state)
        if state is not None:
            state.checked = checked
    return checked.read(compute_dtype)


def read_bias(base: Any, x: Tensor | None) -> Tensor | None:
    """The bias, cast for good as soon as there is an input, as bitsandbytes does it."""
    bias: Tensor | None = base._parameters["bias"]
    if bias is None or x is None:
        return bias
    dtype = x.dtype if _BIAS_AS_INPUT else base.compute_dtype or x.dtype
    if bias.dtype == dtype:
        return bias
    if torch.compiler.is_compiling():  # which can't give a parameter another dtype
        return bias.to(dtype)
    bias.data = bias.data.to(dtype)
    return bias


def _read_base(base: Any, x: Tensor | None, state: State | None) -> Base | str:
    weight = read_weight(base, x, state)
    if isinstance(weight, str):
        return f"the base layer's {weight}"
    sources = [base._parameters["weight"], *weight.parts[1:]]
    if base._parameters["bias"] is not None:
        sources.append(base._parameters["bias"])
    return Base(weight, read_bias(base, x), tuple(sources))


def view(base: Any) -> Any:
    """A view of a 4-bit linear on which a forward changes nothing of `base`.

    bitsandbytes' forward settles the compute_dtype, casts the bias in place, gives a parameter its
    lost state back, and on a CPU writes into the state (0.49) or repacks the weight.
    """
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(weight) in _PARAMETERS:
        state = copy.copy(getattr(weight, "quant_state", None))
        weight = Params4bit(weight.data, quant_state=state, bnb_quantized=state is not None)
    if bias is not None:
        bias = nn.Parameter(bias.detach(), requires_grad=False)
    kind = next(k for k in type(base).__mro__ if k in TYPES)
    return shallow(base, kind, training=True, _parameters={"weight": weight, "bias": bias})


def _traced(
    param: Any, quant_state: Any, compute_dtype: torch.dtype | None, state: State | None
) -> NF4Weight | str:
    """The weight in a graph that torch.compile traces, made of the tensors of that call.

    A trace can look at no values. What was found in an eager call, or by `patch`, counts.
    """
    checked = None if state is None else state.checked
    if checked is None or not checked.sound or checked.state_id != id(quant_state):
        return "weight was not checked in an eager call before it was compiled"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return REPACKED
    second = quant_state.state2
    if quant_state.absmax.dtype != (torch.float32 if second is None else torch.uint8):
        return REPACKED
    return NF4Weight(
        param.view(-1).view(torch.uint8),
        quant_state.absmax,
        quant_state.shape,
        quant_state.dtype,
        quant_state.blocksize,
        quant_state.quant_type,
        None if second is None else second.absmax,
        None if second is None else second.code,
        None if second is None else quant_state.offset,
        compute_dtype,
    )


def _has_lost_state(base: Any) -> bool:
    """Whether the linear's own forward would first give its parameter back what it has lost.

    FSDP may leave a parameter without its quant_state; the linear itself has kept that.
    """
    param, kept = base._parameters["weight"], base.quant_state
    return (
        type(param) in _PARAMETERS
        and getattr(param, "quant_state", None) is None
        and isinstance(kept, QuantState)
        and param.shape[1:] == (1,)
        and not torch.compiler.is_compiling()
    )


def _compute_dtype(base: Any, x: Tensor | None) -> torch.dtype | None:
    if x is not None and not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype: torch.dtype | None = base.compute_dtype
    return dtype


def _attributes(quant_state: Any) -> tuple[Any, ...]:
    found = tuple(vars(quant_state).values())
    second = vars(quant_state).get("state2")
    return found if second is None else (*found, *vars(second).values())


def _forget_in(owner: State) -> Any:
    state = weakref.ref(owner)

    def forget(gone: object) -> None:
        alive = state()
        if alive is not None and alive.checked is not None and alive.checked._param is gone:
            alive.checked = None

    return forget


KIND = Kind(_read_base, view)
KINDS.update(dict.fromkeys(TYPES, KIND))
