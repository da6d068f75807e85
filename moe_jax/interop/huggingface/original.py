"""Names of tensors as transformers 4 has them, from those of transformers 5's own format.

Version 5 names and fuses tensors otherwise in memory and writes the old format unless it is told not to
(`save_original_format=False`), as several trainers tell it.
"""

import dataclasses
import re
from collections.abc import Mapping

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.files import Stored

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def original(family: Family, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """A folder's tensors by the names that `family.tensors` has; parts of fused ones are tensors.

    Raises:
      UserError: a tensor is there in both formats, or a fused one is no three-dimensional one.
    """
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        old = name
        for pattern, replacement in family.renamed:
            old = re.sub(pattern, replacement, old)
        match = _FUSED.fullmatch(old) if family.experts else None
        parts = {old: tensor}
        if match is not None and family.experts is not None:
            parts = _parts(tensor, match[1], match[2], family.experts)
        for part, place in parts.items():
            if part in found:
                raise UserError(
                    f"{tensor.file.parent} has a tensor {part} and {name}, which is the same in "
                    "another format; leave one of them out."
                )
            found[part] = place
    return found


def _parts(
    tensor: Stored, prefix: str, kind: str, names: tuple[str, str, str]
) -> dict[str, Stored]:
    """The experts' tensors of a fused one: [E, 2 f, d] of gates and inputs, or [E, d, f]."""
    gate, into, out = names
    shape = tensor.shape
    if len(shape) != 3 or (kind == "gate_up_proj" and shape[1] % 2):
        raise UserError(
            f"tensor {tensor.name} of {tensor.file} is {shape}, which are no experts' matrices; copy "
            "the folder again."
        )
    if kind == "down_proj":
        return {
            f"{prefix}.{expert}.{out}": dataclasses.replace(tensor, shape=shape[1:], index=expert)
            for expert in range(shape[0])
        }
    half = (shape[1] // 2, shape[2])
    return {
        f"{prefix}.{expert}.{name}": dataclasses.replace(
            tensor, shape=half, index=expert, start=start
        )
        for expert in range(shape[0])
        for name, start in ((gate, 0), (into, half[0]))
    }
