"""The CPU's kernels: C++ through JAX's foreign function interface, loops in XLA, and memory settings."""
