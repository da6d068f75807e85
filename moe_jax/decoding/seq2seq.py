"""Decoding with an encoder-decoder: sampled, greedy and by beam search, and from text to text.

Axis letters: B batch, M input length, N new tokens, W beams, R = B * W rows, V vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.data.pairs import INSTRUCTION
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.decoding.beam_search import Beams, beam_search
from moe_jax.decoding.sampling import Sampling, draw
from moe_jax.decoding.text import check_tokens, until_end
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.language_model import Cache
from moe_jax.parallel.mesh import TOKEN_AXES
from moe_jax.parallel.sharding import axis_size


@dataclasses.dataclass(frozen=True)
class Frame:
    """The tokens around a target.

    Attributes:
      begin: what a target begins with.
      ends: each of them ends it.
      pad: follows the end.
    """

    begin: int = Tokenizer.BOS
    ends: tuple[int, ...] = (Tokenizer.EOS,)
    pad: int = Tokenizer.PAD

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frame":
        """What the tokenizer frames texts with."""
        return cls(tokenizer.BOS, tokenizer.ends, tokenizer.PAD)


def sample(
    model: EncoderDecoder,
    inputs: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    new_tokens: int,
    sampling: Sampling,
    allowed: jax.Array | None = None,
    frame: Frame = Frame(),
) -> jax.Array:
    """Draws a target for each input; jit-able with `new_tokens`, `sampling` and `frame` static.

    Args:
      model: the model.
      inputs: [B, M] int32.
      mask: [B, M] bool, False for padding.
      key: PRNG key of the draws.
      new_tokens: N, at least 1.
      sampling: how to draw; temperature 0 is greedy.
      allowed: [V] bool, ids that may be drawn; None for all.
      frame: the tokens around a target.

    Returns:
      [B, N] int32, the end included if one was reached, and padding after it.
    """
    cache = _encoded(model, inputs, mask, new_tokens)
    batch = inputs.shape[0]

    def unfinished(carry: tuple) -> jax.Array:
        index, _, _, ended, _ = carry
        return (index < new_tokens) & ~ended.all()

    def step(carry: tuple) -> tuple:
        index, last, tokens, ended, cache = carry
        logits, _, cache = model.decode(None, mask, last[:, None], None, Mode.DECODE, cache=cache)
        drawn = draw(logits[:, -1], sampling, jax.random.fold_in(key, index), allowed)
        last = jnp.where(ended, frame.pad, drawn)
        return (
            index + 1,
            last,
            tokens.at[:, index].set(last),
            ended | jnp.isin(last, jnp.array(frame.ends)),
            cache,
        )

    start = (
        jnp.zeros((), jnp.int32),
        jnp.full(batch, frame.begin, jnp.int32),
        jnp.full((batch, new_tokens), frame.pad, jnp.int32),
        jnp.zeros(batch, bool),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, start)[2]


def search(
    model: EncoderDecoder,
    inputs: jax.Array,
    mask: jax.Array,
    new_tokens: int,
    beams: Beams,
    allowed: jax.Array | None = None,
    frame: Frame = Frame(),
) -> tuple[jax.Array, jax.Array]:
    """The W best targets of each input; jit-able with `new_tokens`, `beams` and `frame` static.

    Args:
      model, inputs, mask, new_tokens, allowed, frame: as of `sample`.
      beams: W and the length penalty.

    Returns:
      [B, W, N] int32, best first, and their scores [B, W] float32: see `beam_search`.
    """
    cache = _encoded(model, inputs, mask, new_tokens)
    batch, width = inputs.shape[0], beams.count
    row_mask = jnp.repeat(mask, width, axis=0)

    def step(last: jax.Array, cache: Cache) -> tuple[jax.Array, Cache | None]:
        logits, _, cache_after = model.decode(
            None, row_mask, last[:, None], None, Mode.DECODE, cache=cache
        )
        return logits[:, -1], cache_after

    return beam_search(
        step,
        _of_parents,
        _repeated(cache, width),
        batch,
        new_tokens,
        beams,
        begin=frame.begin,
        ends=frame.ends,
        pad=frame.pad,
        allowed=allowed,
    )


def _encoded(model: EncoderDecoder, inputs: jax.Array, mask: jax.Array, new_tokens: int) -> Cache:
    """The decoder's cache before its first token."""
    memory, _ = model.encode(inputs, mask, encoder_mode(model.config))
    return model.empty_cache(memory, new_tokens)


def encoder_mode(config: EncoderDecoderConfig) -> Mode:
    """No token of an input is dropped, unless experts choose among those of whole groups."""
    encoder = config.encoder
    tokens_choose = all(moe.router.tokens_choose for moe in encoder.moe_settings)
    return Mode.DECODE if tokens_choose else Mode.EVALUATE


def _repeated(cache: Cache, width: int) -> Cache:
    """Each row W times in a row."""
    return Cache(
        # The first axis of the blocks' arrays is over repetitions of a period.
        jax.tree.map(lambda a: jnp.repeat(a, width, axis=1), cache.trunk),
        jnp.repeat(cache.filled, width, axis=0),
        cache.start,
    )


