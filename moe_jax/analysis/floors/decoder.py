"""The floor of a training step: a decoder in plain jax.numpy, with nothing of this package in it.

What XLA makes of the fewest operations: no masks of padding, no statistics, no router losses, products
over [T, d], parameters in a tree. Dense, or with experts that all get equally many rows.

Axis letters: B batch, L length, T = B * L tokens, K choices per token, N = T * K assignments,
E experts, V vocabulary, d width, f expert or feed-forward width, H heads, h head width.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

Step = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder and of its batch; feed-forward networks are SwiGLU of width f.

    Attributes:
      width: d; f is 4 d, of each expert 4 d / K.
      experts: E; 0 for a dense decoder.
      layers, head_width, vocabulary, rows, length, k: of the model and the batch.
    """

    width: int
    experts: int
    layers: int = 4
    head_width: int = 64
    vocabulary: int = 264
    rows: int = 8
    length: int = 256
    k: int = 2

    @property
    def heads(self) -> int:
        """H."""
        return self.width // self.head_width

    @property
    def mlp_width(self) -> int:
        """f, of an expert where there are experts: a token meets as many products either way."""
        return 4 * self.width // (self.k if self.experts else 1)

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def flops(self) -> int:
        """FLOPs of a step's matrix products, two per multiply-add; causal scores count as a whole."""
        of_token = self.layers * (4 * self.width**2 + 12 * self.width**2)
        of_token += self.vocabulary * self.width + 2 * self.layers * self.length * self.width
        return 6 * self.tokens * of_token


def parameters(shape: DecoderShape, key: jax.Array) -> dict[str, Any]:
    """float32 arrays by name, normal with variance 1 / fan_in; norms are 1."""
    d, f = shape.width, shape.mlp_width
    keys: Iterator[jax.Array] = iter(jax.random.split(key, 7 * shape.layers + 1))

    def matrix(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes) / sizes[-2] ** 0.5

    experts = (shape.experts,) if shape.experts else ()
    layers = [
        {
            "attention_norm": jnp.ones(d),
            "qkv": matrix(d, 3 * d),
            "out": matrix(d, d),
            "mlp_norm": jnp.ones(d),
            "w_gate": matrix(*experts, d, f),
            "w_in": matrix(*experts, d, f),
            "w_out": matrix(*experts, f, d),
        }
        for _ in range(shape.layers)
    ]
    if shape.experts:
        layers = [layer | {"router": matrix(d, shape.experts)} for layer in layers]
    return {"table": matrix(d, shape.vocabulary).T, "layers": layers, "norm": jnp.ones(d)}


def train_step(shape: DecoderShape) -> tuple[Any, Step]:
    """The first state and the compiled step (state, tokens [B, L + 1]) -> (state, loss).

    AdamW with clipping, like the programs that it is compared with. The step takes over the state.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    first = parameters(shape, jax.random.key(0))

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        now, moments = state
        value, gradients = jax.value_and_grad(loss)(now, tokens, shape)
        updates, moments = optimizer.update(gradients, moments, now)
        return (optax.apply_updates(now, updates), moments), value

    return (first, optimizer.init(first)), jax.jit(step, donate_argnums=0)


def loss(parameters: dict[str, Any], tokens: jax.Array, shape: DecoderShape) -> jax.Array:
    """[] mean cross-entropy of tokens [B, L + 1]."""
    x = parameters["table"][tokens[:, :-1]].reshape(shape.tokens, shape.width) * shape.width**0.5
    for layer in parameters["layers"]:
        x = x + _attention(layer, _norm(x, layer["attention_norm"]), shape)
        feed = _experts if shape.experts else _feed_forward
        x = x + feed(layer, _norm(x, layer["mlp_norm"]), shape)
    logits = _norm(x, parameters["norm"]) @ parameters["table"].T
    targets = tokens[:, 1:].reshape(-1)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _attention(layer: dict[str, jax.Array], x: jax.Array, shape: DecoderShape) -> jax.Array:
    qkv = (x @ layer["qkv"]).reshape(shape.rows, shape.length, 3 * shape.heads, shape.head_width)
    query, key, value = jnp.split(qkv, 3, axis=2)
    half = shape.head_width // 2
    angle = jnp.arange(shape.length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]

    def rotate(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        rotated = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(rotated, axis=-1)

    scores = jnp.einsum("blHh,bmHh->bHlm", rotate(query), rotate(key)) / shape.head_width**0.5
    earlier = jnp.tril(jnp.ones((shape.length, shape.length), bool))
    weights = jax.nn.softmax(jnp.where(earlier, scores, -1e30))
    attended = jnp.einsum("bHlm,bmHh->blHh", weights, value)
    return attended.reshape(x.shape) @ layer["out"]


def _feed_forward(layer: dict[str, jax.Array], x: jax.Array, shape: DecoderShape) -> jax.Array:
    return (jax.nn.silu(x @ layer["w_gate"]) * (x @ layer["w_in"])) @ layer["w_out"]


def _experts(layer: dict[str, jax.Array], x: jax.Array, shape: DecoderShape) -> jax.Array:
    """The N assignments in the order of their experts, of which each expert gets the next N/E.

    Where loads are uneven these are other rows than its own, so this computes no model; no router that
    finds the right rows can be faster.
    """
    gates, experts = jax.lax.top_k(jax.nn.softmax(x @ layer["router"]), shape.k)
    order = jnp.argsort(experts.reshape(-1))
    rows = x[order // shape.k].reshape(shape.experts, -1, shape.width)
    hidden = jax.nn.silu(rows @ layer["w_gate"]) * (rows @ layer["w_in"])
    outputs = (hidden @ layer["w_out"]).reshape(-1, shape.width)
    outputs = outputs * gates.reshape(-1)[order, None]
    return jnp.zeros_like(x).at[order // shape.k].add(outputs)
