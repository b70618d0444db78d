"""The CPU's kernels: C++ through JAX's foreign function interface, XLA loops, memory settings."""
