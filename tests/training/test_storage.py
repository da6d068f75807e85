"""A run's small files in an object store, which fsspec's store in memory stands for.

Arrays are not here: TensorStore writes them by its own client of the store.
"""

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from moe_jax.analysis import figures
from moe_jax.training import checkpoints, metrics
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.storage import absolute, is_remote
from moe_jax.training.traced_steps import StepTracer


class Bucket(MemoryFileSystem):
    """Refuses what object stores cannot do."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012 - as in fsspec.
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), "objects cannot grow"
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    """A folder in it."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    folder = epath.Path("gs://bucket/run")
    folder.mkdir(parents=True)
    return folder


def test_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_remote("gs://bucket/run") and not is_remote(tmp_path)
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"
    assert absolute("run") == epath.Path(tmp_path) / "run"


def test_records_and_events_are_in_the_bucket_and_a_resumed_run_repeats_some(bucket):
    writer = MetricsWriter(bucket, 0)
    for step in range(1, 4):
        writer.write({"step": step, "train/loss": 1.0 / step})
    assert [record["step"] for record in metrics.read(bucket)] == [1, 2, 3]
    writer.close()
    writer = MetricsWriter(bucket, 2)
    writer.write({"step": 3, "train/loss": 0.5})
    writer.close()
    assert metrics.read(bucket) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5},
        {"step": 3, "train/loss": 0.5},
    ]
    events = list(bucket.glob("events.out.tfevents.*"))
    assert events and all(b"train/loss" in path.read_bytes() for path in events)


def test_the_report_is_drawn_into_the_bucket(bucket):
    records = [{"step": step, "train/loss": 1.0, "eval/loss": 1.0} for step in (1, 2)]
    figures.save_run_report(records, [], "run", bucket / "report.png")
    assert (bucket / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_moved_into_the_bucket(bucket):
    tracer = StepTracer(range(1, 2), bucket)
    tracer.before(1)
    assert tracer.after(1, ())
    assert list((bucket / "profile" / "process_0").glob("plugins/profile/*/*.xplane.pb"))


def test_a_manifest_in_the_bucket_finds_damage(bucket):
    folder = bucket / "7"
    for name in ("_METADATA", "d/0a1b", "ocdbt.process_0/d/2c3d"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"twelve bytes")
    checkpoints._write_manifest(folder)
    assert checkpoints._damage(folder) is None
    (folder / "ocdbt.process_0/d/2c3d").write_bytes(b"twelve bytez")
    assert checkpoints._damage(folder) == (
        "file ocdbt.process_0/d/2c3d has flipped bits (its sha256 differs)"
    )
    checkpoints._remove_folder(folder)
    assert not folder.exists()
