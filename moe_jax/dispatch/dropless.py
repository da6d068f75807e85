"""Dropless dispatch: experts have no capacity, and every choice of every token is served.

Axis letters
  T tokens of this device     K choices per token    N = T * K assignments
  E experts, E/X of them here over X devices         R rows         d width
An assignment is a pair (token, choice), numbered token * K + choice; the number N stands for none.

A token is sent once to each device that owns one of its experts, with the numbers and gates of its
choices; there it is copied for each of them, and the gated sum comes back. So messages per token
are bounded by K, by X, and by the number of devices that a device-limited router allows.
"""

import dataclasses
import enum
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch import ragged, spill
from moe_jax.dispatch.exchange import Transport, Wire, gather_tokens, sum_to_owners
from moe_jax.dispatch.grouped_matmul.interface import GroupedMatmul
from moe_jax.dispatch.interface import Dispatch, Experts, row_experts
from moe_jax.dispatch.varying import varying_alike
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import platform_in_force
from moe_jax.routing.router import Assignment, Mean, Router, TokenAssignment

_LOG = logging.getLogger(__name__)

# A row in a loop over blocks takes about this many times as long as one in a batched product
# (forward and backward, d = 256, f = 1024, 256 rows per expert, 2 cores of an Intel Xeon).
LOOP_COST = 1.4


class Method(enum.StrEnum):
    """How experts work on rows of which each has another number.

    GROUPED: rows sorted by expert, grouped matrix products; made for accelerators.
    SPILL: slots for the expected load, as under capacity, and a loop over blocks for what is
      beyond; where the load is so uneven that most slots would be empty, the loop alone. For CPUs.
    AUTO: SPILL on CPUs unless `grouped_matmul` is set, otherwise GROUPED.
    """

    AUTO = "auto"
    GROUPED = "grouped"
    SPILL = "spill"


