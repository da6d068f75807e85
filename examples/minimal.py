"""A Mixture-of-Experts language model, all of it, in one file of jax, numpy and optax.

    python examples/minimal.py

trains it for about a minute, on eight devices (parts of one CPU) and on text that every Python
brings along, its own library. Read it from top to bottom. It computes what moe_jax computes with
configs/quickstart.py: tests/examples/test_minimal.py compares both, step by step.

Axis letters, in docstrings and code:
  B batch, L length     G groups of S tokens, B L = G S      K choices per token
  E experts             C slots per expert and group         X devices along the mesh axis "expert"
  d width               f expert width         H heads       h head width         V vocabulary
"""

import functools
import math
import pathlib
import sysconfig
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import NamedSharding, P

BLOCKS, V, d, H, h, f = 2, 264, 64, 1, 64, 128  # A token is a byte; V has some to spare.
E, K, S = 8, 1, 256
CAPACITY_FACTOR = 1.25
BALANCE = 1e-2  # Switch's alpha, the coefficient of the balancing loss.
GATE_SCALE = 8.0  # Switch: 1. Gates start near 1/E, so E makes outputs start like a dense layer's.
B, L, STEPS = 16, 128, 1200
PEAK_RATE, WARM_UP, DECAY, CLIP = 4e-3, 100, 0.1, 1.0

MESH = {"data": 2, "expert": 4}
TOKENS, EXPERTS = P(("data", "expert")), P("expert")  # Tokens are split over all devices.

Parameters = dict[str, Any]
Metrics = dict[str, jax.Array]


# The router ------------------------------------------------------------------------------------


class Assignment(NamedTuple):
    """Where the tokens of a group go.

    experts: [S, K] int32, best first.
    position_in_expert: [S, K] int32, the place among those of the expert; from C on there is none.
    gates: [S, K] float32, what the expert's output is multiplied with.
    """

    experts: jax.Array
    position_in_expert: jax.Array
    gates: jax.Array


def capacity(tokens: int, num_experts: int) -> int:
    """C = S K / E * capacity factor, rounded up (Switch, Fedus et al. 2021, eq. 3, with K = 1)."""
    return math.ceil(tokens * K * CAPACITY_FACTOR / num_experts)


def route(router: jax.Array, x: jax.Array) -> tuple[Assignment, jax.Array]:
    """p = softmax(x W); the K largest are a token's choices and gates (Switch eq. 1 and 2).

    W [d, E] and the tokens of a group [S, d] to where they go, and the group's balancing loss [].
    """
    logits = jnp.einsum("Sd,dE->SE", x, router, precision="highest")
    probabilities = jax.nn.softmax(logits)
    _, experts = jax.lax.top_k(logits, K)
    gates = GATE_SCALE * jnp.take_along_axis(probabilities, experts, axis=1)
    assignment = Assignment(experts, position_in_expert(experts, router.shape[1]), gates)
    return assignment, balancing_loss(probabilities, experts)


def position_in_expert(experts: jax.Array, num_experts: int) -> jax.Array:
    """How many choices before this one want the same expert (GShard, Lepikhin et al. 2020, alg. 1).

    [S, K] int32 to [S, K] int32. A token is served with all its choices before the next, so that it
    depends on none that follows; alg. 1 serves all first choices first, the same where K is 1.
    """
    chosen = jax.nn.one_hot(experts.reshape(-1), num_experts, dtype=jnp.int32)
    before = jnp.cumsum(chosen, axis=0) - chosen
    return jnp.sum(before * chosen, axis=1).reshape(experts.shape)


def balancing_loss(probabilities: jax.Array, experts: jax.Array) -> jax.Array:
    """E * sum_e F_e P_e (Switch eq. 4, without alpha): p [S, E], choices [S, K] to []; 1 if even.

    F_e is the fraction of tokens whose first choice is e (eq. 5), P_e the mean of p_e (eq. 6). Only
    P has a gradient: the more tokens an expert has, the harder its probability is pushed down.
    """
    num_experts = probabilities.shape[1]
    fraction = jax.nn.one_hot(experts[:, 0], num_experts).mean(axis=0)
    return num_experts * jnp.sum(fraction * probabilities.mean(axis=0))


# The layer -------------------------------------------------------------------------------------


def dispatch(x: jax.Array, assignment: Assignment, num_experts: int) -> jax.Array:
    """Copies the tokens of a group [S, d] into their experts' slots [E, C, d]; empty ones are 0."""
    tokens, width = x.shape
    slots = jnp.zeros((num_experts, capacity(tokens, num_experts), width))
    return slots.at[assignment.experts, assignment.position_in_expert].add(x[:, None], mode="drop")


