"""A checkpoint becomes files that other programs open."""
