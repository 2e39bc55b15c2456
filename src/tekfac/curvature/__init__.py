"""A layer's Fisher matrix: statistics, factors, basis, rescaling and damping."""
