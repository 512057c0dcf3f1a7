"""Where the packages lie, and how the native libraries are built. Everything else about the
distribution is in pyproject.toml.

`kernels/` and `examples/` are folders of the repository, not packages: Python run from the
repository root would otherwise take `kernels` for the Hugging Face package of that name. What they
hold is mapped onto import names here, which wheels, source distributions and editable installs all
follow.

Two shared libraries are compiled into `peftfast/native`, without torch or Python headers:
libpeftfast_cpu.so by the C++ compiler (CXX, CXXFLAGS), libpeftfast_cuda.so by nvcc (NVCC). The
environment variable PEFTFAST_BUILD says which:

    auto  (the default) those whose compiler is found; a failure is a warning, and the package
          works without the library
    none  neither
    cpu   the first, or the build fails
    cuda  both, or the build fails
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, OptionError

PACKAGE = Path("peftfast", "native")
SOURCES = Path("csrc")
MODES = {"auto": ("cpu", "cuda"), "none": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}
KINDS = ("cpu", "cuda")

# No contraction: results must not depend on which multiplications and additions a compiler joins.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC"]
CXX_FLAGS += ["-fno-exceptions", "-fno-rtti", "-pthread"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHES = ("80", "86", "89", "90a", "100")


class BuildNative(Command):
    """Compile the native libraries, beside the package's modules."""

    description = "compile the native libraries (csrc)"
    user_options = [("build-lib=", "b", "folder to build into"), ("force", "f", "build anew")]
    boolean_options = ["force"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_temp: str | None = None
        self.force: bool | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build",
            ("build_lib", "build_lib"),
            ("build_temp", "build_temp"),
            ("force", "force"),
        )

    def run(self) -> None:
        mode = os.environ.get("PEFTFAST_BUILD") or "auto"
        if mode not in MODES:
            raise OptionError(f"PEFTFAST_BUILD is {mode!r}; allowed: {', '.join(MODES)}")
        for kind in KINDS:
            library = self._library(kind)
            if kind not in MODES[mode]:
                library.unlink(missing_ok=True)
            elif self.force or _stale(library):
                try:
                    self._compile(kind, library)
                except CompileError as error:
                    library.unlink(missing_ok=True)
                    if mode != "auto":
                        raise
                    logging.warning("peftfast works without %s: %s", library.name, error)

    def get_source_files(self) -> list[str]:
        return sorted(str(file) for file in _sources())

    def get_outputs(self) -> list[str]:
        assert self.build_lib is not None
        built = (self._library(kind) for kind in KINDS)
        return [str(self.build_lib / PACKAGE / file.name) for file in built if file.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        return {output: str(PACKAGE / Path(output).name) for output in self.get_outputs()}

    def _library(self, kind: str) -> Path:
        assert self.build_lib is not None
        folder = PACKAGE if self.editable_mode else self.build_lib / PACKAGE
        return folder / f"libpeftfast_{kind}.so"

    def _compile(self, kind: str, library: Path) -> None:
        assert self.build_temp is not None
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp, kind)
        objects.mkdir(parents=True, exist_ok=True)
        # Finished, then put in place: a process may have the old one open.
        fresh = objects / library.name
        (_compile_cpu if kind == "cpu" else _compile_cuda)(fresh, objects)
        shutil.copy(fresh, library.with_suffix(".new"))
        os.replace(library.with_suffix(".new"), library)


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    """With libraries inside, the wheel is for this platform, and for any Python 3."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        if self.get_finalized_command("build_native").get_outputs():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def _sources() -> list[Path]:
    return [file for file in SOURCES.rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".cuh")]


def _stale(library: Path) -> bool:
    if not library.exists():
        return True
    built = library.stat().st_mtime
    return any(file.stat().st_mtime > built for file in [Path("setup.py"), *_sources()])


def _compile_cpu(library: Path, objects: Path) -> None:
    compiler = _cxx()
    flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    sources = sorted(SOURCES.glob("cpu/*.cpp"))
    outputs = [str(objects / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, output: str) -> None:
        _run([*compiler, *flags, "-c", str(source), "-o", output])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, outputs))
    _run([*compiler, *flags, "-shared", *outputs, "-ldl", "-o", str(library)])


def _compile_cuda(library: Path, objects: Path) -> None:
    sources = sorted(str(source) for source in SOURCES.glob("cuda/*.cu"))
    if not sources:
        raise CompileError(f"{SOURCES / 'cuda'} holds no sources")
    compiler = _nvcc()
    known = _run([*compiler, "--list-gpu-code"]).split()
    # nvcc lists sm_90 and compiles sm_90a, its own instructions included, too.
    arches = [arch for arch in CUDA_ARCHES if f"sm_{arch.rstrip('a')}" in known]
    if not arches:
        raise CompileError(f"{shlex.join(compiler)} compiles for none of sm_{CUDA_ARCHES}")
    newest = arches[-1].rstrip("a")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = [*NVCC_FLAGS, f"--threads={os.cpu_count()}", *targets]
    _run([*compiler, *flags, "-shared", *sources, "-o", str(library)])


def _cxx() -> list[str]:
    if asked := shlex.split(os.environ.get("CXX", "")):
        return asked
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise CompileError("no C++ compiler was found (c++, g++, clang++); CXX names another")


def _nvcc() -> list[str]:
    if asked := shlex.split(os.environ.get("NVCC", "")):
        return asked
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    if found := shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders)):
        return [found]
    raise CompileError("nvcc was not found (on PATH, in CUDA_HOME); NVCC names it")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{shlex.join(command)}: {error}") from None
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


setup(
    packages=[
        *find_packages(include=["peftfast", "peftfast.*"]),
        *find_packages("kernels"),
        "peftfast_data",
    ],
    package_dir={
        "peftfast_kernels": "kernels/peftfast_kernels",
        "peftfast_data": "examples/data",
    },
    package_data={
        "peftfast": ["py.typed"],
        "peftfast_data": ["*/*"],
    },
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
)
