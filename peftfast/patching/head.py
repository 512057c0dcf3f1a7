"""The output head of a language model: its loss without logits in memory.

Where a model is called with labels, its head returns deferred logits (`deferred_logits`), whose
cross-entropy, wherever it is computed, takes none. Where the model then gives no loss, the real
logits leave it. Without labels and in whatever else is unusual the head runs as it is.

Two hooks on the model that owns the head say when labels are there; the head's class is swapped.
While compiling nothing is deferred: the head notes on its logits what they were made of, and the
model's loss function, if it is transformers' own for causal models, reads that.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from peftfast.ops import recipes
from peftfast.ops.cross_entropy import linear_cross_entropy
from peftfast.ops.operands import autocast_dtype
from peftfast.patching.bases import KINDS
from peftfast.patching.deferred_logits import DeferredLogits, Head, Record, defer, made
from peftfast.patching.forwards import bypass_reason, rebind, replaced_forward
from peftfast.patching.inputs import PLAIN_TENSORS, input_reason
from peftfast.patching.lora_call import read_call
from peftfast.patching.peft_lora import FusedLoraLinear
from peftfast.patching.state import LeftAlone, state_of
from peftfast.patching.surroundings import transform_reason

if TYPE_CHECKING:
    from peftfast.patching.report import FusedModule, NotFusedModule

_RECORD = "_peftfast_head"
_NOTE = "_peftfast_logits"  # on logits, while compiling
_LOSS = "_loss_function"  # where transformers looks for a model's own
_OP = "linear_cross_entropy"
_READ = "its logits were read"

_threads = threading.local()


def paths(model: nn.Module) -> list[str]:
    """The paths of the heads in `model`."""
    return [path for _, path, _ in _heads(model)]


def join(
    model: nn.Module,
    memory: str = "recompute",
    impl: str = "auto",
    left: Mapping[str, str] | None = None,
    known: Mapping[int, Record] | None = None,
) -> None:
    """Let the heads of `model` defer their logits, where that serves; `leave` undoes it.

    Args:
        memory: the policy of `patch`; with "keep" heads stay as they are.
        impl: the implementation asked for; one that the op does not have gives way to "auto".
        left: paths of heads to leave alone, each with the reason.
        known: the records that `leave` returned, which go on counting.
    """
    leave(model)
    for owner, path, head in _heads(model):
        if reason := (left or {}).get(path):
            head.__dict__[_RECORD] = LeftAlone(reason)
            continue
        if memory == "keep" or _obstacle(owner, head):
            continue
        source = type(head)
        asked = impl if impl in ("native", "reference") else "auto"
        record = (known or {}).get(id(head)) or Record(asked)
        record.impl = asked
        head.__dict__[_RECORD] = record
        head.__class__ = _SWAPS[source]
        rebind(head, source.forward, _SWAPS[source].forward)
        owner.register_forward_pre_hook(_enter, with_kwargs=True)
        owner.register_forward_hook(_exit, always_call=True)
        if owner.loss_function is ForCausalLMLoss:
            owner.__dict__[_LOSS] = _causal_loss


def leave(model: nn.Module) -> dict[int, Record]:
    """Undo what `join` did to the modules of `model`; returns the records by the heads' ids."""
    records: dict[int, Record] = {}
    for module in list(model.modules()):
        record = module.__dict__.pop(_RECORD, None)
        if isinstance(record, Record):
            records[id(module)] = record
        if record is not None:
            swapped = next((s for s, own in _SWAPS.items() if type(module) is own), None)
            if swapped is not None:
                module.__class__ = swapped
                rebind(module, _SWAPS[swapped].forward, swapped.forward)
        if module.__dict__.get(_LOSS) is _causal_loss:
            del module.__dict__[_LOSS]
        _remove_hook(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, _enter)
        _remove_hook(module._forward_hooks, module._forward_hooks_always_called, _exit)
    return records


