"""Where in the author's program an instruction comes from."""

import collections

from moe_jax.analysis.hlo.text import Computation, Module

# What stands at the borders between parts of a program.
_MOVES = ("/all_to_all", "/all_gather", "/dynamic_slice", "/dynamic_update_slice")


def op_names_of(module: Module) -> dict[str, str]:
    """Of every instruction: its own metadata, or else that of what it works for.

    XLA drops the metadata of some instructions that it rewrites, such as products whose batch
    dimension has size 1. A consumer then stands for them, or else an operand, or else the caller; a
    neighbour that computes goes before one that only moves data.
    """
    found: dict[str, str] = {}
    for computation in reversed(module.computations):  # Callers stand after what they call.
        called_by = (found.get(caller.name, "") for _, caller in module.callers[computation])
        found |= _completed(module.computations[computation], next(filter(None, called_by), ""))
    return found


def separate(op_name: str, count: int) -> list[str]:
    """The op_names of the `count` results that XLA combined under one: prefix/(first:second)."""
    start, depth = len(op_name), 0
    for start in reversed(range(len(op_name))):
        depth += {")": 1, "(": -1}.get(op_name[start], 0)
        if not depth:
            break
    if not op_name.endswith(")") or op_name[max(start - 1, 0)] not in "/(":
        return [op_name] * count
    alternatives = [""]
    for letter in op_name[start + 1 : -1]:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == ":" and not depth:
            alternatives.append("")
        else:
            alternatives[-1] += letter
    if len(alternatives) != count:
        return [op_name] * count
    return [op_name[:start] + alternative for alternative in alternatives]


def _completed(instructions: Computation, caller: str) -> dict[str, str]:
    """op_names of one computation, those that are missing filled in from around them."""
    names = {name: instruction.op_name for name, instruction in instructions.items()}
    consumers: dict[str, list[str]] = collections.defaultdict(list)
    for name, instruction in instructions.items():
        for operand in instruction.operands:
            consumers[operand].append(name)
    # Backwards for what consumers know, then forwards for what only operands know.
    for name in (*reversed(instructions), *instructions):
        around = [*consumers[name], *instructions[name].operands]
        known = [op_name for other in around if (op_name := names.get(other))]
        computing = [op_name for op_name in known if not op_name.endswith(_MOVES)]
        names[name] = names[name] or next(iter(computing + known), "")
    return {name: op_name or caller for name, op_name in names.items()}
