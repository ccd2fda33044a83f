"""The version: read here by pyproject.toml too, so that a checkout has it."""

__version__ = "0.2.0"
