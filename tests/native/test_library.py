"""Loading the libraries: what is missing, instruction sets, threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftfast.native import library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing loaded, before and after."""
    library._load.cache_clear()
    yield
    library._load.cache_clear()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("kind", "compiler"), [("cpu", "C++ compiler"), ("cuda", "nvcc")])
def test_a_library_that_was_not_built(
    kind: str, compiler: str, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    reason = library.missing(kind)
    assert reason is not None
    assert f"libpeftfast_{kind}.so is not built: when peftfast was" in reason
    assert f"no {compiler}, or it failed" in reason
    assert f"PEFTFAST_BUILD={kind}" in reason
    with pytest.raises(RuntimeError, match="is not built"):
        getattr(library, kind)()


def test_a_file_that_is_no_library(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.path("cpu").write_text("rubbish")
    assert "libpeftfast_cpu.so can't be loaded:" in str(library.missing("cpu"))


def test_a_library_of_another_interface(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library._ABI, "cpu", 999)
    reason = str(library.missing("cpu"))
    assert "has interface 1 and this version of peftfast needs 999" in reason
    assert "reinstall peftfast" in reason


@pytest.mark.skipif(not shutil.which("cc"), reason="makes a library with the C compiler")
@pytest.mark.parametrize(
    "source", ["int other(void) { return 1; }", "int pf_cpu_abi(void) { return 1; }"]
)
def test_a_library_without_the_functions(
    source: str, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other.c").write_text(source)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    command = ["cc", "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", library.path("cpu")]
    subprocess.run(command, check=True)
    assert "is no library of peftfast's: " in str(library.missing("cpu"))


def test_the_interface_is_that_of_the_headers() -> None:
    for kind, header in (("cpu", "peftfast.h"), ("cuda", "peftfast_cuda.h")):
        text = (ROOT / "csrc" / header).read_text()
        assert f"#define PF_{kind.upper()}_ABI {library._ABI[kind]}\n" in text
        for name in library._SIGNATURES[kind]:
            assert f" {name}(" in text or f"* {name}(" in text


def test_every_instruction_set_is_what_it_says(isa: str) -> None:
    assert library.isa() == isa


def test_none_is_the_best_instruction_set() -> None:
    library.use_isa("portable")
    library.use_isa(None)
    assert library.isa() == library.cpu().pf_cpu_best_isa().decode()


@pytest.mark.parametrize("value", ["sse9", "AVX2", " "])
def test_an_unknown_instruction_set_is_an_error(
    value: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTFAST_CPU_ISA", value)
    for call in (library.cpu, library.isa, lambda: library.missing("cpu")):
        with pytest.raises(ValueError, match="PEFTFAST_CPU_ISA is ") as caught:
            call()
        assert repr(value) in str(caught.value)
        assert "allowed: 'portable', 'avx2', 'avx512' (the best here is '" in str(caught.value)


def test_an_instruction_set_that_the_machine_lacks_is_an_error() -> None:
    for name in library.ISAS:
        if library.cpu().pf_cpu_use_isa(name.encode()) == 3:
            with pytest.raises(ValueError, match="this build or this machine lacks it"):
                library.use_isa(name)
            return
    pytest.skip("this machine has them all")


def test_the_message_for_an_instruction_set_that_the_machine_lacks() -> None:
    class Lacking:
        def pf_cpu_use_isa(self, name: bytes) -> int:
            return 3

        def pf_cpu_best_isa(self) -> bytes:
            return b"avx2"

    with pytest.raises(ValueError) as caught:
        library._choose_isa(Lacking(), "avx512", "PEFTFAST_CPU_ISA")
    assert str(caught.value) == (
        "PEFTFAST_CPU_ISA is 'avx512'; this build or this machine lacks it (the best here is"
        " 'avx2')"
    )


PARALLEL = """
import os, torch
from peftfast.native import dropout, library

def runtimes():
    names = {os.path.basename(line.split()[-1]) for line in open("/proc/self/maps") if "/" in line}
    return {name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))}

torch.set_num_threads(2)
torch.ones(1 << 20).add(1)
before = runtimes(), len(os.listdir("/proc/self/task"))
dropout.keep_mask(torch.tensor(1), 1024, 1024, 0.5)
after = runtimes(), len(os.listdir("/proc/self/task"))
print(library.isa(), library.cpu().pf_cpu_threading().decode(), len(before[0]), before == after)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_runtime_and_its_threads_serve_torch_and_this() -> None:
    done = run(PARALLEL, PEFTFAST_CPU_ISA="portable", OMP_NUM_THREADS="2")
    assert done.stdout.split() == ["portable", "OpenMP", "1", "True"], done.stderr


WITHOUT_OPENMP = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
seed = ctypes.c_int64(1)
masks = []
for threads in (1, 3):
    masks.append((ctypes.c_uint8 * 400_000)(*b"7" * 400_000))
    library.pf_cpu_dropout_mask(
        ctypes.byref(seed), 0, ctypes.c_int64(400), ctypes.c_int64(1000), masks[-1], threads)
library.pf_cpu_threading.restype = ctypes.c_char_p
share = sum(masks[0]) / len(masks[0])
print(library.pf_cpu_threading().decode(), bytes(masks[0]) == bytes(masks[1]), 0.49 < share < 0.51)
"""


def test_without_an_openmp_runtime_it_makes_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENMP, str(library.path("cpu"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["threads", "True", "True"], done.stderr
