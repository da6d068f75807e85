"""What all models of token sequences do alike: positions, lengths, and no look at later tokens.

Axis letters: B batch, L length.
"""

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.layers.moe import TokenInfo
from moe_jax.routing.router import Router


def token_info(tokens: jax.Array, mask: jax.Array, before: jax.Array | None = None) -> TokenInfo:
    """Positions count real tokens only, so that left padding changes nothing.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, False for padding.
      before: [B] int32, real tokens before these; None for none.
    """
    earlier = 0 if before is None else before[:, None]
    positions = jnp.maximum(earlier + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return TokenInfo(mask, tokens, positions, jnp.broadcast_to(rows, tokens.shape))


def check_length(length: int, max_length: int) -> None:
    """Raises UserError for a sequence that is too long."""
    if length > max_length:
        raise UserError(
            f"model.max_length is {max_length}, but a sequence has {length} tokens; raise it or "
            "shorten the sequence."
        )


def check_no_leak(router: Router, field: str, remedies: str = "") -> None:
    """Raises UserError for a router that shows a decoder later tokens.

    Args:
      router: of the decoder.
      field: what the error calls it, such as `model.moe.router`.
      remedies: further ones than another router, as a clause that begins with a comma.
    """
    if router.leak:
        raise UserError(
            f"{field} is {type(router).__name__}, with which a decoder would look ahead: "
            f"{router.leak}; use a causal router or priority order{remedies}."
        )
