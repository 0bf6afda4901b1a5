"""Checkpoint 1.0: what MindSpore's own `save_checkpoint` writes, one file for each rank, and the strategy files beside them."""
