"""Listings of cuobjdump, read without compiling anything."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the tools come in triton's wheel")
from peftfast_kernels import cubin
from peftfast_kernels.cubin import CubinFacts, parse_listing, read_cubin

LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:168 STACK:24 SHARED:{shared} LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_{arch}
		Function : kernel
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe40000000f00 */
        /*0010*/                   STL [R1], R4 ;                /* 0x0000000401007387 */
        /*0020*/              @!P0 STL.64 [R1+0x8], R6 ;         /* 0x0000080601000987 */
        /*0030*/             @UPT  LDL.LU.128 R8, [R1] ;         /* 0x0000000001087983 */
        /*0040*/                   LDL.U8 R8, [R1] ;             /* 0x0000000001087983 */
        /*0050*/               @P1 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/              @UP0 UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], UP0 ;
        /*0080*/                   FFMA R1, R2, R3, R4 ;         /* LDL HMMA in a comment */
        /*fff0*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
       /*10000*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
       /*10010*/               @P0 LDG.E.NA.128.CONSTANT R4, [R8.64] ;
       /*10020*/                   STG.E.64 [R8.64], R4 ;
"""
# A second kernel of the same cubin; cuobjdump lists resources first, then code.
SECOND_USAGE = """ Function other:
  REG:40 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SECOND_CODE = """		Function : other
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
        /*0000*/                   STG.E.128 [R8.64], R4 ;
        /*0010*/                   STL [R1], R4 ;
"""


def parsed(arch: int, shared: int) -> CubinFacts:
    kernels = parse_listing(LISTING.format(arch=arch, shared=shared), arch)
    assert list(kernels) == ["kernel"]
    return kernels["kernel"]


def two_kernels() -> str:
    listing = LISTING.format(arch=80, shared=512)
    return listing.replace("\n\tcode for", SECOND_USAGE + "\n\tcode for", 1) + SECOND_CODE


def test_spills_are_counted_by_width_and_tensor_cores_by_opcode() -> None:
    assert parsed(80, 512) == CubinFacts(
        registers=168,
        stack_bytes=24,
        spill_bytes=4 + 8 + 16 + 1,
        static_shared_bytes=512,
        mma={"HMMA": 1, "HGMMA": 1, "UTCHMMA": 1, "IMMA": 1},
        wide={"LDGSTS.128": 1, "LDG.128": 1},
    )


def test_each_kernel_of_a_cubin_has_its_own_facts() -> None:
    kernels = parse_listing(two_kernels(), 80)
    assert kernels["kernel"] == parsed(80, 512)
    assert kernels["other"] == CubinFacts(40, 0, 4, 2048, {}, {"STG.128": 1})


def test_functions_that_a_kernel_calls_count_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cubin, "_disassemble", lambda content: two_kernels())
    facts = read_cubin(b"a cubin", 80)
    assert (facts.registers, facts.stack_bytes, facts.static_shared_bytes) == (168, 24, 2048)
    assert facts.spill_bytes == 4 + 8 + 16 + 1 + 4
    assert facts.wide == {"LDGSTS.128": 1, "LDG.128": 1, "STG.128": 1}


@pytest.mark.parametrize(("arch", "native"), [(80, 2), (86, 2), (89, 2), (90, 1), (100, 1)])
def test_native_counts_only_the_architectures_own(arch: int, native: int) -> None:
    assert parsed(arch, 1024).native_mma(arch) == native


@pytest.mark.parametrize(("arch", "own"), [(89, 1024), (90, 0), (100, 0)])
def test_the_kilobyte_of_the_system_is_not_the_kernels(arch: int, own: int) -> None:
    assert parsed(arch, 1024).static_shared_bytes == own


def test_code_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="for sm_90, not for sm_100"):
        parse_listing(LISTING.format(arch=90, shared=0), 100)


def test_a_listing_without_instructions_is_refused() -> None:
    listing = LISTING.format(arch=80, shared=0)
    with pytest.raises(ValueError, match="no instructions"):
        parse_listing(listing[: listing.index("        /*0000*/")], 80)


def test_what_is_no_cubin_is_refused() -> None:
    with pytest.raises(ValueError, match="cuobjdump can't read"):
        read_cubin(b"not a cubin", 80)


def test_a_cubin_is_disassembled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[bytes] = []

    def disassemble(content: bytes) -> str:
        read.append(content)
        return LISTING.format(arch=90, shared=1024)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cubin, "_disassemble", disassemble)
    first, again, other = read_cubin(b"one", 90), read_cubin(b"one", 90), read_cubin(b"two", 90)
    assert first == again == other == parsed(90, 1024)
    assert read == [b"one", b"two"]
    with pytest.raises(ValueError, match="not for sm_80"):
        read_cubin(b"one", 80)
