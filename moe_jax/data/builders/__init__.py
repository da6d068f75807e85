"""The project's own datasets. Each is a TFDS builder that needs no TensorFlow."""

import tensorflow_datasets as tfds

from moe_jax.data.builders.debian_text import DebianText
from moe_jax.data.builders.fashion_mnist import FashionMnist
from moe_jax.data.builders.glyphs import Glyphs
from moe_jax.data.builders.labelled_text import LabelledTextBuilder
from moe_jax.data.builders.mnist5k import Mnist5k
from moe_jax.data.builders.python_library import PythonLibrary
from moe_jax.data.builders.translations import Translations
from moe_jax.data.builders.vowels import PetersonBarney

BUILDERS: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {
    builder.name: builder
    for builder in (
        PythonLibrary,
        DebianText,
        Mnist5k,
        FashionMnist,
        Glyphs,
        Translations,
        PetersonBarney,
    )
}
"""Every dataset that `experiments/prepare_data.py` can prepare, by name."""

__all__ = [
    "BUILDERS",
    "DebianText",
    "FashionMnist",
    "Glyphs",
    "LabelledTextBuilder",
    "Mnist5k",
    "PetersonBarney",
    "PythonLibrary",
    "Translations",
]
