"""Triton kernels of peftfast and their launchers; imports torch and triton only."""
