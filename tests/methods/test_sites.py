"""Where sites land: by name in every family, and by what flows through them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel
from transformers.pytorch_utils import Conv1D

from peftfast.methods import flow
from peftfast.methods.sites import ROLES, SITES, Block, Point, find_blocks, find_norms, linear_sizes
from tests.methods.models import MODELS, inputs_of, made
from tests.methods.places import EXPECTED, expected_points


@pytest.mark.parametrize("family", EXPECTED)
def test_sites_land_where_the_papers_put_them(family: str) -> None:
    blocks = find_blocks(made(family))
    layers = 1 if family == "albert" else 2
    stacks = EXPECTED[family]
    names = [f"{stack.blocks}.{i}" for stack in stacks for i in range(layers)]
    assert [block.name for block in blocks] == names
    assert [block.index for block in blocks] == [*range(layers)] * len(stacks)
    assert [block.stack for block in blocks] == [s.kind for s in stacks for _ in range(layers)]
    for stack, block in zip(stacks, blocks[layers - 1 :: layers], strict=True):
        inside = len(block.name) + 1
        points = {
            site: (point.module[inside:], point.side, point.near[inside:])
            for site, point in block.points.items()
        }
        assert points == expected_points(stack)
        assert set(points) <= set(SITES) and set(block.linears) <= set(ROLES)


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        (
            "llama",
            {
                "attention_q": "self_attn.q_proj",
                "attention_k": "self_attn.k_proj",
                "attention_v": "self_attn.v_proj",
                "attention_output": "self_attn.o_proj",
                "ffn_gate": "mlp.gate_proj",
                "ffn_up": "mlp.up_proj",
                "ffn_down": "mlp.down_proj",
            },
        ),
        (
            "phi3",
            {
                "attention_qkv": "self_attn.qkv_proj",
                "attention_output": "self_attn.o_proj",
                "ffn_gate_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
        ),
        (
            "gpt2_cross",
            {
                "attention_qkv": "attn.c_attn",
                "attention_output": "attn.c_proj",
                "cross_attention_q": "crossattention.q_attn",
                "cross_attention_kv": "crossattention.c_attn",
                "cross_attention_output": "crossattention.c_proj",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
        ),
        (
            "bert",
            {
                "attention_q": "attention.self.query",
                "attention_k": "attention.self.key",
                "attention_v": "attention.self.value",
                "attention_output": "attention.output.dense",
                "ffn_up": "intermediate.dense",
                "ffn_down": "output.dense",
            },
        ),
        (
            "distilbert",
            {
                "attention_q": "attention.q_lin",
                "attention_k": "attention.k_lin",
                "attention_v": "attention.v_lin",
                "attention_output": "attention.out_lin",
                "ffn_up": "ffn.lin1",
                "ffn_down": "ffn.lin2",
            },
        ),
        (
            "t5",
            {
                "attention_q": "layer.0.SelfAttention.q",
                "attention_k": "layer.0.SelfAttention.k",
                "attention_v": "layer.0.SelfAttention.v",
                "attention_output": "layer.0.SelfAttention.o",
                "cross_attention_q": "layer.1.EncDecAttention.q",
                "cross_attention_k": "layer.1.EncDecAttention.k",
                "cross_attention_v": "layer.1.EncDecAttention.v",
                "cross_attention_output": "layer.1.EncDecAttention.o",
                "ffn_gate": "layer.2.DenseReluDense.wi_0",
                "ffn_up": "layer.2.DenseReluDense.wi_1",
                "ffn_down": "layer.2.DenseReluDense.wo",
            },
        ),
        ("deepseek", {"attention_output": "self_attn.o_proj"}),
    ],
)
def test_every_linear_has_its_role(family: str, roles: dict[str, str]) -> None:
    block = find_blocks(made(family))[-1]
    assert dict(block.linears) == {role: f"{block.name}.{name}" for role, name in roles.items()}


@pytest.mark.parametrize(
    ("family", "inside", "all_of_them"),
    [
        ("bert", ["attention.output.LayerNorm", "output.LayerNorm"], 5),
        ("qwen3", ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm",
                   "post_attention_layernorm"], 9),
        ("t5", ["layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"], 12),
    ],
)  # fmt: skip
def test_norms(family: str, inside: list[str], all_of_them: int) -> None:
    model = made(family)
    block = find_blocks(model)[-1]
    assert list(block.norms) == [f"{block.name}.{name}" for name in inside]
    norms = find_norms(model)
    assert len(norms) == all_of_them and set(block.norms) < set(norms)
    assert all("norm" in type(model.get_submodule(name)).__name__.lower() for name in norms)


def test_what_is_no_norm() -> None:
    model = nn.ModuleDict(
        {
            "batch": nn.BatchNorm1d(4),
            "group": nn.GroupNorm(2, 4),
            "plain": nn.LayerNorm(4, elementwise_affine=False),
            "linear": nn.Linear(4, 4),
            "layer": nn.LayerNorm(4),
            "rms": nn.RMSNorm(4),
        }
    )
    assert find_norms(model) == ("layer", "rms")


# What flows


class Seen:
    """What modules got and gave in one forward, each at its first call."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Tensor] = {}

    def __call__(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        given = (*args, *kwargs.values())
        for side, value in (("input", given[0]), ("output", output)):
            value = value[0] if isinstance(value, tuple) else value
            if (name, side) not in self.values:
                self.values[name, side] = value.clone()  # Falcon adds to it in place

    def at(self, point: Point) -> Tensor:
        return self.values[point.module, point.side]


@contextmanager
def hooked(model: nn.Module, names: set[str], seen: Seen) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen(name, args, kwargs, output)

        return model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name) for name in sorted(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: Any, family: str, names: set[str]) -> Seen:
    seen = Seen()
    with hooked(model, names, seen):
        model(**inputs_of(family))
    return seen


