"""Mixture-of-Experts papers in JAX and Flax: reproduce, compare, extend."""
