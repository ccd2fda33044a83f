"""The version: read here by pyproject.toml too, so that a checkout has it."""

__version__ = "0.1.0"