def last_of_each_stack(model: nn.Module) -> list[Block]:
    blocks = find_blocks(model)
    return [
        block
        for block, after in zip(blocks, [*blocks[1:], None], strict=True)
        if after is None or after.index == 0
    ]


@pytest.mark.parametrize("family", MODELS)
def test_points_hold_what_their_sites_say(family: str) -> None:
    model = made(family)
    for block in last_of_each_stack(model):
        points, linears = block.points, block.linears
        seen = run(model, family, {*(p.module for p in points.values()), *linears.values()})
        assert all(seen.at(point).shape[-1] == point.features for point in points.values())
        for site, roles in (
            ("attention_input", ("attention_q", "attention_k", "attention_v", "attention_qkv")),
            ("cross_attention_input", ("cross_attention_q",)),
            ("attention_heads", ("attention_output",)),
            ("cross_attention_heads", ("cross_attention_output",)),
            ("ffn_input", ("ffn_gate", "ffn_up", "ffn_gate_up")),
            ("ffn_hidden", ("ffn_down",)),
        ):
            for role in roles:
                if role in linears:
                    assert torch.equal(
                        seen.at(points[site]), seen.values[linears[role], "input"]
                    ), role


@pytest.mark.parametrize("family", MODELS)
def test_an_output_is_added_to_the_residual_as_it_is(family: str) -> None:
    """What is added to a point's value is added to what the next norm reads, or to what the block
    gives; and the residual is no part of the value, which is zero where the last linear is.
    """
    model = made(family)
    for block in last_of_each_stack(model):
        after = {name for name in find_norms(model) if not name.endswith(("q_norm", "k_norm"))}
        if family == "dinov2":  # which scales what a sublayer gives
            after |= {f"{block.name}.layer_scale1", f"{block.name}.layer_scale2"}
        for site, point in block.points.items():
            if not site.endswith("_output"):
                continue
            names = {*after, block.name, point.module}
            plain = run(model, family, names)
            delta = torch.randn(plain.at(point).shape, generator=torch.Generator().manual_seed(3))

            def add(module: Any, args: Any, out: Any, delta: Tensor = delta) -> Any:
                return (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta

            handle = model.get_submodule(point.module).register_forward_hook(add)
            changed = run(model, family, names)
            handle.remove()
            reached = [
                key
                for key, value in plain.values.items()
                if key[0] != point.module
                and value.numel() == delta.numel()
                and torch.allclose(
                    (changed.values[key] - value).reshape(delta.shape), delta, atol=1e-4
                )
            ]
            assert reached, site
            mixture = site == "ffn_output" and "ffn_hidden" not in block.points
            last: Any = model.get_submodule(point.module if mixture else point.near)
            kept = [(parameter, parameter.data) for parameter in last.parameters()]
            for parameter, value in kept:
                parameter.data = torch.zeros_like(value)
            assert run(model, family, {point.module}).at(point).count_nonzero() == 0
            for parameter, value in kept:
                parameter.data = value


# What find_blocks sees through, does without, and leaves alone


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "phi3"])
def test_wrappers_count_as_what_they_wrap(family: str) -> None:
    """LoRA on every linear, and copies of norms that train, leave names and points as they are;
    what is within wrappers is no one's.
    """
    model = made(family)
    before, norms = find_blocks(model), find_norms(model)
    targets = {name for block in before for name in block.linears.values()}
    config = peft.LoraConfig(
        target_modules=sorted(targets), modules_to_save=list(norms), fan_in_fan_out=family == "gpt2"
    )
    wrapped = peft.get_peft_model(model, config)
    inner = wrapped.base_model.model
    assert type(inner.get_submodule(norms[0])).__name__ == "ModulesToSaveWrapper"
    assert find_blocks(inner) == before and find_norms(inner) == norms
    assert [block.name for block in find_blocks(wrapped)] == [
        f"base_model.model.{block.name}" for block in before
    ]


