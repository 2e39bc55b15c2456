"""The four methods of the paper: which factors, which rescaling."""
