"""Flax NNX modules, thin: parameters with named dimensions around pure functions."""
