"""What a compiled kernel takes of the machine, read from its cubin with triton's own tools.

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
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:\d+|T)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.MULTILINE
)
_MMA = re.compile(r"UTC[A-Z]*MMA|[A-Z]GMMA|[BDHIOQ]MMA")
_NATIVE = {90: re.compile(r"[A-Z]GMMA"), 100: re.compile(r"UTC[A-Z]*MMA")}
_NATIVE_BEFORE = re.compile(r"[BDHIOQ]MMA")
_KEPT_NAME = "cubin_facts.json"
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class CubinFacts:
    """Registers of a thread, bytes of a thread's stack frame, bytes that spill code moves to and
    from local memory, bytes of static shared memory of a block, and tensor-core instructions by
    opcode.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    mma: dict[str, int]

    def native_mma(self, arch: int) -> int:
        """Number of tensor-core instructions of the architecture's own generation."""
        pattern = _NATIVE.get(arch, _NATIVE_BEFORE)
        return sum(count for kind, count in self.mma.items() if pattern.fullmatch(kind))


def read_cubin(cubin: bytes, arch: int) -> CubinFacts:
    """Facts of one cubin. Raises ValueError where it isn't machine code of sm_`arch`.

    Disassembling a large kernel takes half a second, so the facts are kept in triton's cache, under
    a key of the cubin and of this file.
    """
    content = hashlib.sha256(Path(__file__).read_bytes() + f"sm_{arch}".encode() + cubin)
    cache = get_cache_manager(content.hexdigest())
    kept = cache.get_file(_KEPT_NAME)
    if kept is not None and not knobs.compilation.always_compile:
        return CubinFacts(**json.loads(Path(kept).read_text()))
    facts = parse_listing(_disassemble(cubin), arch)
    cache.put(json.dumps(asdict(facts)), _KEPT_NAME, binary=False)
    return facts


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


def parse_listing(listing: str, arch: int) -> CubinFacts:
    """Facts from what `cuobjdump -res-usage -sass` prints.

    Raises ValueError where the listing is of another architecture, or has no instructions or no
    resource usage.
    """
    targets = set(_TARGET.findall(listing))
    if targets != {str(arch)}:
        found = ", ".join(f"sm_{target}" for target in sorted(targets)) or "no architecture"
        raise ValueError(f"the machine code is for {found}, not for sm_{arch}")
    usage = [tuple(map(int, found)) for found in _USAGE.findall(listing)]
    opcodes = [opcode.split(".") for opcode in _INSTRUCTION.findall(listing)]
    if not usage or not opcodes:
        raise ValueError("cuobjdump listed no resource usage or no instructions")
    registers, stack, shared = (max(column) for column in zip(*usage, strict=True))
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
    )
