"""From prompts as text to continuations as text."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.decoding.sampling import Sampling, generate, left_padded
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import TOKEN_AXES
from moe_jax.parallel.sharding import axis_size

MOST_NEW_TOKENS = 128
"""How many tokens are added where nobody says how many."""


def continue_texts(
    model: Any,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int | None,
    sampling: Sampling,
    seed: int,
) -> list[str]:
    """Continues all prompts in one batch, each until its text ends.

    Args:
      model: on `mesh`, called as LanguageModel is.
      mesh: its token shards split the batch, which is filled up with copies to divide evenly.
      tokenizer: of the text that the model was trained on.
      prompts: each is the beginning of a text; an empty one starts a text.
      new_tokens: tokens to add to each; None for as many as the model has room for, at most 128.
      sampling: how to draw.
      seed: of the draws.

    Raises:
      UserError: bad sampling values, or prompt and new tokens do not fit the positions.
    """
    sampling.validate(model.config.vocab_size)
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    check_tokens(encoded, model.config.vocab_size)
    longest = max(map(len, encoded))
    # The last token that is drawn is never read.
    room = model.config.max_length - longest + 1
    if room < 1:
        raise UserError(
            f"a prompt has {longest} tokens, more than model.max_length={model.config.max_length}; "
            "shorten it."
        )
    new_tokens = min(room, MOST_NEW_TOKENS) if new_tokens is None else new_tokens
    if new_tokens > room:
        raise UserError(
            f"max_new_tokens is {new_tokens}, which after a prompt of {longest} tokens is more "
            f"than model.max_length={model.config.max_length}; ask for at most {room} or shorten the "
            "prompt."
        )
    rows = -len(prompts) % axis_size(mesh, TOKEN_AXES)
    tokens, mask = left_padded(encoded + encoded[:1] * rows, tokenizer.PAD)
    sharding = NamedSharding(mesh, PartitionSpec(TOKEN_AXES))
    definition, parameters = nnx.split(model)
    # The model's table may be larger than the tokenizer's vocabulary.
    allowed = jnp.asarray(tokenizer.may_be_drawn(model.config.vocab_size))

    @jax.jit
    def run(parameters: nnx.State, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        merged = nnx.merge(definition, parameters)
        return generate(merged, tokens, mask, key, new_tokens, sampling, allowed)

    with jax.set_mesh(mesh):
        tokens, mask = jax.device_put((tokens, mask), sharding)
        drawn = jax.device_get(run(parameters, tokens, mask))
    return [tokenizer.decode(until_end(tokenizer, row)) for row in drawn[: len(prompts)]]


def check_tokens(encoded: Sequence[np.ndarray], vocab_size: int) -> None:
    """Refuses prompts with a token that the model's table of `vocab_size` rows lacks.

    Raises:
      UserError: one has.
    """
    highest = max(int(tokens.max()) for tokens in encoded)
    if highest >= vocab_size:
        raise UserError(
            f"a prompt has token {highest}, but model.vocab_size is {vocab_size}; the tokenizer "
            "belongs to another model."
        )


def until_end(tokenizer: Tokenizer, row: np.ndarray) -> np.ndarray:
    """The part of generated tokens [N] before the first that ends a text."""
    places = np.flatnonzero(np.isin(row, tokenizer.ends))
    return row[: places[0]] if len(places) else row