def entries(
    model: nn.Module, memory: str = "recompute"
) -> tuple[list[FusedModule], list[NotFusedModule]]:
    """The rows of `report` about the heads of `model`."""
    from peftfast.patching.report import FusedModule, NotFusedModule

    fused, not_fused = [], []
    for owner, path, head in _heads(model):
        record = head.__dict__.get(_RECORD)
        if isinstance(record, Record):
            left = dict(record.plain) | ({_READ: record.made} if record.made else {})
            fused.append(
                FusedModule(
                    path=path, op=_OP, impl=record.impl, memory=memory, siblings=(),
                    hits=record.fused, delegations=left, note="",
                )
            )  # fmt: skip
        else:
            own = record.reason if isinstance(record, LeftAlone) else _obstacle(owner, head)
            reason = own or _not_joined(memory)
            kind = f"{type(head).__module__}.{type(head).__qualname__}"
            not_fused.append(NotFusedModule(path, kind, (f"its loss: {reason}",)))
    return fused, not_fused


def _not_joined(memory: str) -> str:
    if memory == "keep":
        return "memory='keep' leaves it as it is"
    return "peftfast.patch was not called since the head became one that can be fused"


def _heads(model: nn.Module) -> list[tuple[PreTrainedModel, str, Any]]:
    """Every head with the outermost model that owns it, and its path in `model`."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, tuple[PreTrainedModel, str, Any]] = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        head = module.get_output_embeddings()
        if isinstance(head, nn.Module) and id(head) in paths:
            found.setdefault(id(head), (module, paths[id(head)], head))
    return list(found.values())


def _obstacle(owner: PreTrainedModel, head: Any) -> str | None:
    """Why this head can't defer its logits; None where it can."""
    if not _label_names(owner):
        return f"{type(owner).__name__} takes no labels"
    kind = type(head).__name__
    if hasattr(head, "modules_to_save"):
        return "the head is trained (modules_to_save)"
    if type(head) is lora.Linear:
        return "the head's adapter is not fused"
    if type(head) not in (*_SWAPS, *_SWAPS.values()):
        return f"the head is a {kind}, which no op serves"
    linear = head.base_layer if isinstance(head, FusedLoraLinear) else head
    if type(linear) not in (nn.Linear, DeferringLinear):
        return f"the head is a {type(linear).__name__}, which no op serves"
    if linear.weight.requires_grad:
        return "the head is trained, or tied to embeddings that are"
    if isinstance(head, FusedLoraLinear):
        return "the head has hooks" if _is_hooked(head) else None
    reason = bypass_reason(head) or replaced_forward(head, nn.Linear.forward)
    return None if reason is None else f"the head {reason}"


def _label_names(owner: nn.Module) -> list[str]:
    """The arguments of a model's forward that hold labels."""
    parameters = inspect.signature(type(owner).forward).parameters
    return [name for name in parameters if "labels" in name]


