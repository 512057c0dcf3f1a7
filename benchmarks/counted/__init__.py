"""Benchmarks of bytes and FLOPs, one a module; importing a module declares its benchmark."""