class Wrapper(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 300), nn.Linear(300, 32))

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a wrapper was run")


@pytest.mark.parametrize("family", ["bert", "t5", "mixtral", "phi3", "opt"])
def test_wrapped_points_are_found_again(family: str) -> None:
    model = made(family)
    before, norms = find_blocks(model), find_norms(model)
    for module in {point.module for block in before for point in block.points.values()}:
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, Wrapper(model.get_submodule(module)))
    assert find_blocks(model) == before and find_norms(model) == norms


def test_a_linear_of_any_class() -> None:
    class Packed(nn.Module):
        """As bitsandbytes' 4-bit linears: the weight's shape says nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 10
            self.weight = nn.Parameter(torch.zeros(30, 1, dtype=torch.uint8), requires_grad=False)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10, 6))

    assert linear_sizes(nn.Linear(6, 10)) == linear_sizes(Conv1D(10, 6)) == (6, 10)
    assert linear_sizes(Packed()) == linear_sizes(Plain()) == (6, 10)
    assert linear_sizes(Wrapper(Packed())) == (6, 10)
    for other in (nn.Embedding(6, 10), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 10)), nn.ReLU()):
        assert linear_sizes(other) is None


def test_which_of_two_linears_is_the_gate() -> None:
    """The one that the activation is on, whichever was made first."""
    model = made("llama")
    for layer in model.model.layers:
        children = layer.mlp._modules
        children["gate_proj"] = children.pop("gate_proj")
    linears = find_blocks(model)[0].linears
    assert linears["ffn_gate"] == "model.layers.0.mlp.gate_proj"
    assert linears["ffn_up"] == "model.layers.0.mlp.up_proj"


def test_stages_are_one_stack() -> None:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2
    )
    blocks = find_blocks(SwinModel(config))
    assert [(block.name, block.index) for block in blocks] == [
        ("encoder.layers.0.blocks.0", 0),
        ("encoder.layers.1.blocks.0", 1),
        ("encoder.layers.1.blocks.1", 2),
    ]
    assert [block.points["ffn_output"].features for block in blocks] == [8, 16, 16]


def test_experts_in_a_list() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(4)
            )

        def forward(self, x: Tensor) -> Tensor:
            scores = self.gate(x).softmax(-1)
            return sum(e(x) * scores[..., i, None] for i, e in enumerate(self.experts))

    model = made("llama")
    for layer in model.model.layers:
        layer.mlp = Experts()
    block = find_blocks(model)[1]
    near = "model.layers.1.self_attn.o_proj"
    assert block.points["ffn_output"] == Point("model.layers.1.mlp", "output", 32, near)
    assert "ffn_hidden" not in block.points and "ffn_down" not in block.linears


def test_a_state_space_mixer_is_no_attention() -> None:
    """Beside attention it is passed over; a layer that has it instead keeps its other sublayer."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.in_proj, self.out_proj = nn.Linear(32, 140), nn.Linear(64, 32)
            self.conv1d = nn.Conv1d(64, 64, 4, groups=64)

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            return self.out_proj(self.in_proj(hidden_states)[..., :64]), None

    model = made("llama")
    whole = find_blocks(model)
    first, second = model.model.layers
    first.self_attn = Mixer()
    attention = second.self_attn
    del second.self_attn
    second.mixer, second.self_attn = Mixer(), attention
    without, beside = find_blocks(model)
    assert beside == whole[1]
    ffn = {site: point for site, point in whole[0].points.items() if site.startswith("ffn")}
    assert dict(without.points) == ffn and without.stack == "decoder"
    first.mlp, second.mlp = nn.Identity(), nn.Identity()
    (alone,) = find_blocks(model)
    assert alone.name == whole[1].name
    assert set(alone.points) == {"attention_input", "attention_heads", "attention_output"}


def test_attention_without_an_output_projection_has_no_sites() -> None:
    model = made("llama")
    for layer in model.model.layers:
        del layer.self_attn.o_proj
    for block in find_blocks(model):
        assert set(block.points) == {"ffn_input", "ffn_hidden", "ffn_output"}


