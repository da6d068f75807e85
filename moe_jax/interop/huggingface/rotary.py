"""Rotary positions of a config.json, in every spelling that transformers 4 and 5 read and write.

Version 4 has `rope_theta` and, for scaled positions, `rope_scaling`; version 5 has `rope_parameters`
with the base in it, and still reads the old fields. Where both are there, a `rope_scaling` that is not
empty takes the place of `rope_parameters` as a whole. What is written has both.
"""

import math
from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.fields import Fields, checked_number, shortened
from moe_jax.layers.positions import RotaryScaling

_YARN = "yarn"
_PLAIN_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN_KEYS = _PLAIN_KEYS | {
    "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "truncate",
}  # fmt: skip
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


def read_rotary(
    fields: Fields, default_base: float, width: int, max_length: int, scales_scores: bool
) -> tuple[float, RotaryScaling]:
    """Base and scaling.

    Args:
      fields: config.json.
      default_base: the family's.
      width: of a head's rotated part.
      max_length: the model's `max_position_embeddings`.
      scales_scores: whether the family multiplies scores by m(mscale_all_dim)^2 (DeepSeek).

    Raises:
      UserError: a scaling that is not supported, or values that cannot be.
    """
    name, parameters = _parameters(fields)
    own_base = fields.raw("rope_theta", default_base)
    if "rope_theta" in parameters:
        base = _number(fields, name, parameters, "rope_theta", above=0)
    else:
        base = checked_number(own_base, "rope_theta", fields.model_type, above=0)
    fields.only("partial_rotary_factor", None, 1.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", _YARN):
        raise UserError(
            f"config.json has rotary positions of type {shortened(kind)} in {name}; supported for "
            f"{fields.model_type} are 'default' and 'yarn'."
        )
    known = _YARN_KEYS if kind == _YARN else _PLAIN_KEYS
    # Plain positions have no use for the others, which transformers drops with a warning.
    unknown = sorted(key for key in parameters.keys() - known if parameters[key] is not None)
    if unknown:
        raise UserError(
            f"config.json has {unknown[0]}={shortened(parameters[unknown[0]])} in {name}, which "
            f"rotary positions of type {kind!r} do not have; take it out or correct the type."
        )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"config.json has partial_rotary_factor={shortened(parameters['partial_rotary_factor'])} in "
            f"{name}; only 1.0 is supported for {fields.model_type}."
        )
    if kind == "default":
        fields.raw("original_max_position_embeddings")  # Of scaled positions only.
        return base, RotaryScaling()
    return base, _yarn(fields, name, parameters, base, width, max_length, scales_scores)


def _parameters(fields: Fields) -> tuple[str, dict[str, Any]]:
    """The field that transformers reads, and its content.

    Raises:
      UserError: it is no object.
    """
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.raw(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"config.json has {name}={shortened(value)}, but it has to be an object or null."
            )
    name = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    return name, fields.raw(name) or {}


def _number(
    fields: Fields, name: str, parameters: dict[str, Any], key: str, **bounds: float
) -> float:
    return checked_number(parameters[key], f"{name}.{key}", fields.model_type, **bounds)


