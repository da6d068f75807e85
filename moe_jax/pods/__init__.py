"""The training step compiled for machines that are not here, and what machines can do."""
