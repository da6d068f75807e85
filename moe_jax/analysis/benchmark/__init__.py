"""What a MoE layer costs beside its floors; the measurements of experiments/bench_layer.py."""
