"""Experiments: studies of the papers' claims, benchmarks, and plans for large clusters."""