def _of_parents(cache: Cache, parent: jax.Array) -> Cache:
    """See `beam_search.Select`; hypotheses of a sequence share the memory, which stays."""

    def rows(a: jax.Array) -> jax.Array:
        """[R, ...] to [R, ...]; batched, so that no row leaves the device of its sequence."""
        of_sequence = a.reshape(*parent.shape, *a.shape[1:])
        return jax.vmap(lambda b, p: b[p])(of_sequence, parent).reshape(a.shape)

    def attention(tree: Any) -> Any:
        return jax.tree.map(jax.vmap(rows), tree)

    stack = [
        [dataclasses.replace(block, attention=attention(block.attention)) for block in stage]
        for stage in cache.trunk
    ]
    return Cache(stack, rows(cache.filled), cache.start)


def translate_texts(
    model: EncoderDecoder,
    mesh: Mesh,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    new_tokens: int,
    method: Sampling | Beams,
    seed: int,
) -> list[str]:
    """The target of each text, in one batch.

    Args:
      model: on `mesh`.
      mesh: its token shards split the batch, which is filled up with copies to divide evenly.
      tokenizer: the run's or the folder's.
      texts: inputs, as the data of the run have them: with their "translate ... to ...", or with
        sentinels as `encode_input` reads them.
      new_tokens: tokens of a target at most.
      method: how to decode.
      seed: of the draws.

    Raises:
      UserError: bad sampling or search values, a sentinel that the tokenizer lacks, or a tokenizer
        of another model.
    """
    config: EncoderDecoderConfig = model.config
    if isinstance(method, Sampling):
        method.validate(config.output_vocab_size)
    else:
        method.validate()
    encoded = [encode_input(tokenizer, text) for text in texts]
    check_tokens(encoded, config.vocab_size)
    length = max(map(len, encoded))
    rows = _rows(config, axis_size(mesh, TOKEN_AXES), len(texts), length)
    inputs = np.full((rows, length), tokenizer.PAD, np.int32)
    # A folder may pad with the token that ends its inputs, which is to be read.
    mask = np.zeros((rows, length), bool)
    for row in range(rows):
        tokens = encoded[row % len(texts)]
        inputs[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    frame = Frame.of(tokenizer)
    sharding = NamedSharding(mesh, PartitionSpec(TOKEN_AXES))
    definition, parameters = nnx.split(model)
    allowed = jnp.asarray(generated_ids(tokenizer, config.output_vocab_size))

    @jax.jit
    def run(parameters: nnx.State, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        merged = nnx.merge(definition, parameters)
        if isinstance(method, Sampling):
            key = jax.random.key(seed)
            return sample(merged, inputs, mask, key, new_tokens, method, allowed, frame)
        return search(merged, inputs, mask, new_tokens, method, allowed, frame)[0][:, 0]

    with jax.set_mesh(mesh):
        placed = jax.device_put((inputs, mask), sharding)
        drawn = jax.device_get(run(parameters, *placed))
    return [tokenizer.decode(until_end(tokenizer, row)) for row in drawn[: len(texts)]]


def encode_input(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of an input, int32 [tokens], EOS included.

    A tokenizer that frames inputs itself gives them. Otherwise an instruction has tokens of its own,
    as in `PairRows`: no subword spans its end. Where the tokenizer has extra ids, `<extra_id_0>` in
    the text is T5's first sentinel, as `Tokenizer.decode` writes it.

    Raises:
      UserError: the tokenizer has fewer.
    """
    if tokenizer.frames_inputs:
        return tokenizer.encode_prompt(text).astype(np.int32)
    instruction = INSTRUCTION.match(text)
    begin = instruction.end() if instruction else 0
    rest = text[begin:]
    parts = re.split(r"<extra_id_(\d+)>", rest) if tokenizer.extra_ids else [rest]
    tokens: list[int] = tokenizer.encode(text[:begin]).tolist()
    for place, part in enumerate(parts):
        if place % 2 == 0:
            tokens += tokenizer.encode(part).tolist()
        elif int(part) < tokenizer.extra_ids:
            tokens.append(tokenizer.vocab_size - 1 - int(part))
        else:
            raise UserError(
                f"the prompt has <extra_id_{part}>, but the run's tokenizer has "
                f"{tokenizer.extra_ids} extra ids; use those below {tokenizer.extra_ids}."
            )
    return np.array([*tokens, tokenizer.EOS], np.int32)


def _rows(config: EncoderDecoderConfig, shards: int, texts: int, length: int) -> int:
    """The fewest rows for all texts that shards divide, and groups where the encoder has them."""
    unit = shards
    if encoder_mode(config) == Mode.EVALUATE:
        tokens = config.encoder.moe.for_rows(length).group_size * shards
        unit = math.lcm(shards, tokens // math.gcd(tokens, length))
    return -(-texts // unit) * unit


def generated_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[V] bool, what a target may consist of: text, sentinels and the end."""
    ids = np.arange(vocab_size)
    first_sentinel = tokenizer.vocab_size - tokenizer.extra_ids
    sentinels = (ids >= first_sentinel) & (ids < tokenizer.vocab_size)
    return tokenizer.may_be_drawn(vocab_size) | sentinels
