import dataclasses

from moe_jax.pods.tables import ranking, table
from tests.pods.reports import COLLECTIVE, MEMORY, report

GIB = 2**30


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table_names_what_a_step_takes():
    lines = lines_of(table(report(note="why")))
    assert lines[0] == "configs/paper.py:model on tpu-v5p-16 (v5p:2x2x2): 8 chips, 8 devices"
    assert (
        "mesh data=2 x expert=4 x model=1 (microbatches=2); compiled by libtpu 1.2 in 3 s" in lines
    )
    assert "all-to-all expert 8 0.000 10.000" in lines
    assert "TFLOPs of a device a step: 1 executed (1.02 by accounting), 0.6 algorithmic" in lines
    assert "Note: why." in lines
    (last,) = (line for line in lines if line.startswith("If all overlap"))
    assert last == (
        "If all overlap, a step takes 0.4 s (compute): MFU 60.0%, 35.0% if nothing overlaps; 1,000 "
        "tokens/s for each chip"
    )


def test_a_step_that_does_not_fit_has_its_note_and_no_roofline():
    hbm = dataclasses.replace(MEMORY, temporaries=3 * GIB, capacity=GIB)
    text = table(report(fits=False, roofline=None, hbm=hbm, note="why"))
    assert "3.00 of 1.00, 2.00 GiB too few" in text and "Note: why." in text
    assert "If all overlap" not in text


def test_what_jax_takes_of_a_gpu_and_what_it_waits_for_is_said():
    waiting = dataclasses.replace(COLLECTIVE, synchronous=3)
    hbm = dataclasses.replace(MEMORY, capacity=3 * GIB)
    lines = lines_of(table(report(memory_fraction=0.75, hbm=hbm, collectives=(waiting,))))
    assert (
        "(what JAX takes, 75% of the GPU's 4.00; --memory_fraction or XLA_CLIENT_MEM_FRACTION says "
        "otherwise)" in lines
    )
    assert "all-to-all expert 8 0.000 10.000 3 synchronous" in lines


def test_cpus_in_place_of_gpus_are_named():
    text = table(report(compiled_for="cpu", hardware="gpu-h100-8"))
    assert "in place of gpu-h100-8, because XLA's plugin for CUDA is not installed" in text
    assert "run make install-gpu-compiler" in text


def test_the_ranking_ends_with_the_best():
    slow = report(fits=False, roofline=None)
    lines = lines_of(ranking([report(), slow]))
    assert lines[1] == ("0.0 yes 0.4s 60.0% compute data=2 x expert=4 x model=1 (microbatches=2)")
    assert lines[2] == "0.0 no data=2 x expert=4 x model=1 (microbatches=2)"
    assert lines[3] == "best: data=2 x expert=4 x model=1 (microbatches=2)"