def _yarn(
    fields: Fields,
    name: str,
    parameters: dict[str, Any],
    base: float,
    width: int,
    max_length: int,
    scales_scores: bool,
) -> RotaryScaling:
    """What transformers computes, in our fields; arguments as of `read_rotary`.

    Raises:
      UserError: a value that cannot be, or frequencies that ours do not have.
    """

    def number(key: str, default: float, **bounds: float) -> float:
        """0 and null are the default there."""
        if not parameters.get(key):
            return default
        return _number(fields, name, parameters, key, **bounds)

    # A field of its own beside the object takes the object's place.
    length_name = "original_max_position_embeddings"
    own_length = fields.raw(length_name, parameters.get(length_name, max_length))
    length = checked_number(own_length, length_name, fields.model_type, at_least=1)
    if length != int(length):
        raise UserError(f"config.json has {length_name}={length}, which is no number of tokens.")
    if "factor" not in parameters:
        raise UserError(
            f"config.json has yarn in {name} without factor; add by how much texts are longer."
        )
    factor = max_length / length
    if parameters["factor"] is not None:
        factor = _number(fields, name, parameters, "factor")
    if factor < 1:
        raise UserError(
            f"config.json has factor={factor} in {name}; texts can only be made longer, so it must "
            "be at least 1."
        )
    if parameters.get("truncate", True) is not True:
        raise UserError(
            f"config.json has truncate={shortened(parameters['truncate'])} in {name}; only True is supported "
            f"for {fields.model_type}."
        )
    fast = number("beta_fast", _BETA_FAST, above=0)
    slow = number("beta_slow", _BETA_SLOW, above=0)
    if fast <= slow:
        raise UserError(
            f"config.json has beta_fast={fast} and beta_slow={slow} in {name}; beta_fast must be "
            "above beta_slow."
        )
    mscale = number("mscale", 0.0, above=0)
    all_dim = number("mscale_all_dim", 0.0, above=0)
    vectors = _m(factor, mscale) / _m(factor, all_dim) if mscale and all_dim else _m(factor, 1.0)
    if parameters.get("attention_factor") is not None:
        vectors = _number(fields, name, parameters, "attention_factor", above=0)
    if factor == 1:
        if vectors != 1:
            raise UserError(
                f"config.json has attention_factor={vectors} in {name}, but factor=1 scales nothing; "
                "only attention_factor=1 is supported with it."
            )
        return RotaryScaling()
    if base <= 1:
        raise UserError(f"config.json has rope_theta={base}; with yarn it must be above 1.")
    scores = all_dim if scales_scores else 0.0
    wanted = vectors * _m(factor, scores)
    # The field as it is given, where it says the same.
    plain = next((m for m in (mscale, 1.0) if math.isclose(_m(factor, m), wanted)), None)
    scaling = RotaryScaling(
        factor=factor,
        original_length=int(length),
        beta_fast=fast,
        beta_slow=slow,
        mscale=(wanted - 1) / (0.1 * math.log(factor)) if plain is None else plain,
        mscale_all_dim=scores,
    )
    _check_pairs(scaling, width, base, name)
    return scaling


def _m(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _check_pairs(scaling: RotaryScaling, width: int, base: float, name: str) -> None:
    """Refuses lengths for which transformers' interpolation runs backwards, and ours does not.

    Raises:
      UserError: the slowest pairs would be interpolated before the fastest ones.
    """

    def pair(turns: float) -> float:
        length = scaling.original_length
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), width - 1)
    if low > high:
        raise UserError(
            f"config.json has original_max_position_embeddings={scaling.original_length} in {name}, "
            f"for which no pair of {width} numbers turns between beta_slow={scaling.beta_slow:g} and "
            f"beta_fast={scaling.beta_fast:g} times; correct it."
        )


def rotary_fields(base: float, scaling: RotaryScaling, scales_scores: bool) -> dict[str, Any]:
    """The inverse of `read_rotary`, for transformers 4 and 5; arguments as there."""
    if scaling.factor == 1:
        return {
            "rope_theta": base,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": base, "rope_type": "default"},
        }
    parameters: dict[str, Any] = {
        "rope_type": _YARN,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    mscale, all_dim = scaling.mscale, scaling.mscale_all_dim
    if scales_scores and all_dim:
        parameters["mscale_all_dim"] = all_dim
        if mscale:
            parameters["mscale"] = mscale
    if not (all_dim and mscale) and (all_dim or mscale != 1):
        parameters["attention_factor"] = scaling.of_vectors
    return {
        "rope_theta": base,
        # Servers that are older than `rope_type` read `type`.
        "rope_scaling": parameters | {"type": _YARN},
        "rope_parameters": parameters | {"rope_theta": base},
    }
