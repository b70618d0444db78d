"""Predict what a mesh of devices would hold, compute and send."""
