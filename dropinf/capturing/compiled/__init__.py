"""Models under torch.compile: compiled once more, with the sites in their graph."""
