"""Searches for an optimizer's best settings over a grid, decided by held-out training images."""
