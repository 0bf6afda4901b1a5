"""The user's YAML as validated data. Imports no framework; pydantic and PyYAML only here."""

from reshard.config.validation import from_yaml

__all__ = ["from_yaml"]