def feed_forward(w_in: jax.Array, w_out: jax.Array, x: jax.Array) -> jax.Array:
    """relu(x W_in) W_out (Vaswani et al. 2017, eq. 2), in each expert with its own matrices.

    W_in [E, d, f], W_out [E, f, d], and slots [E, G, C, d] to [E, G, C, d].
    """
    hidden = jax.nn.relu(jnp.einsum("EGCd,Edf->EGCf", x, w_in))
    return jnp.einsum("EGCf,Efd->EGCd", hidden, w_out)


def combine(outputs: jax.Array, assignment: Assignment) -> jax.Array:
    """y = sum over a token's choices of gate * expert(x) (Switch eq. 2): [E, C, d] to [S, d].

    A choice without a slot adds nothing; the residual connection carries the token on.
    """
    places = (assignment.experts, assignment.position_in_expert)
    chosen = outputs.at[places].get(mode="fill", fill_value=0)
    return jnp.sum(assignment.gates[:, :, None] * chosen, axis=1)


def moe_of_device(
    router: jax.Array, w_in: jax.Array, w_out: jax.Array, x: jax.Array
) -> tuple[jax.Array, Metrics]:
    """One device's share of the layer: GShard's algorithm 2, with copies for its einsums.

    The router [d, E], this device's experts [E/X, d, f], [E/X, f, d] and its groups [G, S, d] to y
    [G, S, d], and means over all devices: of the balancing loss, and of choices without a slot.
    """
    num_experts = router.shape[1]
    assignment, losses = jax.vmap(functools.partial(route, router))(x)
    slots = jax.vmap(dispatch, in_axes=(0, 0, None), out_axes=1)(x, assignment, num_experts)
    # To the owners of the experts: [E, G, C, d] becomes [E/X, X G, C, d].
    slots = jax.lax.all_to_all(slots, "expert", split_axis=0, concat_axis=1, tiled=True)
    slots = feed_forward(w_in, w_out, slots)
    # And back to the owners of the tokens: [E, G, C, d].
    slots = jax.lax.all_to_all(slots, "expert", split_axis=1, concat_axis=0, tiled=True)
    y = jax.vmap(combine, in_axes=(1, 0))(slots, assignment)
    dropped = jnp.mean(assignment.position_in_expert >= slots.shape[2])
    return y, jax.lax.pmean({"balance": losses.mean(), "dropped": dropped}, tuple(MESH))


def moe(parameters: Parameters, x: jax.Array) -> tuple[jax.Array, Metrics]:
    """The layer on all devices of the mesh in force: [B, L, d] to [B, L, d], and its metrics [].

    S tokens that follow each other in the batch are a group, whatever the mesh.
    """
    groups = x.reshape(-1, S, x.shape[-1])
    specs = (P(), EXPERTS, EXPERTS, TOKENS)
    layer = jax.shard_map(moe_of_device, in_specs=specs, out_specs=(TOKENS, P()))
    y, metrics = layer(parameters["router"], parameters["w_in"], parameters["w_out"], groups)
    return y.reshape(x.shape), metrics


# The language model ----------------------------------------------------------------------------


def rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2)) * scale (Zhang & Sennrich 2019, eq. 4): scale [d] and [B, L, d]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x: jax.Array) -> jax.Array:
    """Turns (i, i + h/2) by position * 10000^(-2i/h) (Su et al. 2021, eq. 34): [B, L, H, h]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def attention(parameters: Parameters, x: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(h)) v over each token and those before it (Vaswani et al. 2017, eq. 1).

    [B, L, d] to [B, L, d]; the matrices are qkv [d, 3, H, h] and out [H, h, d].
    """
    q, k, v = jnp.einsum("BLd,dnHh->nBLHh", x, parameters["qkv"])
    attended = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return jnp.einsum("BLHh,Hhd->BLd", attended, parameters["out"])


def block(x: jax.Array, parameters: Parameters) -> tuple[jax.Array, Metrics]:
    """x + attention(norm(x)), then x + moe(norm(x)): [B, L, d] to [B, L, d] and its metrics."""
    x = x + attention(parameters["attention"], rms_norm(parameters["attention_norm"], x))
    y, metrics = moe(parameters["moe"], rms_norm(parameters["moe_norm"], x))
    return x + y, metrics


