"""Counting parameters and FLOPs, and drawing figures; needs no device."""
