"""The user's YAML as validated data. Imports no framework; pydantic and PyYAML only here."""
