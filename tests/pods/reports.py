"""Made-up reports of steps on a pod."""

import dataclasses
from typing import Any

from moe_jax.pods.report import CollectiveSum, DeviceMemory, PodReport, Terms

MEMORY = DeviceMemory(
    arguments=100,
    parameters=60,
    optimizer_state=30,
    outputs=95,
    aliased=90,
    temporaries=200,
    program=10,
    capacity=400,
)
COLLECTIVE = CollectiveSum("all-to-all", ("expert",), 8, 4096, 0.01, exact=True)
TERMS = Terms(
    compute=0.4,
    memory=0.2,
    interconnect=0.1,
    network=0.0,
    binding="compute",
    step_seconds=0.4,
    mfu=0.6,
    mfu_without_overlap=0.35,
    tokens_per_second_per_chip=1000.0,
)


def report(**changes: Any) -> PodReport:
    """A step of 8 devices that fits, with some fields changed."""
    usual = PodReport(
        config="configs/paper.py:model",
        changes={"microbatches": 2},
        note="",
        topology="v5p:2x2x2",
        hardware="tpu-v5p-16",
        compiled_for="tpu",
        compiler="libtpu 1.2",
        chips=8,
        devices=8,
        mesh={"data": 2, "expert": 4, "model": 1},
        params=1000,
        parameter_dtype="float32",
        optimizer="AdamW (float32)",
        rows_per_step=16,
        tokens_per_step=1600,
        unit="token",
        hbm=MEMORY,
        fits=True,
        refusal="",
        flops_per_device=1e12,
        accounted_flops_per_device=1.02e12,
        algorithmic_flops_per_device=0.6e12,
        memory_bytes_per_device=1e9,
        collectives=(COLLECTIVE,),
        roofline=TERMS,
        exact=True,
        compile_seconds=3.0,
    )
    return dataclasses.replace(usual, **changes)
