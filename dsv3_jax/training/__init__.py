"""The training step, its loop, and what it leaves behind."""
