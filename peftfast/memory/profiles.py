"""Devices that a prediction can be made for.

Capacities, compute capabilities and numbers of multiprocessors are the manufacturer's; the rest is
assumed, and marked so: it was read in documentation and source code, not measured on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class DeviceProfile:
    """What a prediction needs to know of a device.

    Attributes:
        name: as `device_profile` and `--device` take it.
        description: for people.
        kind: "cuda" or "cpu".
        capacity: bytes of memory; None where there is no limit to hold predictions to.
        arch, sm_count: compute capability (80 for 8.0) and multiprocessors, by which kernels
            choose their tiles and workspaces; 0 on a CPU.
        context: bytes that the driver and the libraries take before the first tensor, outside of
            torch's allocator. Assumed.
        workspace: bytes that cuBLAS keeps, of torch's allocator. Assumed: torch's default sizes.
        block: every tensor takes a multiple of so many bytes.
    """

    name: str
    description: str
    kind: str
    capacity: int | None
    arch: int = 0
    sm_count: int = 0
    context: int = 0
    workspace: int = 0
    block: int = 1


def _gpu(
    name: str, description: str, capacity: int, arch: int, sm_count: int, context: int = 460
) -> DeviceProfile:
    workspace = 32 * MIB if arch >= 90 else 4096 * 2 * 1024 + 16 * 8 * 1024
    return DeviceProfile(
        name,
        description,
        "cuda",
        capacity,
        arch,
        sm_count,
        context * MIB,
        workspace,
        512,
    )


PROFILES = {
    profile.name: profile
    for profile in (
        _gpu("a100-40gb", "NVIDIA A100 40 GB", 40_442 * MIB, 80, 108),
        _gpu("a100-80gb", "NVIDIA A100 80 GB", 81_154 * MIB, 80, 108),
        _gpu("h100", "NVIDIA H100 80 GB", 81_090 * MIB, 90, 132, 540),
        _gpu("h200", "NVIDIA H200 141 GB", 143_156 * MIB, 90, 132, 540),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24_080 * MIB, 89, 128, 400),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090", 24_120 * MIB, 86, 82, 350),
        DeviceProfile("cpu", "the CPU of this machine", "cpu", None),
    )
}
