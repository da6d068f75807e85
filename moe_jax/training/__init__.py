"""The trainer: optimizer, state, step, loop, checkpoints, metrics."""
