"""`peftfast doctor`: what is installed, what the machine has, and which implementations can run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftfast._version import __version__
from peftfast.native import library
from peftfast.ops.dispatch import Impl, availability

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
SETTINGS = ("PEFTFAST_IMPL", library.ISA_VARIABLE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Package:
    """An installed or missing dependency.

    `supported` is the range of versions that peftfast's metadata admits; None where peftfast is not
    installed as a distribution, so that there is no metadata to read.
    """

    name: str
    version: str | None
    supported: str | None
    problem: str | None


@dataclass(frozen=True)
class Device:
    """A device that torch can use; memory in bytes, None where torch does not tell."""

    name: str
    description: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Library:
    """A native library; `missing` says why it can't be used, None where it can."""

    name: str
    description: str
    missing: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `peftfast doctor` prints.

    `cxx_compiler` and `nvcc` are their paths, None where there is none; `torch_cuda` is the CUDA
    version that torch was built for, None for a build without CUDA. `implementations` maps each
    implementation to None where it can run here, else to the reason. `registrations` maps a
    library to the names that peftfast has added to it. `wrong_settings` says which environment
    variables have a value that can't be used.
    """

    peftfast: str
    python: str
    system: str
    cxx_compiler: str | None
    nvcc: str | None
    torch_cuda: str | None
    packages: list[Package]
    devices: list[Device]
    libraries: list[Library]
    implementations: dict[str, str | None]
    registrations: dict[str, list[str]]
    environment: dict[str, str | None]
    wrong_settings: list[str]

    @property
    def problems(self) -> list[str]:
        """What keeps peftfast from working as its metadata promises; empty where nothing does."""
        packages = [f"{p.name}: {p.problem}" for p in self.packages if p.problem]
        return packages + self.wrong_settings


def diagnose() -> Diagnosis:
    """Look at this process's environment; changes nothing and imports no optional package."""
    wrong_settings = []
    try:
        implementations = availability()
    except ValueError as error:
        implementations = {Impl.NATIVE.value: str(error)}
        wrong_settings.append(str(error))
    return Diagnosis(
        peftfast=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cxx_compiler=_found("CXX", COMPILERS),
        nvcc=_found("NVCC", ("nvcc", "/usr/local/cuda/bin/nvcc")),
        torch_cuda=torch.version.cuda,
        packages=_packages(),
        devices=_devices(),
        libraries=[_library("cpu"), _library("cuda")],
        implementations=implementations,
        registrations={"peft": _registered(), "transformers": _attentions()},
        environment={name: os.environ.get(name) for name in SETTINGS},
        wrong_settings=wrong_settings,
    )


def _registered() -> list[str]:
    """What `peftfast.methods` has added to PEFT in this process, where it has been imported."""
    registration = sys.modules.get("peftfast.methods.registration")
    return registration.registrations() if registration is not None else []


def _attentions() -> list[str]:
    """The attention functions that have been added to transformers in this process."""
    found = []
    for module in ("peftfast.methods.attention", "peftfast.patching.attention"):
        if (loaded := sys.modules.get(module)) is not None:
            found.append(f"AttentionInterface {loaded.NAME!r}")
    return found


def _found(variable: str, names: tuple[str, ...]) -> str | None:
    """The program that an environment variable names, else the first one found."""
    asked = shlex.split(os.environ.get(variable, ""))[:1]
    return next(filter(None, map(shutil.which, asked or names)), None)


def _library(kind: str) -> Library:
    name = library.path(kind).name
    try:
        missing = library.missing(kind)
    except ValueError as error:
        missing = str(error)
    if missing:
        return Library(name, "", missing)
    if kind == "cuda":
        return Library(name, "CUDA", None)
    threading = library.cpu().pf_cpu_threading().decode()
    return Library(name, f"C++, {library.isa()}, {threading}", None)


def _packages() -> list[Package]:
    ranges = _supported_ranges()
    found = []
    for name in PACKAGES:
        required = ranges.get(name)
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        problem = None
        if installed is None:
            if required is None or required.marker is None or required.marker.evaluate():
                problem = "not installed"
        elif required and not required.specifier.contains(installed, prereleases=True):
            problem = f"{installed} is outside {required.specifier}"
        found.append(
            Package(name, installed, str(required.specifier) if required else None, problem)
        )
    return found


def _supported_ranges() -> dict[str, Requirement]:
    try:
        lines = requires("peftfast") or []
    except PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines if "extra ==" not in line]
    return {requirement.name: requirement for requirement in parsed}


def _devices() -> list[Device]:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    devices = [Device("cpu", cpu, None)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        description = f"{properties.name}, sm_{properties.major}{properties.minor}"
        devices.append(Device(f"cuda:{index}", description, properties.total_memory))
    return devices


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis as tables."""
    compiler = diagnosis.cxx_compiler or "none found (torch.compile on the CPU needs one)"
    nvcc = diagnosis.nvcc or "none found"
    cuda = f"for CUDA {diagnosis.torch_cuda}" if diagnosis.torch_cuda else "without CUDA"
    console.print(
        f"peftfast {diagnosis.peftfast}, Python {diagnosis.python}, {diagnosis.system}\n"
        f"torch was built {cuda}; C++ compiler: {compiler}; nvcc: {nvcc}",
        highlight=False,
    )
    packages = Table("package", "version", "supported", "", title="Packages", title_justify="left")
    for package in diagnosis.packages:
        packages.add_row(
            package.name,
            package.version or "-",
            package.supported or "-",
            package.problem or "ok" if package.version or package.problem else "not needed here",
        )
    devices = Table("device", "", "memory", title="Devices", title_justify="left")
    for device in diagnosis.devices:
        memory = f"{device.memory_bytes / 2**30:.1f} GiB" if device.memory_bytes else "-"
        devices.add_row(device.name, escape(device.description), memory)
    libraries = Table("library", "usable", "", title="Native libraries", title_justify="left")
    for native in diagnosis.libraries:
        details = escape(native.missing or native.description)
        libraries.add_row(native.name, "no" if native.missing else "yes", details)
    implementations = Table("impl", "usable", "why not", title="Implementations")
    implementations.title_justify = "left"
    for name, reason in diagnosis.implementations.items():
        implementations.add_row(name, "no" if reason else "yes", escape(reason or ""))
    for table in (packages, devices, libraries, implementations):
        console.print(table)
    for host, names in diagnosis.registrations.items():
        console.print(f"registered with {host}: {', '.join(names) or 'none'}", highlight=False)
    console.print("importing peftfast.methods registers the type PEFTFAST with peft")
    for name, value in diagnosis.environment.items():
        if value is not None:
            console.print(f"{name}={value}", highlight=False, markup=False)
    for problem in diagnosis.problems:
        console.print(f"problem: {problem}", style="red", highlight=False, markup=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `peftfast doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def main(args: argparse.Namespace) -> int:
    """Print the diagnosis.

    Returns:
        1 where a dependency is missing or outside the supported range, or a setting is wrong;
        else 0.
    """
    diagnosis = diagnose()
    if args.json:
        json.dump({**asdict(diagnosis), "problems": diagnosis.problems}, sys.stdout, indent=2)
        print()
    else:
        render(diagnosis, Console())
    return 1 if diagnosis.problems else 0
