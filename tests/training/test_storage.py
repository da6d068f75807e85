"""A run in an object store: its records, its picture, its trace, its checkpoints."""

import pytest
from etils import epath

from moe_jax.analysis import figures
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.training import checkpoints, loop, metrics
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.storage import absolute, is_remote
from moe_jax.training.traced_steps import StepTracer
from tests.training.bucket import Bucket, empty_bucket
from tests.training.one_block import get_config


@pytest.fixture
def bucket(monkeypatch):
    """A folder in an empty one."""
    with empty_bucket(monkeypatch) as folder:
        yield folder


def test_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_remote("gs://bucket/run") and not is_remote(tmp_path)
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"
    assert absolute("run") == epath.Path(tmp_path) / "run"


def test_another_store_is_refused():
    with pytest.raises(
        UserError, match=r"the path hdfs://a/run begins with hdfs://; use gs:// or s3"
    ):
        is_remote("hdfs://a/run")


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
    tracer.before(1, ())
    assert tracer.after(1, ())
    assert list((bucket / "profile" / "process_0").glob("plugins/profile/*/*.xplane.pb"))


def test_a_manifest_in_the_bucket_finds_damage(bucket):
    folder = bucket / "7"
    for name in ("_METADATA", "d/0a1b", "ocdbt.process_0/d/2c3d"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"twelve bytes")
    checkpoints._write_manifest(folder, {})
    assert checkpoints._damage(folder) is None
    (folder / "ocdbt.process_0/d/2c3d").write_bytes(b"twelve bytez")
    assert checkpoints._damage(folder) == (
        "file ocdbt.process_0/d/2c3d has flipped bits (its sha256 differs)"
    )
    checkpoints._remove_folder(folder)
    assert not folder.exists()


def test_a_run_in_a_bucket_continues_on_another_mesh(bucket, data_dir):
    config = get_config()
    config.data.data_dir, config.steps, config.checkpoint.keep = data_dir, 3, 1
    loop.train(config, bucket, profiled=range(2, 3))
    assert checkpoints.Checkpoints(bucket / "checkpoints").steps() == [3]
    config.steps, config.mesh = 6, MeshConfig(data=2, expert=4)
    records = loop.train(config, bucket)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert checkpoints.Checkpoints(bucket / "checkpoints").steps() == [6]
    kept = {path.split("/")[3] for path in Bucket.store}
    assert {"config.json", "metrics.jsonl", "profile", "checkpoints"} <= kept
    assert not [path for path in Bucket.store if path.endswith(".tmp")]
