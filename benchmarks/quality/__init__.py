"""Benchmarks of what methods reach: real data, whole training sets, accuracy on test sets."""
