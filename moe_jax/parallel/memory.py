"""How much memory a device has."""

import os

import jax


def memory_of(device: jax.Device) -> int | None:
    """Bytes that programs on a device may take; a CPU's devices share the host's. None: unknown."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")
