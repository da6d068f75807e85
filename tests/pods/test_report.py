import dataclasses
import json

from moe_jax.pods.report import PodReport
from tests.pods.reports import MEMORY, report


def test_aliased_outputs_count_once():
    # 100 arguments + (95 - 90) outputs + 200 temporaries + 10 of program.
    assert (MEMORY.total, MEMORY.missing) == (315, 0)
    small = dataclasses.replace(MEMORY, capacity=300)
    assert small.missing == 15


def test_the_largest_term_is_named():
    assert MEMORY.largest.startswith("temporaries")
    assert dataclasses.replace(MEMORY, parameters=250).largest == "parameters"
    assert dataclasses.replace(MEMORY, optimizer_state=250).largest == "optimizer state"
    refused = dataclasses.replace(MEMORY, temporaries=None)
    assert (refused.largest, refused.total) == ("parameters", 115)


def test_a_report_survives_json():
    for one in (report(), report(roofline=None, collectives=(), fits=False)):
        tree = json.loads(json.dumps(one.as_json()))
        assert PodReport.read(tree) == one
        assert (tree["hbm_bytes"], tree["hbm_capacity_bytes"]) == (315, 400)
