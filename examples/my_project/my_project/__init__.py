"""A project of one's own on moe_jax."""