def _is_hooked(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


# The model's side: when there are labels


def _enter(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    head = owner.get_output_embeddings()
    if head is not None and _RECORD in head.__dict__:
        _labelled()[id(head)] = owner if _has_labels(owner, args, kwargs) else None
        asked = kwargs.get("output_hidden_states")
        asked = getattr(owner.config, "output_hidden_states", False) if asked is None else asked
        _threads.shown = bool(asked) or bool(args)


def _exit(owner: Any, args: tuple[Any, ...], output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    head = owner.get_output_embeddings()
    if head is None or _labelled().pop(id(head), None) is None or _has_loss(output):
        return None
    return _with_logits(output)


def _labelled() -> dict[int, Any]:
    """For each head whose model is running in this thread, the model if it was given labels."""
    found: dict[int, Any] | None = getattr(_threads, "labelled", None)
    if found is None:
        found = _threads.labelled = {}
    return found


def _has_labels(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(kwargs.get(name) is not None for name in kwargs if "labels" in name):
        return True
    if not args:
        return False
    names = list(inspect.signature(owner.forward).parameters)
    return any(
        "labels" in name and value is not None for name, value in zip(names, args, strict=False)
    )


def _has_loss(output: Any) -> bool:
    if isinstance(output, dict):
        return output.get("loss") is not None
    if not isinstance(output, (tuple, list)) or not output:
        return False
    first = output[0]
    return isinstance(first, Tensor) and first.ndim == 0


def _with_logits(output: Any) -> Any:
    """The output with real logits in place of deferred ones."""
    if isinstance(output, DeferredLogits):
        return made(output)
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, DeferredLogits):
                output[name] = made(value)
        return output
    if type(output) in (tuple, list):
        return type(output)(_with_logits(value) for value in output)
    return output


def _remove_hook(hooks: dict[int, Any], options: dict[int, Any], own: Callable[..., Any]) -> None:
    for key in [key for key, hook in hooks.items() if hook is own]:
        del hooks[key]
        options.pop(key, None)


# A compiled loss


class _Note:
    """What logits were made of. (A tensor that is traced takes no tuple as an attribute.)"""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head


def _noted(logits: Tensor, head: Head | str, hidden: Tensor) -> Tensor:
    """The same logits; dropout draws a mask at each call, so there the loss has to read them."""
    if not isinstance(head, str) and not any(p > 0 for p in head.dropout_p):
        setattr(logits, _NOTE, _Note(hidden, head))
    return logits


def _causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`; compiled, from the head's input where that is known."""
    note = getattr(logits, _NOTE, None) if torch.compiler.is_compiling() else None
    if note is None or vocab_size != note.head.weight.shape[0]:
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head = note.hidden, note.head
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        head.bias,
        shift_labels.reshape(hidden.shape[:-1]).to(hidden.device),
        lora_a=head.lora_a,
        lora_b=head.lora_b,
        scaling=head.scaling,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return (loss if num_items_in_batch is None else loss / num_items_in_batch).float()


# The head's side


def _deferred(module: Any, x: Tensor, read: Callable[[Any, Tensor], Head | str]) -> Tensor | None:
    """The head's logits, deferred; None where it is to run as it is."""
    owner = None if torch.compiler.is_compiling() else _labelled().get(id(module))
    if owner is None:
        return None
    record = module.__dict__.get(_RECORD)
    if not isinstance(record, Record):
        return None
    reason = _call_reason(module, x)
    head = read(module, x) if reason is None else reason
    if isinstance(head, str):
        record.plain[head] = record.plain.get(head, 0) + 1
        return None
    return defer(x, head, record, _is_private(owner, x, record))


def _is_private(owner: Any, x: Tensor, record: Record) -> bool:
    """Whether the gradient of the head's input, a norm's output, is nobody's business.

    It is not where hidden states are returned, nor where hooks on the norm, or on a module around
    it, may have taken hold of them.
    """
    found = recipes.source(x, "rms_norm", "layer_norm")
    if found is None or _threads.shown:
        return False
    weights = found[2][1:]
    around: _Around | None = record.around
    if around is None or not around.is_in_place(owner, weights):
        around = record.around = _Around(owner, weights)
    return not around.is_hooked()


class _Around:
    """The modules of a model that hold a norm's parameters, and those around them.

    A walk through the whole model finds them; it is good for as long as each is where it was found.
    """

    def __init__(self, owner: nn.Module, weights: tuple[Tensor, ...]) -> None:
        self._owner = weakref.ref(owner)
        self._weights = [weakref.ref(weight) for weight in weights]
        self._held: list[_Place] = []
        self._placed: list[_Place] = []
        wanted = {id(weight) for weight in weights}
        found: dict[int, nn.Module] = {}
        parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in owner.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in wanted:
                    self._held.append(_place(module, name, parameter))
                    found[id(module)] = module
            for name, child in module._modules.items():
                parents.setdefault(id(child), []).append((module, name))
        waiting = list(found.values())
        for module in waiting:
            for parent, name in parents.get(id(module), ()):
                self._placed.append(_place(parent, name, module))
                if parent is not owner and id(parent) not in found:
                    found[id(parent)] = parent
                    waiting.append(parent)
        self._modules = [weakref.ref(module) for module in found.values()]

    def is_in_place(self, owner: nn.Module, weights: tuple[Tensor, ...]) -> bool:
        if self._owner() is not owner or len(weights) != len(self._weights):
            return False
        if any(ref() is not weight for ref, weight in zip(self._weights, weights, strict=True)):
            return False
        return all(_is_there(place, "_modules") for place in self._placed) and all(
            _is_there(place, "_parameters") for place in self._held
        )

    def is_hooked(self) -> bool:
        """Whether any of them is, or none was found."""
        modules = [ref() for ref in self._modules]
        return not modules or any(module is None or _is_hooked(module) for module in modules)


_Place = tuple[weakref.ref[Any], str, weakref.ref[Any]]  # a module, a name in it, and what is there


def _place(module: nn.Module, name: str, value: Any) -> _Place:
    return weakref.ref(module), name, weakref.ref(value)


def _is_there(place: _Place, names: str) -> bool:
    module, name, value = place
    holder, held = module(), value()
    return holder is not None and held is not None and getattr(holder, names).get(name) is held


def _call_reason(module: nn.Module, x: Tensor) -> str | None:
    if reason := transform_reason() or input_reason(x):
        return reason
    if x.ndim < 2 or x.numel() == 0:
        return "the input has no rows"
    if torch.is_inference_mode_enabled() or x.is_inference():
        return "in inference mode"
    return "the head has hooks" if _is_hooked(module) else None


def _read_linear(module: Any, x: Tensor) -> Head | str:
    weight, bias = module.weight, module.bias
    return _checked(x, Head(weight, bias))


def _read_lora(module: Any, x: Tensor) -> Head | str:
    call = read_call(module, x)
    if isinstance(call, str):
        return call
    if call.out_dtype is not None or call.biases_after or not isinstance(call.weight, Tensor):
        return "the head's output is cast, or biased after its sum"
    given = call.weight, call.bias(), call.lora_a, call.lora_b, call.scaling, call.dropout_p
    return _checked(x, Head(*given))


def _checked(x: Tensor, head: Head) -> Head | str:
    if head.weight.requires_grad:
        return "the head is trained"
    for tensor in (head.weight, head.bias):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"the head's parameter is a {type(tensor).__name__}"
        if tensor.device != x.device:
            return f"the head is on {tensor.device}, its input on {x.device}"
        if tensor.dtype != x.dtype and autocast_dtype(x) is None:
            return f"the head is {tensor.dtype}, its input {x.dtype}"
    return head


class DeferringLinear(nn.Linear):
    """`nn.Linear` as a head; modules become one by `join` only, which sets `__class__`."""

    def forward(self, input: Tensor) -> Tensor:
        deferred = _deferred(self, input, _read_linear)
        if deferred is not None:
            return deferred
        logits = nn.Linear.forward(self, input)
        compiling = torch.compiler.is_compiling()
        return _noted(logits, _read_linear(self, input), input) if compiling else logits


class DeferringLoraLinear(FusedLoraLinear):
    """PEFT's LoRA linear, fused, as a head."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            deferred = _deferred(self, args[0], _read_lora)
            if deferred is not None:
                state = state_of(self)
                if state is not None:
                    state.hits += 1
                return deferred
        logits = super().forward(*args, **kwargs)
        if torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            # A view: while tracing, one of an op's several outputs takes no attribute.
            logits = logits.view(logits.shape)
            return _noted(logits, _read_lora(self, args[0]), args[0])
        return logits


_SWAPS: dict[type[nn.Module], Any] = {
    nn.Linear: DeferringLinear,
    FusedLoraLinear: DeferringLoraLinear,
}
KINDS[DeferringLinear] = KINDS[nn.Linear]  # an adapter may be put on such a head
