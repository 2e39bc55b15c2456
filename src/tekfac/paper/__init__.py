"""The experiments of the paper, arXiv 2011.13609, again: its protocols, its numbers, its tables."""