def test_the_widest_feed_forward_network_is_the_sublayer() -> None:
    """A bottleneck that someone has put into a block is not taken for it."""
    model = made("bert")
    before = find_blocks(model)
    for block in before:
        layer = model.get_submodule(block.name)
        layer.adapter = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    assert find_blocks(model) == before


@pytest.mark.parametrize(
    ("family", "outputs"),
    [
        ("bert", ("attention.output.dense", "output.dense")),
        ("gpt2", ("attn.resid_dropout", "mlp.c_proj")),
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
    ],
)
def test_without_a_forward_to_follow(family: str, outputs: tuple[str, str]) -> None:
    """Then the last linears are the ends, and a dropout that its name gives away in attention."""
    model = made(family)
    kind = type(model.get_submodule(find_blocks(model)[0].name))

    class Opaque(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states[: int(hidden_states.abs().sum())]

    for block in find_blocks(model):
        model.get_submodule(block.name).__class__ = Opaque
    points = find_blocks(model)[0].points
    ends = points["attention_output"].module, points["ffn_output"].module
    assert tuple(re.sub(r"^.*\.0\.", "", end) for end in ends) == outputs


def test_a_dropout_of_all_layers_is_no_ones_output() -> None:
    model = made("bert")
    layers, dropout = model.bert.encoder.layer, nn.Dropout(0.1)
    for layer in layers:
        layer.output.dropout = dropout
    for i, block in enumerate(find_blocks(model)):
        assert block.points["ffn_output"].module == f"bert.encoder.layer.{i}.output.dense"


def test_the_model_is_left_alone() -> None:
    """No forward of it runs, not even one that is replaced on an instance; values may be anywhere;
    no random number is drawn.
    """

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    expected = find_blocks(made("t5"))
    with torch.device("meta"):
        model = made("t5")
    for module in model.modules():
        module.register_forward_hook(never)
        module.register_forward_pre_hook(never)
        module.forward = never
    before = [(dict(vars(m)), dict(m._modules)) for m in model.modules()]
    state = torch.get_rng_state()
    assert find_blocks(model) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert before == [(dict(vars(m)), dict(m._modules)) for m in model.modules()]


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ModuleList([nn.LSTM(4, 4)])]
)
def test_a_model_without_blocks(model: nn.Module) -> None:
    message = (
        f"no transformer block was found in {type(model).__name__}: looked in every ModuleList"
    )
    with pytest.raises(ValueError, match=message):
        find_blocks(model)


# The flow of values


def traced(forward: Callable[..., Any], **children: nn.Module) -> Any:
    module = type("Traced", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        module.add_module(name, child)
    return flow.trace(module, lambda child: True)


class TestPassed:
    def passed(self, forward: Callable[..., Any]) -> list[str] | None:
        children = {name: nn.Identity() for name in ("start", "one", "two", "three")}
        graph = traced(forward, **children)
        return flow.passed_until_added(flow.calls(graph)["start"][0])

    def test_one_after_the_other_until_the_sum(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.two(self.one(self.start(x).view(2, -1) * 0.5))
            return self.three(x + nn.functional.dropout(y, 0.1))

        assert self.passed(forward) == ["one", "two"]

    def test_first_element_of_a_tuple(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y, weights = self.start(x)
            return x + self.one(y), self.two(weights)

        assert self.passed(forward) == ["one"]

    def test_a_condition_on_a_symbol_is_false(self) -> None:
        def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.start(x)
            if y.dtype == torch.float16 or mask.any():
                y = self.one(y)
            return x + self.two(y)

        assert self.passed(forward) == ["two"]

    @pytest.mark.parametrize(
        "forward",
        [
            lambda self, x: self.one(self.start(x)),
            lambda self, x: x + self.start(x).softmax(-1),
            lambda self, x: x * self.start(x) + x,
            lambda self, x: (lambda y: y + self.one(y))(self.start(x)),
            lambda self, x: (x,) + self.start(x),
            lambda self, x: self.start(x) + 1.0,
        ],
        ids=["never added", "changed", "multiplied", "branches", "to a tuple", "to a number"],
    )
    def test_what_is_no_end_of_a_sublayer(self, forward: Callable[..., Any]) -> None:
        assert self.passed(forward) is None

    def test_as_in_evaluation(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.start(x)
            return x + (self.one(y) if self.training else self.two(y))

        assert self.passed(forward) == ["two"]

    def test_no_graph_where_a_forward_needs_values(self) -> None:
        assert traced(lambda self, x: x[int(x)], one=nn.Identity()) is None
