"""Triton kernels: one a file, its launcher under it. Imported only when a kernel is launched."""
