"""What is on disk: a run's loop and folder, its start, and models opened from either."""
