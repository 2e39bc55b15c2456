"""Eight tasks that nobody tuned tekfac for, and ten optimizers with equal trials on each."""
