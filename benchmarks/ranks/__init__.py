"""What training with several ranks takes: counted, modelled, and on two processes measured."""
