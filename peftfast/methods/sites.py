"""Where in a model a method's components go: its blocks, and the points in them, by structure.

A block is an element of a list of modules that holds attention; what attention and feed-forward
network are is seen by the linears that a module holds, their widths and the attributes of heads.
What follows a sublayer's last linear is seen by running the block's forward on symbols (`flow`).
Conventional names of children decide only what neither tells: which of a module's linears is q, k,
v or the output, and which of its dropouts is the output's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import fx, nn

from peftfast.methods import flow

SITES = (
    "attention_input",
    "attention_heads",
    "attention_output",
    "cross_attention_input",
    "cross_attention_heads",
    "cross_attention_output",
    "ffn_input",
    "ffn_hidden",
    "ffn_output",
)
_ATTENTION_ROLES = ("q", "k", "v", "kv", "qkv", "output")
ROLES = (
    *(f"attention_{role}" for role in _ATTENTION_ROLES),
    *(f"cross_attention_{role}" for role in _ATTENTION_ROLES),
    "ffn_up",
    "ffn_gate",
    "ffn_gate_up",
    "ffn_down",
)
"""What a linear of a block can be. "attention_kv" and "_qkv" are one linear for two and three."""

_HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "head_dim", "head_size",
    "attention_head_size", "key_value_proj_dim",
)  # fmt: skip
_EPS = ("eps", "variance_epsilon", "epsilon")
_AFFIX, _SUFFIX = r"(to_|linear_|lin_|w_?|c_)?", r"(_?(proj|projection|lin|linear|layer|attn))?"
_NAMES = {
    "q": rf"{_AFFIX}(q|query){_SUFFIX}",
    "k": rf"{_AFFIX}(k|key){_SUFFIX}",
    "v": rf"{_AFFIX}(v|value){_SUFFIX}",
    "kv": rf"{_AFFIX}(kv|key_value){_SUFFIX}",
    "qkv": rf"{_AFFIX}(qkv|query_key_value|attn|in_proj){_SUFFIX}",
    "output": rf"{_AFFIX}(o|out|output|dense|proj){_SUFFIX}",
}
_OUTPUT_DROPOUT = re.compile(r"resid|(?<!drop)out[._]|output|proj")


@dataclass(frozen=True)
class Point:
    """A value in a block, as a module's input or output.

    Attributes:
        module: the module's name in the model.
        side: "input": its first argument; "output": what it returns, and the first element where
            that is a tuple.
        features: the value's last dimension.
        near: the name of the linear whose device and compute dtype an adapter here takes.
    """

    module: str
    side: Literal["input", "output"]
    features: int
    near: str


@dataclass(frozen=True)
class Block:
    """One layer of a stack.

    Attributes:
        name: the module's name in the model.
        stack: "decoder" where its attention is causal or it attends to an encoder, else "encoder".
        index: its place among the layers of its stack, from 0. Two towers of one kind (CLIP's) are
            two stacks, each counted from 0.
        points: by site, those of `SITES` that the block has.
        linears: the names of its linears by role, those of `ROLES` that it has.
        norms: the names of the LayerNorms and RMSNorms in it, those of attention heads too.
    """

    name: str
    stack: Literal["encoder", "decoder"]
    index: int
    points: Mapping[str, Point]
    linears: Mapping[str, str]
    norms: tuple[str, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a transformer, in the order of its modules.

    Points, by site:
        attention_input: what q, k and v read; with cross-attention, what q reads.
        attention_heads: the heads' output, which the output projection reads.
        attention_output: after the output projection and the dropout that follows it, before the
            residual. A dropout that is a function (BART's), or a module that serves more than one
            sublayer (ViT's), is no place: there, before the dropout. Where a norm or a scaling of
            its own follows the sublayer before the residual (Gemma 2 and 3, OLMo 2, DINOv2), before
            that: "directly to the output of the sub-layer, after the projection back to the input
            size", and "passed directly into the following layer normalization" (Houlsby et al.,
            2019, section 2.1).
        ffn_input: what the first linears of the feed-forward network read.
        ffn_hidden: what its last linear reads.
        ffn_output: as attention_output, after the last linear. Of a mixture of experts: the whole
            mixture's, which has no ffn_hidden.

    Modules that PEFT wraps count as what they wrap, under the wrapper's name.

    Raises:
        ValueError: there is no block in the model.
    """
    tree = _Tree(model)
    found: list[Block] = []
    counts: dict[str, int] = {}
    for paths in _stacks(tree):
        parts = {path: part for path in paths if (part := _block(tree, path)) is not None}
        causal = any(part.causal for part in parts.values())
        for path, part in parts.items():
            tower = re.sub(r"\d+", "#", _parent(path))
            index = counts[tower] = counts.get(tower, -1) + 1
            stack: Literal["encoder", "decoder"] = "decoder" if causal else "encoder"
            found.append(Block(path, stack, index, part.points, part.linears, part.norms))
    if not found:
        raise ValueError(
            f"no transformer block was found in {type(model).__name__}: looked in every ModuleList"
            f" and Sequential for a module with attention, that is, with linears for q, k and v of"
            f" its own and one of the attributes {', '.join(_HEADS)}"
        )
    return found


def find_norms(model: nn.Module) -> tuple[str, ...]:
    """The names of every LayerNorm and RMSNorm of a model that has a weight."""
    return _Tree(model).norms("")


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear of any class, also one that PEFT wraps; None for others."""
    bare: Any = base_of(module)
    if any(child is not None for child in bare._modules.values()):
        return None
    sizes = getattr(bare, "in_features", None), getattr(bare, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    weight = bare._parameters.get("weight")
    if weight is None or weight.ndim != 2 or hasattr(bare, "num_embeddings"):
        return None
    rows, columns = weight.shape
    return (rows, columns) if getattr(bare, "nf", None) == columns else (columns, rows)


def base_of(module: nn.Module) -> nn.Module:
    """What wrappers are around: adapters' base layer, or the original of a copy that trains."""
    while (name := _wrapped(module)) is not None:
        module = getattr(module, name)
    return module


def _wrapped(module: nn.Module) -> str | None:
    """The name of the child that a wrapper is around."""
    names = ("base_layer", "original_module")
    return next((name for name in names if module._modules.get(name) is not None), None)


def _is_norm(module: nn.Module) -> bool:
    bare = base_of(module)
    if bare._modules or bare._buffers or not any(name in vars(bare) for name in _EPS):
        return False
    shapes = {name: p.ndim for name, p in bare._parameters.items() if p is not None}
    if isinstance(bare, (nn.LayerNorm, nn.RMSNorm)):
        return bool(shapes)
    return shapes in ({"weight": 1}, {"weight": 1, "bias": 1}) and not hasattr(bare, "num_groups")


class _Tree:
    """The modules of a model by name, wrappers without what is in them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.shared: set[int] = set()  # ids of those that have several names
        self._ends: dict[str, int] = {}
        self._add("", model, set())
        self._names = list(self.modules)
        self._starts = {name: start for start, name in enumerate(self._names)}
        self.linears: dict[str, tuple[int, int]] = {}
        for name, module in self.modules.items():
            if _parent(name) not in self.linears and (sizes := linear_sizes(module)):
                self.linears[name] = sizes
        self.hold_linears = {id(self.modules[a]) for name in self.linears for a in _above(name)}
        cores = [name for name in self._names if self._is_core(name)]
        nested = {above for name in cores for above in _above(name)}
        self.cores = dict.fromkeys(name for name in cores if name not in nested)
        self.experts = {name for name in self._names if self._has_experts(name)}

    def _add(self, path: str, module: nn.Module, seen: set[int]) -> None:
        seen.add(id(module))
        self.modules[path] = module
        inner = _wrapped(module)
        children = module._modules if inner is None else {inner: module._modules[inner]}
        for name, child in children.items():
            if child is None or (inner is not None and not child._modules):
                continue
            if id(child) in seen:
                self.shared.add(id(child))
            else:
                self._add(_join(path, name), child, seen)
        self._ends[path] = len(self.modules)

    def within(self, path: str) -> list[str]:
        """The names of a module and of all in it, in order."""
        return self._names[self._starts[path] : self._ends[path]]

    def linears_in(self, path: str) -> dict[str, tuple[int, int]]:
        return {name: self.linears[name] for name in self.within(path) if name in self.linears}

    def cores_in(self, path: str) -> list[str]:
        return [name for name in self.within(path) if name in self.cores]

    def norms(self, path: str) -> tuple[str, ...]:
        return tuple(name for name in self.within(path) if _is_norm(self.modules[name]))

    def _is_core(self, path: str) -> bool:
        """Whether a module makes q, k and v: of linears of its own, for heads."""
        module = self.modules[path]
        if not any(isinstance(vars(module).get(name), int) for name in _HEADS):
            return False
        sizes = {
            n: self.linears[_join(path, n)]
            for n in module._modules
            if _join(path, n) in self.linears
        }
        own = {role: name for name in sizes if (role := _role(name)) != "output"}
        if set(own) == {"qkv"} and own["qkv"] == "in_proj":  # a state-space model's has more
            return sizes["in_proj"][1] == 3 * sizes["in_proj"][0]
        return bool(own)

    def _has_experts(self, path: str) -> bool:
        """Whether a module holds experts: weights of three dimensions, or a list of networks."""
        module = self.modules[path]
        if any(p is not None and p.ndim == 3 for p in module._parameters.values()):
            return not (self.cores_in(path) or hasattr(module, "kernel_size"))
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or self.cores_in(path):
            return False
        return all(len(self.linears_in(_join(path, name))) > 1 for name in module._modules)


def _stacks(tree: _Tree) -> list[list[str]]:
    """The lists of blocks: of the lists that hold attention, those nearest to it whose elements
    hold a feed-forward network too; where none does, the nearest.
    """
    lists: dict[str, None] = {}
    for core in tree.cores:
        elements = [
            path
            for path in (core, *_above(core))
            if path and isinstance(tree.modules[_parent(path)], (nn.ModuleList, nn.Sequential))
        ]
        whole = [path for path in elements if _ffn_linears(tree, path) or _mixture(tree, path)]
        for path in (whole or elements)[:1]:
            lists.setdefault(_parent(path))
    return [
        [
            _join(path, name)
            for name in tree.modules[path]._modules
            if _join(path, name) in tree.modules
        ]
        for path in lists
    ]


class _Sublayer(NamedTuple):
    """What a sublayer's points are made of; all names are the model's."""

    linears: dict[str, str]
    reads: str  # whose input is the sublayer's
    last: str  # the linear, or the mixture, that ends it
    calls: str  # the module whose call in the block's graph gives the value of `last`
    end: str  # what gives the sublayer's output in as far as the graph doesn't show it


class _Found(NamedTuple):
    causal: bool
    points: Mapping[str, Point]
    linears: Mapping[str, str]
    norms: tuple[str, ...]


def _block(tree: _Tree, path: str) -> _Found | None:
    cores = tree.cores_in(path)
    attentions: dict[str, _Sublayer] = {}
    causal = False
    for core in cores:
        cross = _is_cross(core[len(path) :])
        site = "cross_attention" if cross else "attention"
        if site not in attentions and (sublayer := _attention(tree, core, path)) is not None:
            attentions[site] = sublayer
            causal |= cross or _is_causal(tree.modules[core])
    mixture = _mixture(tree, path)
    leaves = {id(tree.modules[name]) for name in (*cores, *([mixture] if mixture else ()))}
    graph = flow.trace(
        tree.modules[path],
        lambda module: id(module) in leaves or id(module) not in tree.hold_linears,
    )
    calls = flow.calls(graph) if graph is not None else {}

    points: dict[str, Point] = {}
    linears: dict[str, str] = {}
    width = 0
    for site, sublayer in attentions.items():
        last = sublayer.last
        heads, width = tree.linears[last]
        points[f"{site}_input"] = Point(
            sublayer.reads, "input", tree.linears[sublayer.reads][0], sublayer.reads
        )
        points[f"{site}_heads"] = Point(last, "input", heads, last)
        end = _end(tree, path, sublayer, calls)
        points[f"{site}_output"] = Point(end, "output", width, last)
        linears |= {f"{site}_{role}": name for role, name in sublayer.linears.items()}
    ffn = _ffn(tree, path, calls)
    if ffn is not None:
        hidden, features = tree.linears[ffn.last]
        points["ffn_input"] = Point(ffn.reads, "input", features, ffn.reads)
        points["ffn_hidden"] = Point(ffn.last, "input", hidden, ffn.last)
        points["ffn_output"] = Point(_end(tree, path, ffn, calls), "output", features, ffn.last)
        linears |= {f"ffn_{role}": name for role, name in ffn.linears.items()}
    elif mixture is not None and attentions:
        near = next(iter(attentions.values())).last
        whole = _Sublayer({}, mixture, mixture, mixture, mixture)
        points["ffn_input"] = Point(mixture, "input", width, near)
        points["ffn_output"] = Point(_end(tree, path, whole, calls), "output", width, near)
    if not points:
        return None
    norms = tree.norms(path)
    return _Found(causal, MappingProxyType(points), MappingProxyType(linears), norms)


def _attention(tree: _Tree, core: str, block: str) -> _Sublayer | None:
    """The linears of an attention module, and of the module around it that projects the heads."""
    own = tree.linears_in(core)
    roles: dict[str, str] = {}
    for name in own:
        role = _role(name[len(core) + 1 :])
        if role is not None:
            roles.setdefault(role, name)
    if "qkv" in roles and own[roles["qkv"]][1] == 2 * own[roles["qkv"]][0] and "q" in roles:
        roles["kv"] = roles.pop("qkv")
    output = roles.get("output")
    if output is None:
        holder = _parent(core)
        around = [name for name in tree.linears_in(holder) if name not in own]
        if not around or len(holder) <= len(block):
            return None
        output = around[0]
    inputs = [name for name in own if name != output]
    reads = next((roles[role] for role in ("qkv", "q") if role in roles), inputs[0])
    inside = output in own
    end = output
    if inside:
        for name in tree.within(core):
            child = name[len(core) + 1 :]
            if _OUTPUT_DROPOUT.search(child) and _is_dropout(tree.modules[name]):
                end = name
    ordered = {role: roles[role] for role in _ATTENTION_ROLES[:-1] if role in roles}
    return _Sublayer({**ordered, "output": output}, reads, output, core if inside else output, end)


def _ffn_linears(tree: _Tree, block: str) -> dict[str, tuple[int, int]]:
    """The linears of a block that are neither attention's nor in a mixture of experts."""
    cores = tree.cores_in(block)
    mixture = _mixture(tree, block)
    outputs = {found.last for core in cores if (found := _attention(tree, core, block))}
    return {
        name: sizes
        for name, sizes in tree.linears_in(block).items()
        if name not in outputs
        and not any(_is_below(name, core) for core in cores)
        and not (mixture and _is_below(name, mixture))
    }


def _ffn(tree: _Tree, block: str, calls: dict[str, list[fx.Node]]) -> _Sublayer | None:
    """The widest pair of linears in a block that leads from a width to itself."""
    linears = _ffn_linears(tree, block)
    ends = {name[len(block) + 1 :] for name in (*tree.linears_in(block), *tree.cores_in(block))}
    best: tuple[int, str, list[str]] | None = None
    for down, (inner, outer) in linears.items():
        goal = down[len(block) + 1 :]
        ups = [
            name
            for name, (n_in, n_out) in linears.items()
            if name != down
            and n_in == outer
            and n_out in (inner, 2 * inner)
            and all(
                flow.reaches(node, goal, ends) for node in calls.get(name[len(block) + 1 :], ())
            )
        ]
        near = [name for name in ups if _parent(name) == _parent(down)]
        if ups and (best is None or inner >= best[0]):
            best = inner, down, near or ups
    if best is None:
        return None
    inner, down, ups = best
    if len(ups) > 1:
        gate, up = _gate_first(block, ups[:2], calls)
        roles = {"up": up, "gate": gate}
    else:
        gate = ups[0]
        roles = {"up" if linears[gate][1] == inner else "gate_up": gate}
    return _Sublayer({**roles, "down": down}, gate, down, down, down)


def _gate_first(block: str, ups: list[str], calls: dict[str, list[fx.Node]]) -> list[str]:
    """Of two linears the one whose output is multiplied as it is comes last."""
    multiplied = [
        any(
            flow.multiplies(user)
            for node in calls.get(name[len(block) + 1 :], ())
            for user in node.users
        )
        for name in ups
    ]
    return ups[::-1] if multiplied == [True, False] else ups


def _mixture(tree: _Tree, block: str) -> str | None:
    """The outermost module in a block that holds experts and no attention."""
    for path in tree.within(block):
        if path != block and path in tree.experts:
            around = [a for a in _above(path) if len(a) > len(block)]
            return next((a for a in reversed(around) if not tree.cores_in(a)), path)
    return None


def _end(tree: _Tree, block: str, sublayer: _Sublayer, calls: dict[str, list[fx.Node]]) -> str:
    """The module that gives the sublayer's output: its last linear, or a dropout after that."""
    start = calls.get(sublayer.calls[len(block) + 1 :], [])
    passed = flow.passed_until_added(start[0]) if len(start) == 1 else None
    end = sublayer.end
    for name in passed or ():
        path = _join(block, name)
        module = tree.modules.get(path)
        if module is None or id(module) in tree.shared:
            continue
        if next(base_of(module).parameters(), None) is not None:
            break
        if len(calls[name]) == 1:
            end = path
    return end


def _role(name: str) -> str | None:
    """What a linear in an attention module is, by its name there."""
    first = name.partition(".")[0].lower()
    return next((role for role, names in _NAMES.items() if re.fullmatch(names, first)), None)


def _is_cross(name: str) -> bool:
    """Whether attention reads another stack's output, by its name in the block."""
    return re.search(r"cross|enc_?dec|encoder_?att", name.lower()) is not None


def _is_causal(core: nn.Module) -> bool:
    for name in ("is_causal", "is_decoder"):
        if isinstance(flag := vars(core).get(name), bool):
            return flag
    taken = inspect.signature(type(core).forward).parameters
    return any(re.search(r"past|cache", name) for name in taken)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(base_of(module), (nn.Dropout, nn.Identity))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _above(path: str) -> Iterator[str]:
    """The names of the modules around one, from the nearest to the model."""
    while path:
        path = _parent(path)
        yield path


def _is_below(name: str, path: str) -> bool:
    """Whether a module is another or in it."""
    return not path or name == path or name.startswith(f"{path}.")
