"""Metrics, the live line, pictures."""
