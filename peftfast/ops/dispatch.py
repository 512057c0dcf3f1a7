"""Which implementation serves a call, and what this machine can run.

`impl="auto"` chooses; an explicit request never falls back: where it can't be served,
`ImplUnavailable` lists every reason. The environment variable PEFTFAST_IMPL takes the place of
"auto".
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from enum import Enum

import torch


class Impl(str, Enum):
    """The implementations that an op may have."""

    AUTO = "auto"
    TRITON = "triton"
    NATIVE = "native"
    REFERENCE = "reference"


class ImplUnavailable(RuntimeError):
    """An implementation asked for by name can't serve the call; `reasons` lists why."""

    def __init__(self, op: str, impl: Impl, reasons: list[str]):
        self.reasons = list(reasons)
        super().__init__(f"{op}: impl={impl.value!r} can't serve this call: " + "; ".join(reasons))


def parse_impl(impl: str | Impl) -> Impl:
    """The implementation asked for; "auto" gives way to PEFTFAST_IMPL where that is set."""
    source = "impl"
    if impl == Impl.AUTO and (asked := os.environ.get("PEFTFAST_IMPL")):
        impl, source = asked, "PEFTFAST_IMPL"
    try:
        return Impl(impl)
    except ValueError:
        allowed = ", ".join(repr(i.value) for i in Impl)
        raise ValueError(f"{source} is {impl!r}; allowed: {allowed}") from None


def interpreting() -> bool:
    """Whether Triton's kernels run in its CPU interpreter, as TRITON_INTERPRET=1 asks."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return False
    from peftfast.native import library

    return not library.is_dry()


@functools.cache
def _triton_missing() -> str | None:
    for package in ("triton", "peftfast_kernels"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    return None


def triton_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why Triton kernels can't take tensors of this device and dtype; empty where they can."""
    if missing := _triton_missing():
        return [missing]
    reasons = []
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"dtype {dtype} is none of bfloat16, float16, float32")
    if interpreting():
        if dtype == torch.bfloat16:
            reasons.append(
                "Triton's interpreter computes bfloat16 wrong; use float16 or float32 there"
            )
    elif device.type != "cuda":
        reasons.append(
            f"the tensors are on {device.type}: Triton needs a CUDA device or TRITON_INTERPRET=1"
        )
    elif (arch := _arch(device)) < 80:
        reasons.append(f"compute capability {arch // 10}.{arch % 10} is below 8.0")
    return reasons


def _arch(device: torch.device) -> int:
    from peftfast_kernels.device import arch

    return arch(device)


def native_reasons(device: torch.device) -> list[str]:
    """Why the extension's kernels can't take tensors of this device; empty where they can."""
    if device.type not in ("cpu", "cuda"):
        return [f"csrc has no kernels for {device.type}"]
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return ["fake tensors hold no data"]
    from peftfast.native import library

    missing = library.missing(device.type)
    return [missing] if missing else []


def availability() -> dict[str, str | None]:
    """For each implementation None where this machine can run it, else the reason why not."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    triton = triton_reasons(device, torch.float16)
    if triton and device.type == "cpu" and _triton_missing() is None:
        triton = [
            "no CUDA device is there (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        ]
    kinds = dict.fromkeys(("cpu", device.type))  # one of the two libraries is enough to be of use
    found = [native_reasons(torch.device(kind)) for kind in kinds]
    native = [] if [] in found else [why for reasons in found for why in reasons]
    return {
        Impl.TRITON.value: "; ".join(triton) or None,
        Impl.NATIVE.value: "; ".join(native) or None,
        Impl.REFERENCE.value: None,
    }


Reasons = Callable[[], list[str]]


def choose(op: str, impl: Impl, order: tuple[Impl, ...], reasons: Mapping[Impl, Reasons]) -> Impl:
    """The implementation that serves a call.

    Args:
        op: the op's name, for the error.
        impl: as `parse_impl` gave it.
        order: what "auto" tries, first to last; the last must always serve.
        reasons: for each implementation that the op has, what tells why it can't serve this call;
            asked only of those that come into question.

    Raises:
        ImplUnavailable: an explicit request that can't be served.
    """
    if impl is Impl.AUTO:
        return next(candidate for candidate in order if not reasons[candidate]())
    if impl not in reasons:
        raise ImplUnavailable(op, impl, [f"{op} has no {impl.value} implementation"])
    if why := reasons[impl]():
        raise ImplUnavailable(op, impl, why)
    return impl


def none() -> list[str]:
    """Nothing is in the way."""
    return []
