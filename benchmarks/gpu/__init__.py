"""What is to be known of tekfac on a GPU, by one command."""
