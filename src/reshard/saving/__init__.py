"""Save: every rank writes its part under a temporary name, and only when all of it is durable does the checkpoint begin to exist."""
