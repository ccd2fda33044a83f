"""Adapters for other attribution tools, one file each; a tool is imported only with its file."""
