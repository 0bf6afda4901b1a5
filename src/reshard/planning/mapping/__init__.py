"""Mappings: how the regions of one naming of a model lie in the regions of another (fused, split, stacked, renamed, padded, transposed)."""
