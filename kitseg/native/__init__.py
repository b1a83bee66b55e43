"""Kernels in C++ for networks on CPUs, and networks compiled to use them."""