def language_model(parameters: Parameters, tokens: jax.Array) -> tuple[jax.Array, Metrics]:
    """Tokens [B, L] int32 to logits of the next [B, L, V], and metrics of each block [BLOCKS]."""
    table = parameters["table"]  # [V, d], of inputs and outputs (Vaswani et al. 2017, section 3.4).
    x = math.sqrt(table.shape[1]) * table[tokens]
    x, metrics = jax.lax.scan(block, x, parameters["stack"], unroll=True)
    return jnp.einsum("BLd,Vd->BLV", rms_norm(parameters["norm"], x), table), metrics


def initial_parameters(key: jax.Array) -> Parameters:
    """Matrices of variance 1 / inputs, cut at two deviations (Switch, section 2.4, with scale 1).

    Blocks are stacked: their arrays have one more axis, the first.
    """
    keys = iter(jax.random.split(key, 6))

    def matrix(inputs: int, *shape: int) -> jax.Array:
        normal = jax.random.truncated_normal(next(keys), -2, 2, shape)
        return normal / (0.87962566 * math.sqrt(inputs))  # The deviation that the cut leaves.

    stack = {
        "attention_norm": jnp.ones((BLOCKS, d)),
        "attention": {"qkv": matrix(d, BLOCKS, d, 3, H, h), "out": matrix(H * h, BLOCKS, H, h, d)},
        "moe_norm": jnp.ones((BLOCKS, d)),
        "moe": {
            "router": 0.02 * jax.random.normal(next(keys), (BLOCKS, d, E)),
            "w_in": matrix(d, BLOCKS, E, d, f),
            "w_out": matrix(f, BLOCKS, E, f, d),
        },
    }
    return {"table": matrix(d, V, d), "stack": stack, "norm": jnp.ones(d)}


# The training ----------------------------------------------------------------------------------


def is_decayed(parameters: Parameters) -> Parameters:
    """The tree with True for what weight decay shrinks: all but the norms and the table."""
    names = jax.tree.map_with_path(lambda path, _: path[-1].key, parameters)
    return jax.tree.map(lambda name: "norm" not in name and name != "table", names)


RATE = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, WARM_UP, STEPS, PEAK_RATE / 10)
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(CLIP),
    optax.adamw(RATE, b1=0.9, b2=0.95, weight_decay=DECAY, mask=is_decayed),
)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(
    parameters: Parameters, moments: optax.OptState, tokens: jax.Array
) -> tuple[Parameters, optax.OptState, Metrics]:
    """AdamW (Loshchilov & Hutter 2019, alg. 2) on cross-entropy + alpha * balancing losses.

    Tokens [B, L + 1] int32; the metrics' "loss" [] is the cross-entropy alone, in nats per token.
    """

    def objective(parameters: Parameters) -> tuple[jax.Array, Metrics]:
        logits, metrics = language_model(parameters, tokens[:, :-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        loss = losses.mean()
        return loss + BALANCE * metrics["balance"].sum(), {"loss": loss, **metrics}

    gradients, metrics = jax.grad(objective, has_aux=True)(parameters)
    updates, moments = OPTIMIZER.update(gradients, moments, parameters)
    return optax.apply_updates(parameters, updates), moments, metrics


def put(parameters: Parameters, mesh: jax.sharding.Mesh) -> Parameters:
    """Lays experts on their owners and, between their uses, splits them over "data", too (FSDP)."""
    specs = {"w_in": P(None, "expert", "data"), "w_out": P(None, "expert", None, "data")}

    def one(path: Any, array: jax.Array) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, specs.get(path[-1].key, P())))

    return jax.tree.map_with_path(one, parameters)


def main(steps: int = STEPS) -> list[float]:
    """Trains on the text of Python's library; returns the loss of each step in nats per byte."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    random, losses, start = np.random.default_rng(0), [], time.time()
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), (jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        parameters = put(initial_parameters(jax.random.key(0)), mesh)
        moments = OPTIMIZER.init(parameters)
        for step in range(1, steps + 1):
            first = random.integers(len(text) - L, size=(B, 1))
            rows = text[first + np.arange(L + 1)].astype(np.int32)
            tokens = jax.device_put(rows, NamedSharding(mesh, TOKENS))
            parameters, moments, metrics = train_step(parameters, moments, tokens)
            losses.append(float(metrics["loss"]))
            if step % 100 == 0 or step == 1:
                means = [f"{name} {value.mean():.3f}" for name, value in metrics.items()]
                print(f"{time.time() - start:3.0f} s  step {step:4}", *means, sep="  ", flush=True)
    return losses


if __name__ == "__main__":
    # On a machine with eight accelerators leave these two lines out.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    losses = main()
    print(f"final loss, the mean of the last 100 steps: {np.mean(losses[-100:]):.3f} nats per byte")
