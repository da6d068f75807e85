"""Commands of an installed moe_jax: `python -m moe_jax train ...`, or experiments/train.py in a checkout."""
