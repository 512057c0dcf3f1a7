"""Each op in plain PyTorch: the specification, the CPU implementation and the oracle of the
tests.
"""
