"""What layers saw, taken from an unchanged training loop, and for whose labels."""
