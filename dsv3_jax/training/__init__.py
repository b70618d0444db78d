"""The training step: loss, optimizer and schedules, on arrays alone."""
