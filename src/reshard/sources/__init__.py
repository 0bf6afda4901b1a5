"""Kinds of stored checkpoints: each makes a catalog of a path."""
