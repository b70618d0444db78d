"""Campaigns against the project: hostile inputs, and whatever else is added beside them. See README.md."""
