"""The project's own datasets. Each is a TFDS builder that needs no TensorFlow, in a file of its own."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any


def builders() -> dict[str, Any]:
    """Every dataset that `prepare_data` can prepare: name -> its builder's class.

    Those are the builders of this folder, and those that the user imported: a subclass of
    `LabelledTextBuilder`, `LabelledImagesBuilder` or any TFDS builder.
    """
    import tensorflow_datasets as tfds

    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = sorted(_own(tfds.core.GeneratorBasedBuilder), key=lambda cls: cls.name)
    return {cls.name: cls for cls in found}


def _own(base: type) -> Iterator[Any]:
    cls: Any
    for cls in base.__subclasses__():
        yield from _own(cls)
        if not inspect.isabstract(cls) and not cls.__module__.startswith("tensorflow_datasets."):
            yield cls
