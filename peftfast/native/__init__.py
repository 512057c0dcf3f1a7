"""Ops in C++ (on a CPU) and CUDA (on a GPU): the libraries of csrc/, called through ctypes.

The modules have the interface of `peftfast.reference`'s. They take operands that ops have checked.
"""
