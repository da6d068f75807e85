"""The project's own datasets. Each is a TFDS builder that needs no TensorFlow."""

from moe_jax.data.builders.debian_text import DebianText
from moe_jax.data.builders.labelled_text import LabelledTextBuilder
from moe_jax.data.builders.python_library import PythonLibrary

BUILDERS: dict[str, type[LabelledTextBuilder]] = {
    builder.name: builder for builder in (PythonLibrary, DebianText)
}
"""Every dataset that `experiments/prepare_data.py` can prepare, by name."""

__all__ = ["BUILDERS", "DebianText", "LabelledTextBuilder", "PythonLibrary"]
