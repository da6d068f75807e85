"""What is made of measured numbers."""

import json
import math

import pytest

from moe_jax.training import metrics
from moe_jax.training.metrics import held_out_table

MEASURED = {
    "eval/loss": math.log(2),
    "eval/loss/law/old": 2 * math.log(2),
    "eval/accuracy": 0.5,
    "eval/accuracy/law/old": 0.25,
}


def test_a_table_has_a_line_for_each_domain_and_a_column_for_each_metric():
    head, whole, domain = held_out_table(MEASURED, of_text=False).splitlines()
    assert head.split() == ["loss", "accuracy"]
    assert whole.split() == ["all", "0.6931", "0.5000"]
    assert domain.split() == ["law/old", "1.3863", "0.2500"]


def test_of_text_the_loss_is_in_bits_too():
    head, whole, domain = held_out_table(MEASURED, of_text=True).splitlines()
    assert head.split() == ["nats/token", "bits/token", "accuracy"]
    assert whole.split() == ["all", "0.6931", "1.0000", "0.5000"]
    assert domain.split() == ["law/old", "1.3863", "2.0000", "0.2500"]


def test_what_a_domain_lacks_is_left_empty():
    measured = {"eval/loss": 1.0, "eval/loss/a": 1.0, "eval/accuracy": 0.5}
    *_, domain = held_out_table(measured, of_text=False).splitlines()
    assert domain.split() == ["a", "1.0000"]


@pytest.mark.parametrize(
    "damage",
    [
        b"{", b"5", b"{}", b"[]", b"null", b'{"step": "2"}', b'{"step": true}', b"\x00" * 9,
        b'{"step": 2, "a": \xff}', b'{"step": 2}{"step": 3}', b"[" * 100_000,
    ],
    ids=lambda damage: repr(damage[:20]),
)  # fmt: skip
def test_a_damaged_line_loses_itself_only_and_is_kept(tmp_path, caplog, damage):
    lines = [b'{"step": 1}', damage, b'{"step": 3}', b'{"step": 4}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    for before in ([1, 3, 4], [1, 3]):  # What is kept is said and kept once.
        assert [record["step"] for record in metrics.read(tmp_path)] == before
        metrics.MetricsWriter(tmp_path, 3).close()
        whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in whole] == [1, 3]
        kept = (tmp_path / metrics.DAMAGED_FILE).read_text()
        assert kept.startswith("line 2, after step 1 and before step 3: ")
        assert kept.count("\n") == 1
        said = "line 2, after step 1 and before step 3, is damaged and no record; it is kept in"
        assert caplog.text.count(said) == 1


def test_damage_that_a_killed_start_has_kept_is_not_kept_twice(tmp_path):
    content = b'{"step": 1}\n{\n{"step": 3}\n'
    for _ in range(2):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        metrics.MetricsWriter(tmp_path, 3).close()
    assert (tmp_path / metrics.DAMAGED_FILE).read_text().count("line 2") == 1


def test_what_is_not_finite_is_null_so_that_every_line_is_json(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "a": math.inf, "router/1/load": [1.0, math.nan]})
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "a": null, "router/1/load": [1.0, null]}'