@dataclasses.dataclass
class Dropless(Dispatch):
    """A component of a config; for routers through which tokens choose.

    Attributes:
      transport: how tokens reach the experts' devices.
      wire: in which dtype.
      buffer_factor: rows that a device has room for, as a multiple of what it gets at balance. What
        does not fit is lost and counted in the statistic `overflow`; what is lost depends on the
        mesh. 0: room for all that can come, so nothing is ever lost. For X devices that are
        X / min(K, X) times the tokens and X * min(K, E/X) / K times the rows of experts at balance.
      method: how experts work on their rows.
      grouped_matmul: backends of Method.GROUPED.
    """

    transport: Transport = Transport.RAGGED
    wire: Wire = Wire.COMPUTE
    buffer_factor: float = 0.0
    method: Method = Method.AUTO
    grouped_matmul: GroupedMatmul = dataclasses.field(default_factory=GroupedMatmul)

    @property
    def dropless(self) -> bool:
        """Yes."""
        return True

    def validate(self, router: Router) -> None:
        """Raises UserError for an impossible factor, or a router that fills slots itself."""
        if not router.tokens_choose:
            raise UserError(
                f"moe.dispatch is Dropless, but with moe.router={type(router).__name__} experts have "
                "slots; use moe.dispatch = Gather()."
            )
        if self.buffer_factor != 0 and not 1 <= self.buffer_factor < math.inf:
            raise UserError(
                f"moe.dispatch.buffer_factor is {self.buffer_factor}; it must be at least 1, or 0 for "
                "buffers that hold all that can come."
            )
        if self.method == Method.SPILL and self.grouped_matmul != GroupedMatmul():
            raise UserError(
                "moe.dispatch.method is spill, which makes no grouped products; leave "
                "moe.dispatch.grouped_matmul as it is, or use method=grouped."
            )
        self.grouped_matmul.validate()

    def apply(
        self,
        x: Float[Array, "G S d"],
        assignment: Assignment,
        token_index: Int[Array, "G S"],
        experts: Experts,
        axis: str,
    ) -> tuple[Float[Array, "G S d"], dict[str, Mean]]:
        """See `moe_jax.dispatch.interface.Dispatch`: [G, S, d] to [G, S, d]."""
        assert isinstance(assignment, TokenAssignment)
        served = assignment.position_in_expert < assignment.capacity
        chosen = jnp.where(served, assignment.experts, experts.num_experts)
        tokens = Tokens(x, chosen, assignment.gates, token_index)
        tokens = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tokens)
        if jax.lax.axis_size(axis) == 1:
            y, done = self._on_experts(tokens, experts, tokens.assignments)
        else:
            send = {
                Transport.RING: self._by_ring,
                Transport.ALL_TO_ALL: self._by_all_to_all,
                Transport.RAGGED: self._by_ragged,
            }[self.transport]
            y, done = send(tokens, experts, axis)
        # Lost assignments are missing where they should have been worked on, so this is negative on
        # devices that get more than they send; the sum over devices is what is reported.
        wanted = served.sum().astype(jnp.float32)
        return y.reshape(x.shape), {"overflow": Mean(wanted - done, wanted)}

    def _by_ring(
        self, tokens: "Tokens", experts: Experts, axis: str
    ) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("dispatch"):
            everyones = Tokens(
                gather_tokens(tokens.x, axis, self.wire),
                *(gather_tokens(a, axis) for a in (tokens.chosen, tokens.gates, tokens.index)),
            )
        y, done = self._on_experts(everyones, experts, tokens.assignments)
        with jax.named_scope("combine"):
            return sum_to_owners(y, axis, self.wire), done

    def _by_all_to_all(
        self, tokens: "Tokens", experts: Experts, axis: str
    ) -> tuple[jax.Array, jax.Array]:
        devices = jax.lax.axis_size(axis)
        with jax.named_scope("dispatch"):
            order, sizes = sort_by_owner(tokens.owners(experts.num_local, devices), devices)
        room = self._room(tokens.most_copies(devices) / devices, most=tokens.count)
        copies = rows_of_owners(order, jnp.cumsum(sizes) - sizes, sizes, room)

        def exchange(rows: jax.Array) -> jax.Array:
            rows = rows.reshape(devices * room, *rows.shape[2:])
            return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)

        foreign = tokens.sent(copies, exchange, self.wire)
        y, done = self._on_experts(foreign, experts, tokens.assignments)
        with jax.named_scope("combine"):
            back = exchange(self.wire.pack(y).reshape(devices, room, -1)).astype(y.dtype)
        return tokens.summed(back, copies.reshape(-1)), done

    def _by_ragged(
        self, tokens: "Tokens", experts: Experts, axis: str
    ) -> tuple[jax.Array, jax.Array]:
        devices = jax.lax.axis_size(axis)
        if platform_in_force() == "cpu":
            _log_gathering_once()
        with jax.named_scope("dispatch"):
            order, sizes = sort_by_owner(tokens.owners(experts.num_local, devices), devices)
        most_copies = tokens.most_copies(devices)
        copies = order[:most_copies]
        room = self._room(most_copies, most=devices * tokens.count)
        there, back = ragged.plan(sizes, axis, room)

        def exchange(rows: jax.Array) -> jax.Array:
            return ragged.exchange(rows, room, (there, back), axis)

        foreign = tokens.sent(copies, exchange, self.wire)
        y, done = self._on_experts(foreign, experts, tokens.assignments)
        with jax.named_scope("combine"):
            rows = ragged.exchange(self.wire.pack(y), most_copies, (back, there), axis)
        return tokens.summed(rows.astype(y.dtype), copies), done

    def _room(self, balanced: float, most: int) -> int:
        """Rows of a buffer, of which `balanced` are used at balance and never more than `most`."""
        if self.buffer_factor == 0:
            return most
        # Rounded first, so that 1.1 * 10 = 11.000000000000002 does not round up to 12.
        return min(most, math.ceil(round(self.buffer_factor * balanced, 6)))

    def _on_experts(
        self, tokens: "Tokens", experts: Experts, balanced: int
    ) -> tuple[jax.Array, jax.Array]:
        """Those choices of any tokens that are experts of this device.

        Args:
          tokens: this device's or others'.
          experts: of this device.
          balanced: rows that this device has at balance.

        Returns:
          [T, d] gated sums over them; [] float32, how many there were room for.
        """
        local = tokens.chosen - experts.first
        local = jnp.where((local >= 0) & (local < experts.num_local), local, experts.num_local)
        with jax.named_scope("dispatch"):
            order, sizes = sort_by_owner(local, experts.num_local)
        room = self._room(balanced, most=tokens.count * min(tokens.choices, experts.num_local))
        starts = jnp.cumsum(sizes) - sizes
        sizes = jnp.clip(room - starts, 0, sizes)
        spills = self._spills
        _log_once(Method.SPILL if spills else Method.GROUPED, platform_in_force())
        if spills:
            rows = _rows_with_spill(tokens, experts, order, starts, sizes, room, balanced)
            gates, _ = varying_alike(tokens.gates, tokens.x)
            y = spill.gated_sums(experts.network, experts.parameters, tokens.x, gates, rows)
        else:
            sorted_rows = rows_one_after_another(order, starts, sizes, room)
            outputs = experts.on_groups(
                tokens.rows(sorted_rows), tokens.rows_index(sorted_rows), sizes, self.grouped_matmul
            )
            y = tokens.gated_sum(outputs, sorted_rows)
        return y.astype(tokens.x.dtype), sizes.sum().astype(jnp.float32)

    @property
    def _spills(self) -> bool:
        if self.method == Method.AUTO:
            return platform_in_force() == "cpu" and self.grouped_matmul == GroupedMatmul()
        return self.method == Method.SPILL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens and what they chose.

    Attributes:
      x: [T, d].
      chosen: [T, K] int32 global numbers of experts; out of range for no choice.
      gates: [T, K] float32.
      index: [T] int32 index in the global batch.
    """

    x: jax.Array
    chosen: jax.Array
    gates: jax.Array
    index: jax.Array

    @property
    def count(self) -> int:
        """T."""
        return self.chosen.shape[0]

    @property
    def choices(self) -> int:
        """K."""
        return self.chosen.shape[1]

    @property
    def assignments(self) -> int:
        """N."""
        return self.count * self.choices

    def most_copies(self, devices: int) -> int:
        """How many rows go to all devices together at most."""
        return self.count * min(self.choices, devices)

    def owners(self, experts_here: int, devices: int) -> Int[Array, "T K"]:
        """[T, K] int32 device that a choice sends the token to; X where an earlier choice does."""
        owner = jnp.minimum(self.chosen // experts_here, devices)
        same = owner[:, :, None] == owner[:, None, :]
        repeated = jnp.tril(same, k=-1).any(axis=2)
        return jnp.where(repeated, devices, owner)

    @jax.named_scope("dispatch")
    def rows(self, assignments: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """[..., d] the tokens of [...] assignments; 0 for none."""
        return self.x.at[assignments // self.choices].get(mode="fill", fill_value=0)

    def rows_index(self, assignments: Int[Array, "*rows"]) -> Int[Array, "*rows"]:
        """[...] indices in the global batch of the tokens of [...] assignments."""
        return self.index.at[assignments // self.choices].get(mode="fill", fill_value=0)

    @jax.named_scope("combine")
    def summed(
        self, rows: Float[Array, "R d"], assignments: Int[Array, " R"]
    ) -> Float[Array, "T d"]:
        """[T, d] sums, in float32 on the way, of rows [R, d] over the tokens of [R] assignments."""
        sums = jnp.zeros_like(self.x, dtype=jnp.float32)
        token = assignments // self.choices
        return sums.at[token].add(rows.astype(jnp.float32), mode="drop").astype(rows.dtype)

    @jax.named_scope("combine")
    def gated_sum(
        self, rows: Float[Array, "*rows d"], assignments: Int[Array, "*rows"]
    ) -> Float[Array, "T d"]:
        """[T, d] float32 as `summed`, of rows [..., d] times their gates."""
        gates = self.gates.reshape(-1).at[assignments].get(mode="fill", fill_value=0)
        weighted = rows.astype(jnp.float32) * gates[..., None]
        return self.summed(weighted.reshape(-1, rows.shape[-1]), assignments.reshape(-1))

    @jax.named_scope("dispatch")
    def sent(
        self, copies: Int[Array, "*rows"], exchange: Callable[[jax.Array], jax.Array], wire: Wire
    ) -> "Tokens":
        """The tokens that other devices send here while this one sends those of `copies`."""
        token = copies // self.choices
        gates = self.gates.at[token].get(mode="fill", fill_value=0)
        # From 1, because a row that nobody sends is 0. One exchange for all integers.
        integers = jnp.concatenate([self.chosen + 1, self.index[:, None]], axis=1)
        integers = exchange(integers.at[token].get(mode="fill", fill_value=0))
        x = exchange(wire.pack(self.rows(copies))).astype(self.x.dtype)
        return Tokens(x, integers[:, :-1] - 1, exchange(gates), integers[:, -1])


def sort_by_owner(
    owners: Int[Array, "T K"], count: int
) -> tuple[Int[Array, " T*K"], Int[Array, " {count}"]]:
    """Assignments in the order of what owns them, left to right within each.

    Args:
      owners: [T, K] int32 in [0, count], where `count` is nobody.
      count: number of owners (experts or devices).

    Returns:
      [N] int32 assignments, nobody's at the end; [count] int32 how many each owner has.
    """
    flat = owners.reshape(-1)
    sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)
    number = jnp.arange(flat.size, dtype=jnp.int32)
    if (count + 1) * flat.size < 2**31:
        # On CPUs, sorting one array of keys takes a quarter of the time of a stable argsort.
        order = jnp.sort(flat * flat.size + number) % max(flat.size, 1)
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return order, sizes


def rows_of_owners(
    order: Int[Array, " N"], starts: Int[Array, " owners"], sizes: Int[Array, " owners"], room: int
) -> Int[Array, "owners {room}"]:
    """[owners, room] each owner's assignments; N for none.

    Args:
      order: [N] of `sort_by_owner`.
      starts: [owners] where in `order` each owner's assignments start.
      sizes: [owners] how many are taken.
      room: for each owner.
    """
    place = jnp.arange(room)
    rows = order.at[starts[:, None] + place].get(mode="fill", fill_value=0)
    return jnp.where(place < sizes[:, None], rows, order.size)


def rows_one_after_another(
    order: Int[Array, " N"], starts: Int[Array, " owners"], sizes: Int[Array, " owners"], room: int
) -> Int[Array, " {room}"]:
    """[room] the same, without gaps between owners."""
    place = jnp.arange(room)
    owner = row_experts(sizes, room)
    ends = jnp.cumsum(sizes)
    rows = order.at[starts[owner] + place - (ends - sizes)[owner]].get(mode="fill", fill_value=0)
    return jnp.where(place < ends[-1], rows, order.size)


def _rows_with_spill(
    tokens: Tokens,
    experts: Experts,
    order: jax.Array,
    starts: jax.Array,
    sizes: jax.Array,
    room: int,
    balanced: int,
) -> spill.Rows:
    """How Method.SPILL divides this device's rows between slots and loop."""
    mean = balanced / experts.num_local
    # One standard deviation above the mean load of random routing: more slots cost more than the
    # loop over what they would have held.
    slots = min(room, math.ceil((mean + math.sqrt(mean)) / 8) * 8)
    spill_room = math.ceil(room / 8)
    spilled = jnp.maximum(sizes - slots, 0).sum()
    cheaper = experts.num_local * slots + LOOP_COST * spilled < LOOP_COST * sizes.sum()
    use_slots = cheaper & (spilled <= spill_room)
    in_slots = jnp.where(use_slots, jnp.minimum(sizes, slots), 0)
    looped_sizes = sizes - in_slots
    slotted = rows_of_owners(order, starts, in_slots, slots)
    looped = rows_one_after_another(order, starts + in_slots, looped_sizes, room)
    return spill.Rows(
        use_slots,
        slotted,
        looped,
        looped_sizes,
        experts.keys(tokens.rows_index(slotted), jnp.arange(experts.num_local)[:, None]),
        experts.keys(tokens.rows_index(looped), row_experts(looped_sizes, room)),
        spill_room,
    )


@functools.cache
def _log_once(method: Method, platform: str) -> None:
    _LOG.info("dropless dispatch on %s: method %s", platform, method)


@functools.cache
def _log_gathering_once() -> None:
    _LOG.info(
        "dropless dispatch: CPUs have no ragged_all_to_all, so every device gathers the rows of all; "
        "transport=ring sends fewer"
    )
