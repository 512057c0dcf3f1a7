"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import peftfast

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "numpy")


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def device_slug(device: torch.device) -> str:
    """The device's name as a folder name: lower case, words joined by hyphens."""
    name = device_name(device)
    if device.type == "cpu":
        name = f"cpu {name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str | None:
    """The standard output of a command, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _source() -> dict[str, Any]:
    """The commit, and whether files other than recorded results differ from it.

    PEFTFAST_COMMIT names it where the sources are a copy without git's folder.
    """
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("PEFTFAST_COMMIT"), "dirty": None}
    status = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(status)}


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date (UTC), for a recorded row."""
    details: dict[str, Any] = {
        "device": device_name(device),
        "device_slug": device_slug(device),
        "driver": None,
        "cuda": None,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        query = (
            "nvidia-smi",
            "--query-gpu=driver_version",
            "--format=csv,noheader",
            f"--id={index}",
        )
        details["driver"] = _output(*query)
        details["cuda"] = torch.version.cuda
        details["sm_count"] = torch.cuda.get_device_properties(device).multi_processor_count
    return {
        **details,
        "peftfast": peftfast.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        **{package: _version(package) for package in _PACKAGES},
        **_source(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
