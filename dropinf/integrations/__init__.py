"""Adapters that put dropinf inside other tools: one file a tool, imported only when it is used."""
