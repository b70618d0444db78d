"""Flax NNX modules: which parameters exist, and which op uses them."""
