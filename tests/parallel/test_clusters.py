"""Processes find each other by what their cluster tells them, which is imitated here.

Not imitated is plain Kubernetes, where JAX asks the API server of the cluster, through a package that
is not among ours. GKE's TPUs need it not.
"""

import contextlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading

import pytest

ROOT = pathlib.Path(__file__).parents[2]

_PROGRAM = textwrap.dedent("""
    import json
    import os
    import pathlib

    import jax

    from moe_jax.parallel import multihost

    # JAX sets it on a machine without TPUs, and then does not look for Cloud TPU.
    if "GCE_METADATA_IP" in os.environ:
        del os.environ["TPU_SKIP_MDS_QUERY"]
    jax.config.update("jax_num_cpu_devices", 2)
    multihost.join(detect=True)
    first = multihost.by_first_process(lambda: 40 + jax.process_index())
    said = [
        jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), first
    ]
    pathlib.Path(os.environ["SAID"]).write_text(json.dumps(said))
""")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def joined(environments: list[dict[str, str]]) -> list[list[int]]:
    """What each process says, started with its variables.

    Each says its index, the number of processes, its devices, all devices, and what process 0 decided.
    """
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    common = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as folder:
        # Files, because Gloo writes to the standard output too, into the middle of our lines.
        files = [pathlib.Path(folder, f"{index}.json") for index in range(len(environments))]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                env={**inherited, **common, **variables, "SAID": str(file)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for variables, file in zip(environments, files, strict=True)
        ]
        try:
            ended = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0] * len(processes), ended
        return [json.loads(file.read_text()) for file in files]


def all_of(count: int) -> list[list[int]]:
    return [[index, count, 2, 2 * count, 40] for index in range(count)]


def test_slurm():
    count = 4
    assert all_of(count) == joined([
        {
            "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
        }
        for index in range(count)
    ])  # fmt: skip


def test_open_mpi():
    assert all_of(2) == joined([
        {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(index),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        }
        for index in range(2)
    ])  # fmt: skip


# As on a machine with TPUs, where JAX_PLATFORMS still chooses the CPU.
TPU_VM = {"JAX_FORCE_TPU_INIT": "1"}


def test_a_slice_on_gke():
    assert all_of(2) == joined([
        {
            **TPU_VM,
            "TPU_WORKER_HOSTNAMES": "localhost,localhost",
            "TPU_WORKER_ID": str(index),
            # Set, so that JAX does not ask the metadata server; empty means one slice.
            "MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": "",
        }
        for index in range(2)
    ])  # fmt: skip


def test_two_slices_on_gke():
    """Of two hosts each: process 3 is the second of the second slice."""
    assert all_of(4) == joined([
        {
            **TPU_VM,
            "TPU_WORKER_HOSTNAMES": "localhost,localhost",
            "TPU_WORKER_ID": str(index % 2),
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8081",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": str(index // 2),
        }
        for index in range(4)
    ])  # fmt: skip


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]):
    """Answers as Google Cloud's does, and gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            self.send_response(200 if name in attributes else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("slices", [1, 2])
def test_cloud_tpu_virtual_machines(slices):
    """Two, which are one slice or two; each asks the metadata server of its own machine."""
    workers = 2 // slices
    with contextlib.ExitStack() as stack:
        variables = []
        for index in range(2):
            slice_index, worker = divmod(index, workers)
            attributes = {
                "agent-worker-number": str(worker),
                # What they had as name:id:address is a list of names today.
                "worker-network-endpoints": ",".join(["a:0:localhost", "localhost"][:workers]),
                "tpu-env": f"NODE_ID: 'x'\nMEGASCALE_NUM_SLICES: '{slices}'\n"
                f"MEGASCALE_SLICE_ID: '{slice_index}'\n"
                + (slices - 1)
                * "MEGASCALE_COORDINATOR_ADDRESS: 'localhost'\n",
            }
            address = stack.enter_context(metadata_server(attributes))
            variables.append({**TPU_VM, "GCE_METADATA_IP": address})
        assert joined(variables) == all_of(2)
