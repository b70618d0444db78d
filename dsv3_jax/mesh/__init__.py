"""Sharding of arrays over a mesh of devices, and the way of tokens to their experts on it."""
