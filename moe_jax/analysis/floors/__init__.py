"""Lower bounds for the time of a MoE layer: the same matrix products without any routing."""
