"""compile_pod.py as a user calls it, without libtpu."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_a_gpu_machine_is_compiled_for_in_a_fresh_process_without_gpus():
    command = [
        sys.executable, "experiments/compile_pod.py", "--config=tests/training/one_block.py",
        "--topology=gpu-h100-8", "--mesh=data:2,expert:4", "--format=json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    wanted = (
        "devices params tokens_per_step hbm_bytes hbm_capacity_bytes fits flops_per_device "
        "collectives roofline compile_seconds"
    )
    assert set(wanted.split()) <= set(tree)
    assert (tree["devices"], tree["compiled_for"], tree["fits"]) == (8, "cpu", True)
    assert {one["kind"] for one in tree["collectives"]} >= {"all-to-all", "all-reduce"}
    assert tree["hbm"]["temporaries"] > 0
    assert "in place of gpu-h100-8" in done.stderr


def test_a_mesh_of_another_size_is_answered_in_a_sentence():
    command = [
        sys.executable, "experiments/compile_pod.py", "--config=configs/glam.py:64b_64e",
        "--mesh=expert:64",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.strip().splitlines()[-1]
    assert "has 64 devices, but tpu-v4-2048 has 1024 (1024 chips)" in last
