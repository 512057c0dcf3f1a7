"""What is built from the repository, and what the metadata promises."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import peftfast

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("peftfast", "kernels/peftfast_kernels", "examples/data")
PACKAGES = ("peftfast", "peftfast_kernels", "peftfast_data")
NATIVE = Path("peftfast", "native")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that building leaves nothing in the repository."""
    return copy_of_repository(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def own_checkout(tmp_path: Path) -> Path:
    """The same for one test, which may change it."""
    (tmp_path / "checkout").mkdir()
    return copy_of_repository(tmp_path / "checkout")


def copy_of_repository(copy: Path) -> Path:
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    left = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for folder in (*FOLDERS, "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left)
    (copy / "tests").mkdir()
    (copy / "tests" / "__init__.py").touch()
    (copy / "benchmarks").mkdir()
    (copy / "benchmarks" / "__init__.py").touch()
    return copy


def run_build(
    checkout: Path, hook: str, out: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one hook of the build backend in the checkout, as PEFTFAST_BUILD=none unless another
    mode is given, and without optimising, which takes longer.
    """
    out.mkdir()
    code = f"""
import sys
from setuptools import build_meta
build_meta.{hook}(sys.argv[1])
assert "torch" not in sys.modules
"""
    known = {"PEFTFAST_BUILD": "none", "CXXFLAGS": "-O0"}
    return subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=checkout,
        env={**os.environ, **known, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def build(checkout: Path, hook: str, out: Path, **environment: str) -> Path:
    """The same, which must succeed; the file that it made."""
    done = run_build(checkout, hook, out, **environment)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def origins(site: Path, cwd: Path) -> list[str]:
    """Where a Python that sees only `site` finds the three packages and the data."""
    code = """
import importlib.resources, importlib.util, site, sys
site.addsitedir(sys.argv[1])
for name in ("peftfast", "peftfast_kernels", "peftfast_data"):
    print(importlib.util.find_spec(name).origin)
print(importlib.resources.files("peftfast_data") / "banking77" / "train.csv")
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(site)],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def tree(folder: Path) -> set[str]:
    """The Python files, type marker and data below a folder, relative to it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix()
        for path in found
        if "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def test_wheel_holds_the_packages_and_the_data(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, "build_wheel", tmp_path / "wheel")
    assert wheel.name == f"peftfast-{peftfast.__version__}-py3-none-any.whl"
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == set(PACKAGES)
    for package, folder in zip(PACKAGES, FOLDERS, strict=True):
        assert tree(site / package) == tree(checkout / folder)
    assert "py.typed" in tree(site / "peftfast")
    (info,) = site.glob("*.dist-info")
    assert {"LICENSE", "NOTICE"} <= {path.name for path in (info / "licenses").iterdir()}
    assert "peftfast = peftfast.cli:main" in (info / "entry_points.txt").read_text()
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()

    found = origins(site, cwd=tmp_path)
    assert all(path.startswith(str(site)) for path in found)
    assert Path(found[-1]).is_file()


def test_source_distribution_builds_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    sdist = build(checkout, "build_sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not (source / "kernels" / "__init__.py").exists()
    again = build(source, "build_wheel", tmp_path / "again")
    direct = build(checkout, "build_wheel", tmp_path / "direct")
    with zipfile.ZipFile(again) as left, zipfile.ZipFile(direct) as right:
        assert sorted(left.namelist()) == sorted(right.namelist())


def test_editable_install_finds_the_checkout(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, "build_editable", tmp_path / "wheel")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert not (site / "peftfast").exists()
    found = origins(site, cwd=tmp_path)
    assert found[0] == str(checkout / "peftfast" / "__init__.py")
    assert found[1] == str(checkout / "kernels" / "peftfast_kernels" / "__init__.py")
    assert found[3] == str(checkout / "examples" / "data" / "banking77" / "train.csv")
    assert Path(found[3]).is_file()


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def assert_loads(library: Path) -> None:
    """The file is the CPU library, of the interface that the package needs."""
    header = (ROOT / "csrc" / "peftfast.h").read_text()
    assert f"#define PF_CPU_ABI {ctypes.CDLL(str(library)).pf_cpu_abi()}\n" in header


def libraries(wheel: Path) -> list[str]:
    """The names of the shared libraries in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return [Path(name).name for name in archive.namelist() if name.endswith(".so")]


@needs_compiler
def test_wheel_with_the_library(own_checkout: Path, tmp_path: Path) -> None:
    def wheel(name: str, mode: str) -> Path:
        return build(own_checkout, "build_wheel", tmp_path / name, PEFTFAST_BUILD=mode)

    first = wheel("first", "cpu")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert first.name == f"peftfast-{peftfast.__version__}-py3-none-{platform}.whl"
    site = tmp_path / "site"
    with zipfile.ZipFile(first) as archive:
        archive.extractall(site)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == set(PACKAGES)
    native = {"native/libpeftfast_cpu.so"}
    assert tree(site / "peftfast") == tree(own_checkout / "peftfast") | native
    (info,) = site.glob("*.dist-info")
    assert "Root-Is-Purelib: false" in (info / "WHEEL").read_text()
    assert_loads(site / NATIVE / "libpeftfast_cpu.so")

    # It is compiled anew only where a source has changed.
    built = own_checkout / "build" / "lib" / NATIVE / "libpeftfast_cpu.so"
    before = built.stat().st_mtime_ns
    wheel("second", "cpu")
    assert built.stat().st_mtime_ns == before
    os.utime(own_checkout / "csrc" / "cpu" / "kernels.h")
    wheel("third", "cpu")
    assert built.stat().st_mtime_ns > before

    # What an earlier build left does not come along where it is not asked for.
    plain = wheel("plain", "none")
    assert plain.name.endswith("-py3-none-any.whl")
    assert not libraries(plain)


@needs_compiler
def test_source_distribution_holds_the_librarys_sources(checkout: Path, tmp_path: Path) -> None:
    sdist = build(checkout, "build_sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert tree(source / "csrc") == tree(ROOT / "csrc")
    wheel = build(source, "build_wheel", tmp_path / "wheel", PEFTFAST_BUILD="cpu")
    assert libraries(wheel) == ["libpeftfast_cpu.so"]


@needs_compiler
def test_editable_install_has_the_library(own_checkout: Path, tmp_path: Path) -> None:
    library = own_checkout / NATIVE / "libpeftfast_cpu.so"
    wheel = build(own_checkout, "build_editable", tmp_path / "one", PEFTFAST_BUILD="cpu")
    assert not libraries(wheel)
    assert_loads(library)
    assert (
        library.name
        in subprocess.run(
            ["git", "check-ignore", "--no-index", str(NATIVE / library.name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    )
    build(own_checkout, "build_editable", tmp_path / "two", PEFTFAST_BUILD="none")
    assert not library.exists()


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [("/nonexistent/c++", "No such file"), ("false", "failed")],
    ids=["absent", "failing"],
)
def test_without_a_library_the_package_is_built_and_warns(
    compiler: str, complaint: str, checkout: Path, tmp_path: Path
) -> None:
    settings = {"CXX": compiler, "NVCC": "/nonexistent/nvcc"}
    done = run_build(checkout, "build_wheel", tmp_path / "auto", PEFTFAST_BUILD="auto", **settings)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "auto").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    for name in ("libpeftfast_cpu.so", "libpeftfast_cuda.so"):
        assert f"peftfast works without {name}: " in done.stderr
    assert complaint in done.stderr

    done = run_build(checkout, "build_wheel", tmp_path / "cpu", PEFTFAST_BUILD="cpu", **settings)
    assert done.returncode != 0
    assert compiler in done.stderr and complaint in done.stderr


def test_an_unknown_build_is_an_error(checkout: Path, tmp_path: Path) -> None:
    done = run_build(checkout, "build_wheel", tmp_path / "wheel", PEFTFAST_BUILD="gpu")
    assert done.returncode != 0
    assert "PEFTFAST_BUILD is 'gpu'; allowed: auto, none, cpu, cuda" in done.stderr


NVCC = """#!{python}
import sys
if "--list-gpu-code" in sys.argv:
    print("{known}")
else:
    open(sys.argv[sys.argv.index("-o") + 1], "w").write(" ".join(sys.argv[1:]))
"""


@needs_compiler
@pytest.mark.parametrize(
    ("known", "codes", "portable"),
    [
        ("sm_75 sm_80 sm_86 sm_89 sm_90 sm_90a sm_100 sm_120", "80 86 89 90a 100", "100"),
        ("sm_75 sm_80 sm_86 sm_89 sm_90 sm_90a", "80 86 89 90a", "90"),
    ],
    ids=["new nvcc", "old nvcc"],
)
def test_the_cuda_library_is_for_every_architecture_that_nvcc_knows(
    known: str, codes: str, portable: str, own_checkout: Path, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(python=sys.executable, known=known.replace(" ", "\\n")))
    nvcc.chmod(0o755)
    leave_one_empty_source(own_checkout)
    wheel = build(
        own_checkout, "build_wheel", tmp_path / "wheel", PEFTFAST_BUILD="cuda", NVCC=str(nvcc)
    )
    with zipfile.ZipFile(wheel) as archive:
        command = archive.read(str(NATIVE / "libpeftfast_cuda.so")).decode().split()
    found = [word.partition(",code=")[2] for word in command if word.startswith("-gencode")]
    assert found == [*(f"sm_{code}" for code in codes.split()), f"compute_{portable}"]
    assert "csrc/cuda/api.cu" in command
    assert command[command.index("-cudart") + 1] == "static"


@needs_compiler
def test_cuda_that_is_asked_for_and_cannot_be_built_is_an_error(
    own_checkout: Path, tmp_path: Path
) -> None:
    leave_one_empty_source(own_checkout)
    settings = {"PEFTFAST_BUILD": "cuda", "NVCC": "/nonexistent/nvcc"}
    done = run_build(own_checkout, "build_wheel", tmp_path / "no-nvcc", **settings)
    assert done.returncode != 0
    assert "/nonexistent/nvcc" in done.stderr
    shutil.rmtree(own_checkout / "csrc" / "cuda")
    done = run_build(own_checkout, "build_wheel", tmp_path / "no-sources", **settings)
    assert done.returncode != 0
    assert "csrc/cuda holds no sources" in done.stderr


def leave_one_empty_source(checkout: Path) -> None:
    """In place of the CPU library's, where compiling that is not what is tested."""
    shutil.rmtree(checkout / "csrc" / "cpu")
    (checkout / "csrc" / "cpu").mkdir()
    (checkout / "csrc" / "cpu" / "empty.cpp").touch()


def metadata() -> list[Requirement]:
    """Every requirement of peftfast[dev], the extras that it names unfolded."""
    lines = [Requirement(line) for line in requires("peftfast") or []]

    def of(extra: str) -> list[Requirement]:
        found = []
        for line in lines:
            plain = line.marker is None or "extra" not in str(line.marker)
            if plain if not extra else not plain and line.marker.evaluate({"extra": extra}):
                nested = line.extras if line.name == "peftfast" else ()
                found += [r for name in nested for r in of(name)]
                found += [] if line.name == "peftfast" else [line]
        return found

    return of("") + of("dev")


def pins(python: str) -> dict[str, Version]:
    """The constraints that hold for a Python version: normalised name to version."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"python_version": python}):
            continue
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        name = canonicalize_name(pin.name)
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = Version(specifier.version)
    return found


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    try:
        distribution("peftfast")
    except PackageNotFoundError:
        pytest.skip("peftfast is not installed as a distribution")
    return metadata()


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_lie_within_the_metadata(requirements: list[Requirement], python: str) -> None:
    pinned = pins(python)
    assert len(requirements) > 15
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} is not pinned for Python {python}"
        assert requirement.specifier.contains(pinned[name]), requirement
        assert pinned[name].local is None


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "peft": "0.18.0"},
        {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0", "peft": "0.21.2"},
    ],
    ids=["oldest", "newest"],
)
def test_metadata_admits(requirements: list[Requirement], versions: dict[str, str]) -> None:
    ranges = {requirement.name: requirement.specifier for requirement in requirements}
    for name, number in versions.items():
        assert ranges[name].contains(number), name


def test_every_range_is_bounded_above(requirements: list[Requirement]) -> None:
    open_ended = {"setuptools", "packaging"}
    for requirement in requirements:
        if requirement.name not in open_ended:
            assert any(s.operator == "<" for s in requirement.specifier), requirement


def test_pins_are_the_whole_closure(requirements: list[Requirement]) -> None:
    """Nothing that the Makefile's environment installed was left to chance."""
    if not (Path(sys.prefix) / ".peftfast-installed").exists():
        pytest.skip("only for the environment that the Makefile makes")
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    seen: set[tuple[str, str]] = set()
    waiting = [
        (canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)
    ]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        assert name in pinned, f"{name} is installed but not pinned"
        assert Version(version(name)).public == str(pinned[name]), name
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                inner = canonicalize_name(needed.name)
                waiting += [(inner, further) for further in ("", *needed.extras)]
    assert len(seen) > 40


def test_version_agrees_with_the_distribution(requirements: list[Requirement]) -> None:
    assert version("peftfast") == peftfast.__version__
