"""dropinf inside other tools: one file a tool, imported only where it is used."""
