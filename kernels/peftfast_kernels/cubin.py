"""What compiled kernels take of the machine, read from their cubin with triton's own tools.

One `cuobjdump -res-usage -sass` a cubin. Spilled bytes are counted in the machine code itself:
every STL and LDL instruction times its width, stores and loads together, each instruction once
however often it runs. That is the sum of "spill stores" and "spill loads" that `ptxas -v` prints,
but it needs no second compilation and is there too when the cubin comes from triton's cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from triton import knobs
from triton.runtime.cache import get_cache_manager

# From sm_90 on, a cubin's static shared memory holds the 1 KiB that the system keeps of each block,
# which is not part of what a block may use.
_SYSTEM_SHARED = {90: 1024, 100: 1024}

_TARGET = re.compile(r"^\s*code for sm_(\d+)", re.MULTILINE)
_USAGE = re.compile(r"^ Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.MULTILINE)
_CODE = re.compile(r"^\t\tFunction : (\S+)$", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:\d+|T)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.MULTILINE
)
_MMA = re.compile(r"UTC[A-Z]*MMA|[A-Z]GMMA|[BDHIOQ]MMA")
_NATIVE = {90: re.compile(r"[A-Z]GMMA"), 100: re.compile(r"UTC[A-Z]*MMA")}
_NATIVE_BEFORE = re.compile(r"[BDHIOQ]MMA")
_KEPT_NAME = "cubin_facts.json"
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_WIDE = ("LDG", "STG", "LDGSTS")


@dataclass(frozen=True)
class CubinFacts:
    """Registers of a thread, bytes of a thread's stack frame, bytes that spill code moves to and
    from local memory, bytes of static shared memory of a block, tensor-core instructions by opcode,
    and accesses of 16 bytes to global memory ("LDG.128", "STG.128", "LDGSTS.128").
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    mma: dict[str, int]
    wide: dict[str, int]

    def native_mma(self, arch: int) -> int:
        """Number of tensor-core instructions of the architecture's own generation."""
        pattern = _NATIVE.get(arch, _NATIVE_BEFORE)
        return sum(count for kind, count in self.mma.items() if pattern.fullmatch(kind))


def read_cubin(cubin: bytes, arch: int) -> CubinFacts:
    """Facts of a cubin with one kernel and the functions that it calls. Raises ValueError where it
    isn't machine code of sm_`arch`.
    """
    functions = list(read_kernels(cubin, arch).values())
    return CubinFacts(
        registers=max(facts.registers for facts in functions),
        stack_bytes=max(facts.stack_bytes for facts in functions),
        spill_bytes=sum(facts.spill_bytes for facts in functions),
        static_shared_bytes=max(facts.static_shared_bytes for facts in functions),
        mma=dict(sum((Counter(facts.mma) for facts in functions), Counter())),
        wide=dict(sum((Counter(facts.wide) for facts in functions), Counter())),
    )


def read_kernels(cubin: bytes, arch: int) -> dict[str, CubinFacts]:
    """Facts of each kernel of a cubin, by its name. Raises ValueError where it isn't machine code
    of sm_`arch`.

    Disassembling a large kernel takes half a second, so the facts are kept in triton's cache, under
    a key of the cubin and of this file.
    """
    content = hashlib.sha256(Path(__file__).read_bytes() + f"sm_{arch}".encode() + cubin)
    cache = get_cache_manager(content.hexdigest())
    kept = cache.get_file(_KEPT_NAME)
    if kept is not None and not knobs.compilation.always_compile:
        known = json.loads(Path(kept).read_text())
        return {name: CubinFacts(**facts) for name, facts in known.items()}
    kernels = parse_listing(_disassemble(cubin), arch)
    content_kept = json.dumps({name: asdict(facts) for name, facts in kernels.items()})
    cache.put(content_kept, _KEPT_NAME, binary=False)
    return kernels


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
        )
    if listing.returncode != 0:
        raise ValueError(f"cuobjdump can't read the cubin: {listing.stderr.strip()}")
    return listing.stdout


def parse_listing(listing: str, arch: int) -> dict[str, CubinFacts]:
    """Facts of each kernel from what `cuobjdump -res-usage -sass` prints.

    Raises ValueError where the listing is of another architecture, or a kernel has no instructions
    or no resource usage.
    """
    targets = set(_TARGET.findall(listing))
    if targets != {str(arch)}:
        found = ", ".join(f"sm_{target}" for target in sorted(targets)) or "no architecture"
        raise ValueError(f"the machine code is for {found}, not for sm_{arch}")
    usage = {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(listing)}
    _, *parts = _CODE.split(listing)
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    opcodes = {name: _INSTRUCTION.findall(text) for name, text in code.items()}
    if not usage or usage.keys() != opcodes.keys() or not all(opcodes.values()):
        raise ValueError("cuobjdump listed no resource usage or no instructions")
    return {
        name: _facts(usage[name], [opcode.split(".") for opcode in opcodes[name]], arch)
        for name in usage
    }


def _facts(usage: tuple[int, ...], opcodes: list[list[str]], arch: int) -> CubinFacts:
    registers, stack, shared = usage
    return CubinFacts(
        registers=registers,
        stack_bytes=stack,
        spill_bytes=sum(
            next((_WIDTH[part] for part in modifiers if part in _WIDTH), 4)
            for base, *modifiers in opcodes
            if base in ("STL", "LDL")
        ),
        static_shared_bytes=max(0, shared - _SYSTEM_SHARED.get(arch, 0)),
        mma=dict(Counter(base for base, *_ in opcodes if _MMA.fullmatch(base))),
        wide=dict(
            Counter(
                f"{base}.128"
                for base, *modifiers in opcodes
                if base in _WIDE and "128" in modifiers
            )
        ),
    )
