"""Training: the loop, losses, optimizers, processes, checkpoints."""
