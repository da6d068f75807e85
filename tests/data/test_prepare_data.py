import pathlib
import platform
import subprocess
import sys

from moe_jax.data.builders import builders

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "prepare_data.py"


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)


def test_prints_the_domains_and_where_they_are(tmp_path):
    result = _run("--dataset=python_library", f"--data_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    first, *domains, digest, place = result.stdout.splitlines()
    assert first.split() == ["domain", "MB", "documents"]
    assert {"asyncio", "modules", "total"} <= {line.split()[0] for line in domains}
    assert len(digest.split()[-1]) == 64
    assert place == f"prepared in: {tmp_path}/python_library/{platform.python_version()}"


def test_an_unknown_dataset_is_one_sentence():
    result = _run("--dataset=wikipedia")
    assert result.returncode == 2
    assert result.stdout == ""
    ours = [name for name, cls in builders().items() if cls.__module__.startswith("moe_jax.")]
    names = ", ".join(ours)
    assert result.stderr == (
        f"dataset='wikipedia' cannot be prepared; valid are {names}, and those whose builder is "
        "named by --import.\n"
    )
