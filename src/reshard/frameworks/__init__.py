"""Adapters: the only rooms that import a training framework (besides `training` and `integrations`)."""
