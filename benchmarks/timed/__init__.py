"""Benchmarks of time and memory, one a module; importing a module declares its benchmark."""
