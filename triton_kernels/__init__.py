"""Triton kernels: one file an op, installed as `dropinf.triton_kernels`."""
