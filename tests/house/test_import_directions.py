"""Imports go one way: analysis, serving, memory -> patching -> methods -> nn -> ops ->
{native, kernels} -> reference (kernels import nothing of it).

The files are parsed, not imported, so that a lazy import inside a function counts too.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BELOW = ("nn", "ops", "reference")
LOWER: dict[str, tuple[str, ...]] = {
    "memory": ("patching", "methods", *BELOW),  # predictions are of patched models
    "serving": ("methods", *BELOW),
    "analysis": ("methods", *BELOW),
    "patching": ("methods", *BELOW),
    "methods": BELOW,
    "nn": ("ops", "reference"),
    "ops": ("native", "reference"),
    "native": ("reference",),
    "reference": (),
}
# Third-party packages that a layer may import; a layer that is not named here may import any.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "nn": ("torch",),
    "ops": ("torch",),
    "native": ("torch",),
    "reference": ("torch",),
    "peftfast_kernels": ("torch", "triton"),
}
STANDARD = sys.stdlib_module_names | {"__future__"}


@dataclass(frozen=True)
class Import:
    """One imported name, as a dotted path, and whether it is imported with the module itself."""

    name: str
    line: int
    lazy: bool


def imports(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import of a module's source; `from a import b` gives `a.b`, relative ones resolved."""
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source)
    lazy_lines = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                anchor = ".".join(parents[: len(parents) - node.level + 1])
                base = f"{anchor}.{base}" if base else anchor
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(name, node.lineno, node.lineno in lazy_lines) for name in names]
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports against the rules, one line each."""
    parts = module.split(".")
    layer = parts[1] if parts[0] == "peftfast" and len(parts) > 1 else parts[0]
    wrong = []
    for found in imports(source, module, is_package):
        top, *rest = found.name.split(".")
        where = f"{module}:{found.line} imports {found.name}"
        if top == "peftfast":
            if layer == "peftfast_kernels":
                wrong.append(f"{where}: kernels know nothing of peftfast")
            elif layer in LOWER:
                target = rest[0] if rest else ""
                if target not in (layer, *LOWER[layer]):
                    wrong.append(f"{where}: {layer} may import {LOWER[layer]} and itself")
        elif top == "peftfast_kernels":
            if layer in LOWER and layer != "ops":
                wrong.append(f"{where}: only ops launch kernels")
            elif layer == "ops" and not found.lazy:
                wrong.append(f"{where}: ops import kernels inside functions only")
        elif top == "triton" and layer != "peftfast_kernels":
            wrong.append(f"{where}: triton belongs to the kernels")
        elif top not in STANDARD and top not in THIRD_PARTY.get(layer, (top,)):
            wrong.append(f"{where}: {layer} may import {THIRD_PARTY[layer]} and no other package")
    return wrong


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of both packages."""
    found = []
    for base in (ROOT, ROOT / "kernels"):
        package = base / ("peftfast" if base == ROOT else "peftfast_kernels")
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_module_imports_downwards_only(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_layer_is_found() -> None:
    names = {module for module, _ in modules()}
    assert {"peftfast.ops.dispatch", "peftfast.reference", "peftfast_kernels"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("peftfast.ops.lora", "from peftfast.nn import LoRALinear"),
        ("peftfast.ops.lora", "def f():\n    from peftfast import patching"),
        ("peftfast.ops.lora", "import peftfast_kernels.lora"),
        ("peftfast.ops.lora", "import peft"),
        ("peftfast.nn.lora", "from ..patching import patch"),
        ("peftfast.nn.lora", "from peftfast_kernels import lora"),
        ("peftfast.patching.rewire", "import peftfast.memory.measure"),
        ("peftfast.patching.rewire", "import triton"),
        ("peftfast.native.nf4", "from peftfast.ops import nf4"),
        ("peftfast.reference.nf4", "from peftfast.native import library"),
        ("peftfast.reference.lora", "import numpy"),
        ("peftfast.reference.lora", "from peftfast.ops import dispatch"),
        ("peftfast_kernels.lora", "from peftfast.reference import lora"),
        ("peftfast_kernels.lora", "import numpy as np"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("peftfast.ops.lora", "def f():\n    from peftfast_kernels import lora"),
        ("peftfast.ops.lora", "from .dispatch import choose\nimport math, torch.nn"),
        ("peftfast.patching.rewire", "from peftfast.nn import LoRALinear\nimport peft"),
        ("peftfast.cli", "from peftfast import patching, ops"),
        ("peftfast_kernels.lora", "import triton.language as tl\nfrom . import tiles"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []
