"""Files, locks, signals and programs of the host."""
