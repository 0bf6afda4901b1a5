"""A run that is told to stop: all its ranks stop after the same step."""
