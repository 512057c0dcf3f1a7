"""Benchmarks of peftfast: bytes and FLOPs counted without a GPU, times measured on a device.

Run from the repository root; the package is not installed::

    python -m benchmarks list
    python -m benchmarks traffic lora_linear --json -
    python -m benchmarks run lora_linear --device cuda

`counting` holds the byte counter, `counted` the benchmarks that use it, `timed` the benchmarks
that measure time and memory, `quality` the one that measures what methods reach on real data,
`results` the recorded rows, one folder a device.
"""
