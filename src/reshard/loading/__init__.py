"""A checkpoint becomes a state: resolve, plan, read, report."""
