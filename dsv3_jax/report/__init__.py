"""Metrics, progress, pictures and units of a run."""
