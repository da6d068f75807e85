"""The Mixture-of-Experts layer: route, dispatch, experts, combine, in one shard_map.

`MoE` can be used in any NNX model, and through `nnx.bridge.ToLinen` in a Linen one; see examples/.

Axis letters
  B batch, L length    T = B * L tokens    G groups, S = T / G tokens per group
  K choices per token  E experts           C slots per expert and group
  d width              f expert width      R rows an expert works on
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.component import Component, field
from moe_jax.dispatch.gather import Gather
from moe_jax.dispatch.interface import Dispatch, Experts
from moe_jax.dispatch.varying import varying_alike
from moe_jax.errors import UserError
from moe_jax.layers.expert_form import ExpertForm
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.layers.initializers import Scale
from moe_jax.layers.mode import Mode
from moe_jax.layers.residual_experts import ResidualForm
from moe_jax.layers.shared_experts import BranchMix, SharedExperts
from moe_jax.parallel.mesh import (
    DATA,
    EXPERT,
    FSDP_MIN_SIZE,
    MODEL,
    TOKEN_AXES,
    mesh_in_force,
    mesh_of_arrays,
)
from moe_jax.parallel.sharding import axis_size, parameter_spec, partition_spec
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.router import Mean, Router, RouterFactors, RouterInputs, Routing
from moe_jax.routing.statistics import load_evenness
from moe_jax.routing.token_choice import TopK


@dataclasses.dataclass
class MoEConfig(Component):
    """How tokens are routed; how many experts there are is the model's business.

    Attributes:
      router: any `moe_jax.routing.router.Router`; swap it by a Python line in a config.
      capacity: slots per expert; left as it is where the dispatch is dropless.
      group_size: S, tokens that compete for the same slots in training and evaluation. Groups are
        consecutive tokens of the batch, so the result does not depend on the mesh. 0: a group is
        `group_rows` rows of the batch, whatever their length.
      dispatch: how tokens reach their experts: any `moe_jax.dispatch.interface.Dispatch`.
      experts: what an expert is: the form of its feed-forward network, which is the shared experts'
        too, or any module, see `moe_jax.layers.expert_form.ModuleForm`.
      expert_layers: residual feed-forward networks in each expert, one after the other (BASE: 10);
        1 for one network without a residual.
      expert_dropout: dropout rate inside the experts (Switch section 2.4: 0.4 in fine-tuning).
      shared_experts: experts that every token visits beside the routed ones, as one dense branch of
        that many times the expert width (DeepSeekMoE; 1 is DeepSpeed's residual MoE).
      shared_mix: how the branch and the routed experts are added.
      group_rows: rows of a group where `group_size` is 0: by default each sequence is a group.
    """

    router: Router = dataclasses.field(default_factory=TopK)
    capacity: Capacity = dataclasses.field(default_factory=Capacity)
    group_size: int = 0
    dispatch: Dispatch = dataclasses.field(default_factory=Gather)
    experts: ExpertForm = dataclasses.field(default_factory=FeedForwardForm)
    expert_layers: int = field(1, at_least=1)
    expert_dropout: float = field(0.0, at_least=0, below=1)
    shared_experts: int = field(0, at_least=0)
    shared_mix: BranchMix = BranchMix.SUM
    group_rows: int = field(1, at_least=1)

    def validate(self, num_experts: int, path: str = "moe") -> None:
        """Raises UserError where the layer could not be built with E experts; `path` is its own."""
        try:
            self._validate(num_experts)
        except UserError as error:
            # Routers, capacity and dispatch know their own names only.
            told = re.sub(r"^moe\.|^(?=(router|capacity|dispatch)\.)", f"{path}.", str(error))
            raise UserError(told) from error

    def _validate(self, num_experts: int) -> None:
        self.check_ranges("moe")
        self.router.validate(num_experts)
        self.capacity.validate()
        self.dispatch.validate(self.router)
        if self.dispatch.dropless and self.capacity != Capacity():
            raise UserError(
                f"moe.capacity is {self.capacity}, but moe.dispatch is "
                f"{type(self.dispatch).__name__}, which serves every choice; leave moe.capacity as "
                "it is, or use moe.dispatch = Gather()."
            )
        if self.group_size < 0:
            raise UserError(
                f"moe.group_size is {self.group_size}; it must be at least 1 token, or 0 for groups of "
                "moe.group_rows rows."
            )
        if self.group_size and self.group_rows > 1:
            raise UserError(
                f"moe.group_size is {self.group_size} tokens and moe.group_rows is {self.group_rows}, "
                "which both say how large a group is; leave one of them out."
            )
        if self.group_size:
            for train in (True, False):
                self.expert_capacity(num_experts, train)
        self._validate_experts()
        if self.shared_mix != BranchMix.SUM and not self.shared_experts:
            raise UserError(
                f"moe.shared_mix is {self.shared_mix}, but moe.shared_experts is 0; set it to 1."
            )

    def _validate_experts(self) -> None:
        name = type(self.experts).__name__
        if not isinstance(self.experts, FeedForwardForm):
            for field_name, default in (
                ("expert_layers", 1),
                ("expert_dropout", 0),
                ("shared_experts", 0),
            ):
                if getattr(self, field_name) != default:
                    raise UserError(
                        f"moe.{field_name} is {getattr(self, field_name)}, but moe.experts is {name}, "
                        f"and only FeedForwardForm has it; leave it at {default}."
                    )
        if self.dispatch.dropless and self.experts.needs_slots:
            raise UserError(
                f"moe.experts is {name}, which works on slots only, but moe.dispatch is "
                f"{type(self.dispatch).__name__}; use moe.dispatch = Gather()."
            )

    @property
    def expert_form(self) -> ExpertForm:
        """`experts`, or a stack of them where `expert_layers` says so."""
        if self.expert_layers == 1 or not isinstance(self.experts, FeedForwardForm):
            return self.experts
        return ResidualForm(self.experts, self.expert_layers)

    def for_rows(self, length: int) -> "MoEConfig":
        """The same for rows of so many tokens, with `group_size` said in tokens."""
        if self.group_size:
            return self
        return dataclasses.replace(self, group_size=self.group_rows * length, group_rows=1)

    def expert_capacity(self, num_experts: int, train: bool) -> int:
        """C, slots per expert and group; S, which nothing can exceed, where no choice is dropped.

        Raises:
          UserError: the capacity policy gives none, or groups are rows of unknown length, see
            `for_rows`.
        """
        if not self.group_size:
            raise UserError(
                "moe.group_size is 0, so that a group's tokens depend on the length of rows; set it."
            )
        policy = Capacity(rule=CapacityRule.NO_DROPS) if self.dispatch.dropless else self.capacity
        return self.router.expert_capacity(policy, self.group_size, num_experts, train)

    def expert_rows(self, num_experts: int) -> float:
        """Rows that all experts together work on in training, for each token of a group."""
        if self.dispatch.dropless:
            return self.router.choices
        return num_experts * self.expert_capacity(num_experts, train=True) / self.group_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What routers may know of each token beside its vector, all [B, L].

    Attributes:
      mask: bool, False for padding.
      token_ids: int32 vocabulary ids.
      positions: int32 positions in the sequence.
      sequence_ids: int32 ids of the sequence.
    """

    mask: jax.Array
    token_ids: jax.Array
    positions: jax.Array
    sequence_ids: jax.Array

    @classmethod
    def of(
        cls, token_ids: Int[Array, "B L"], rows_mask: Bool[Array, " B"] | None = None
    ) -> "TokenInfo":
        """For batches whose rows are one sequence each, all real tokens or all padding.

        Args:
          token_ids: [B, L] int32.
          rows_mask: False for rows of padding; None for none.
        """
        shape = token_ids.shape
        mask = jnp.ones(shape[:1], bool) if rows_mask is None else rows_mask
        return cls(
            jnp.broadcast_to(mask[:, None], shape),
            token_ids,
            jax.lax.broadcasted_iota(jnp.int32, shape, 1),
            jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        )


class RouterState(nnx.Variable):
    """Arrays of a router that no gradient trains, such as DeepSeek-V3's expert bias."""


class LossShare(nnx.Variable):
    """What part of a whole batch's router loss the tokens of one microbatch are, [] float32."""


class Factor(nnx.Variable):
    """An array [] float32 that stands in for a number of the router's config."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoESums:
    """What a report's means are the quotients of, so that reports of several passes can be joined.

    Attributes:
      losses, statistics: name -> (sum, count); all empty where the module does not report sums.
      loss_counts: name -> [] float32, the counts of `losses` once more. They come by an all-reduce of
        their own, so that who needs nothing else computes nothing else (counts follow from masks).
    """

    losses: dict[str, Mean] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Mean] = dataclasses.field(default_factory=dict)
    loss_counts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEReport:
    """Losses and statistics of one layer, reduced over all tokens of the global batch.

    Attributes:
      losses: name -> [] float32, before coefficients.
      statistics: name -> [] or [E] float32.
      auxiliary_loss: [] float32, the losses times the router's coefficients, added up; outside the
        layer's shard_map only.
      routing: of every group, with a leading axis G; in Mode.OBSERVE only.
      sums: where the module `reports_sums`.
      path: `MoE.path` of the module that reports.
    """

    losses: dict[str, jax.Array]
    statistics: dict[str, jax.Array]
    auxiliary_loss: jax.Array = None  # type: ignore[assignment]
    routing: Routing | None = None
    sums: MoESums = dataclasses.field(default_factory=MoESums)
    path: str = dataclasses.field(default="", metadata={"static": True})


class MoE(nnx.Module):
    """E feed-forward networks of which each token visits K.

    Attributes:
      router: the router's parameters, float32, whole on every device.
      router_state: the router's arrays that no gradient trains; renewed by calls in Mode.TRAIN.
      loss_shares: name of a router loss -> its factor in `MoEReport.auxiliary_loss`; empty for 1.
      coefficients, router_fields: name -> what stands in for a number of the router, see
        `take_factors`; empty where the config's numbers are meant.
      reports_sums: whether reports have `sums`. This and `loss_shares` are set while a batch is
        computed in microbatches, see `moe_jax.training.microbatches`.
      path: where the module is in its model, such as "stack/stages/0/blocks/1/mlp", by which its
        reports are known; `AbstractModel` fills it in.
      w_in, w_gate: [E, d, f] float32; w_gate only where the experts are gated.
      w_out: [E, f, d] float32.
      b_in, b_gate, b_hidden: [E, f] float32, where the experts' form has them.
      b_out: [E, d] float32. All have another dimension after E where experts have several layers, and
        experts of another `ExpertForm` have that form's arrays in their place.
      shared: the dense branch beside them, if there is one.
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        mlp_width: int,
        num_experts: int,
        scale: Scale = 1.0,
        key: Key[Array, ""] | None = None,
    ) -> None:
        """Draws the parameters, laid out over the mesh where one is set (`jax.set_mesh`).

        Args:
          config: the routing.
          width: d.
          mlp_width: f.
          num_experts: E.
          scale: s of the truncated normal with variance s / fan_in (Switch: 0.1), or its deviation.
          key: PRNG key, which must be given.

        Raises:
          UserError: the fields of `config` do not fit together, or the mesh does not divide a
            dimension.
        """
        if key is None:
            raise UserError("key is None; give the layer a PRNG key, such as jax.random.key(0).")
        config.validate(num_experts)
        self.config = nnx.static(config)
        self.num_experts, self.mlp_width = num_experts, mlp_width
        axes = config.expert_form.axes()
        draw: Callable[..., Any] = functools.partial(
            _initial_arrays, config, width, mlp_width, num_experts, scale
        )
        mesh = mesh_of_arrays(key)
        if mesh is not None:
            # Drawn where they belong: no device ever holds all experts.
            draw = jax.jit(draw, out_shardings=_shardings(jax.eval_shape(draw, key), axes, mesh))
        router, state, experts = draw(key)
        self.router = nnx.data({name: _router_array(nnx.Param, a) for name, a in router.items()})
        self.router_state = nnx.data(
            {name: _router_array(RouterState, a) for name, a in state.items()}
        )
        for name, value in experts.items():
            setattr(self, name, nnx.Param(value, axes=axes[name]))
        self.loss_shares = nnx.data(dict[str, LossShare]())
        self.coefficients = nnx.data(dict[str, Factor]())
        self.router_fields = nnx.data(dict[str, Factor]())
        self.reports_sums = False
        self.path = ""
        self.shared = _shared_experts(config, width, mlp_width, scale, jax.random.fold_in(key, 3))

    def __call__(
        self,
        x: Float[Array, "B L d"],
        info: TokenInfo | None = None,
        mode: Mode = Mode.EVALUATE,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B L d"], MoEReport]:
        """Applies the layer, inside `jax.jit` or outside, where it is compiled on its own.

        It runs on the mesh of `jax.set_mesh`, or else on one device. A layer that was built before
        the mesh was set is laid out over it by the first call outside `jax.jit`.

        Args:
          x: [B, L, d] in the compute dtype.
          info: of each token; by default each row is one sequence of real tokens without ids.
          mode: decides noise, capacity and what the report holds: Mode.TRAIN or, by default,
            Mode.EVALUATE.
          key: PRNG key of this layer and step; None where nothing is random.

        Returns:
          [B, L, d] (0 for tokens without a slot: the residual carries them), and the report.

        Raises:
          UserError: the tokens cannot be cut into groups, or the groups into the mesh's shards; or
            the router reads token ids and `info` is None.
        """
        router = self.config.router
        if info is None:
            if router.reads_token_ids:
                raise UserError(
                    f"info is None, but {type(router).__name__} routes by token ids; give "
                    "info=TokenInfo.of(token_ids)."
                )
            info = TokenInfo.of(jnp.zeros(x.shape[:2], jnp.int32))
        if mode == Mode.DECODE and not router.tokens_choose:
            raise UserError(
                f"model.moe.router is {type(router).__name__}, which routes whole groups and cannot "
                "decode token by token; use a token-choice router to generate."
            )
        mesh = mesh_in_force()
        owners = axis_size(mesh, EXPERT)
        if self.num_experts % owners:
            raise UserError(
                f"the layer has {self.num_experts} experts, which the {owners} devices of mesh axis "
                "expert do not divide; change one of them."
            )
        config = self.config.for_rows(x.shape[1])
        tokens = x.shape[0] * x.shape[1]
        # A decoded row is its own group: nothing is dropped, so groups change nothing but memory.
        group_size = x.shape[1] if mode == Mode.DECODE else config.group_size
        groups = number_of_groups(tokens, group_size, axis_size(mesh, TOKEN_AXES))
        capacity = group_size
        if mode != Mode.DECODE:
            capacity = config.expert_capacity(self.num_experts, mode == Mode.TRAIN)
        self._lay_out()
        state = {name: value[...] for name, value in self.router_state.items()}
        y, report = _moe(
            x,
            info,
            {name: value[...] for name, value in self.router.items()} | state,
            {name: array[...] for name, array in self.experts.items()},
            {name: factor[...] for name, factor in self.router_fields.items()},
            jax.random.key(0) if key is None else key,
            mesh=mesh,
            config=config,
            num_experts=self.num_experts,
            mlp_width=self.mlp_width,
            groups=groups,
            capacity=capacity,
            mode=mode,
            with_sums=self.reports_sums,
        )
        weights: dict[str, Any] = self.config.router.loss_coefficients
        weights = weights | {name: factor[...] for name, factor in self.coefficients.items()}
        weighted = [weights[name] * loss for name, loss in report.losses.items()]
        if self.loss_shares:
            shares = [self.loss_shares[name][...] for name in report.losses]
            weighted = [share * loss for share, loss in zip(shares, weighted, strict=True)]
        auxiliary = sum(weighted, start=jnp.zeros(()))
        report = dataclasses.replace(report, auxiliary_loss=auxiliary, path=self.path)
        if mode == Mode.TRAIN:
            for name, value in self.config.router.next_state(state, report.statistics).items():
                self.router_state[name][...] = jax.lax.stop_gradient(value)
        if self.shared is not None:
            shared_key = None if key is None or mode != Mode.TRAIN else jax.random.fold_in(key, 3)
            with jax.named_scope("shared_experts"):
                y = self.shared(x, y, shared_key)
        return y, report

    @property
    def experts(self) -> dict[str, nnx.Param]:
        """The experts' parameters by the names of their form."""
        return {name: getattr(self, name) for name in self.config.expert_form.axes()}

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The dimensions of the parameters over the layers of which the module is the stack; often one."""
        weights = next(iter(self.experts.values()))
        return weights.shape[: weights.ndim - len(weights.get_metadata()["axes"])]

    def take_factors(self, factors: RouterFactors) -> None:
        """Lets [] float32 arrays stand in for the numbers of the router's config.

        The step is compiled with them as its arguments, so that configs which differ only in these
        numbers share the program.
        """

        def stacked(arrays: dict[str, jax.Array]) -> dict[str, Factor]:
            shape = self.stacked_shape
            return {n: Factor(jnp.broadcast_to(a, shape), axes=()) for n, a in arrays.items()}

        self.coefficients = nnx.data(stacked(factors.coefficients))
        self.router_fields = nnx.data(stacked(factors.fields))

    def _lay_out(self) -> None:
        """Puts the parameters where the mesh in force wants them, if they are elsewhere."""
        for path, variable in nnx.to_flat_state(nnx.state(self)):
            mesh = mesh_of_arrays(variable[...])
            if mesh is not None:
                name, axes = "/".join(map(str, path)), variable.get_metadata()["axes"]
                spec = parameter_spec(name, variable.shape, axes, mesh, FSDP_MIN_SIZE)
                variable[...] = jax.device_put(variable[...], NamedSharding(mesh, spec))


def _initial_arrays(
    config: MoEConfig,
    width: int,
    mlp_width: int,
    num_experts: int,
    scale: Scale,
    key: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """Arrays by name: the router's parameters, its state, and the experts'."""
    router_key, _, _ = jax.random.split(key, 3)
    experts = config.expert_form.draw((num_experts,), width, mlp_width, scale, key)
    router = config.router.init(router_key, width, num_experts)
    return router, config.router.init_state(num_experts), experts


def _shared_experts(
    config: MoEConfig, width: int, mlp_width: int, scale: Scale, key: jax.Array
) -> SharedExperts | None:
    form, number = config.experts, config.shared_experts
    if not number or not isinstance(form, FeedForwardForm):
        return None
    mix, rate = config.shared_mix, config.expert_dropout
    return SharedExperts(width, number * mlp_width, form, mix, rate, scale, key)


def _router_array(kind: type[nnx.Variable], value: jax.Array) -> nnx.Variable:
    return kind(value, axes=("router",) * value.ndim)


def _shardings(shapes: Any, axes: dict[str, tuple[str, ...]], mesh: Mesh) -> Any:
    """Where `_initial_arrays` belong: experts split by their names, the router whole."""
    router, state, experts = shapes
    whole = NamedSharding(mesh, PartitionSpec())
    split = {
        name: NamedSharding(
            mesh, parameter_spec(name, shape.shape, axes[name], mesh, FSDP_MIN_SIZE)
        )
        for name, shape in experts.items()
    }
    return jax.tree.map(lambda _: whole, router), jax.tree.map(lambda _: whole, state), split


@functools.partial(
    jax.jit,
    static_argnames=(
        "mesh",
        "config",
        "num_experts",
        "mlp_width",
        "groups",
        "capacity",
        "mode",
        "with_sums",
    ),
)
def _moe(
    x: jax.Array,
    info: TokenInfo,
    router: dict[str, jax.Array],
    parameters: dict[str, jax.Array],
    router_fields: dict[str, jax.Array],
    key: jax.Array,
    *,
    mesh: Any,
    config: MoEConfig,
    num_experts: int,
    mlp_width: int,
    groups: int,
    capacity: int,
    mode: Mode,
    with_sums: bool,
) -> tuple[jax.Array, MoEReport]:
    """The routed experts on [B, L, d]; see `_moe_of_shard`.

    Compiled, because outside jit a shard_map runs operation by operation, which takes seconds;
    inside another jit it is part of that program.
    """
    grouped = jax.tree.map(lambda a: a.reshape(groups, -1, *a.shape[2:]), (x, info))
    index = jnp.arange(x.shape[0] * x.shape[1], dtype=jnp.int32).reshape(groups, -1)
    layer = _moe_shard_map(mesh, config, num_experts, mlp_width, capacity, mode, with_sums)
    y, report = layer(*grouped, index, router, parameters, router_fields, key)
    return y.reshape(x.shape), report


def number_of_groups(tokens: int, group_size: int, shards: int) -> int:
    """G = T / S.

    Raises:
      UserError: S does not divide T, or the mesh's token shards do not divide G.
    """
    if tokens % group_size:
        raise UserError(
            f"moe.group_size is {group_size}, which does not divide the {tokens} tokens of a batch; "
            f"{a_group_size(tokens, group_size, shards)}."
        )
    groups = tokens // group_size
    if groups % shards:
        raise UserError(
            f"the batch has {groups} groups of moe.group_size={group_size} tokens, which the "
            f"{shards} shards of mesh axes data x expert do not divide; "
            f"{a_group_size(tokens, group_size, shards)}, or take fewer devices on these axes."
        )
    return groups


def a_group_size(tokens: int, wanted: int, shards: int, row: int = 1) -> str:
    """A group size that works, in half a sentence.

    Args:
      tokens: of a batch.
      wanted: what does not work; the answer is the largest that is not larger.
      shards: of the tokens.
      row: tokens of a row; whole rows go before parts of rows.
    """
    if tokens % shards:
        return f"take a batch whose tokens {shards} divides"
    of_shard = tokens // shards
    divisors = [size for size in range(1, min(wanted, of_shard) + 1) if of_shard % size == 0]
    rows = [size for size in divisors if size % row == 0]
    size = max(rows or divisors)
    is_rows = f" ({size // row} of the batch's rows)" if rows and row > 1 else ""
    return f"{size} works{is_rows}"


def _moe_shard_map(
    mesh: Any,
    config: MoEConfig,
    num_experts: int,
    mlp_width: int,
    capacity: int,
    mode: Mode,
    with_sums: bool,
) -> Any:
    """The layer over global arrays: splits them by the mesh, Manual inside."""
    tokens, whole = PartitionSpec(TOKEN_AXES), PartitionSpec()
    experts = {name: partition_spec(axes) for name, axes in config.expert_form.axes().items()}
    return jax.shard_map(
        functools.partial(
            _moe_of_shard,
            config=config,
            num_experts=num_experts,
            mlp_width=mlp_width,
            capacity=capacity,
            mode=mode,
            with_sums=with_sums,
        ),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, whole, experts, whole, whole),
        out_specs=(
            tokens,
            MoEReport(whole, whole, routing=tokens, sums=whole),  # type: ignore[arg-type]
        ),
    )


def _moe_of_shard(
    x: jax.Array,
    info: TokenInfo,
    token_index: jax.Array,
    router: dict[str, jax.Array],
    parameters: dict[str, jax.Array],
    router_fields: dict[str, jax.Array],
    key: jax.Array,
    *,
    config: MoEConfig,
    num_experts: int,
    mlp_width: int,
    capacity: int,
    mode: Mode,
    with_sums: bool,
) -> tuple[jax.Array, MoEReport]:
    """One device's share of the layer.

    Args:
      x: [G, S, d] this device's groups (G is local here), the same on all devices of `model`.
      info: [G, S] each.
      token_index: [G, S] index in the global batch.
      router: the router's parameters, whole.
      parameters: of this device's experts, split as the axes of their form say.
      router_fields: what stands in for numbers of the router's config.
      key: of this layer and step.
      config, num_experts, mlp_width, capacity, mode, with_sums: static.
    """
    router_key, shared_key, dropout_key = jax.random.split(key, 3)
    train = mode == Mode.TRAIN
    bound = dataclasses.replace(config.router, **router_fields)

    def route(x: jax.Array, info: TokenInfo, index: jax.Array) -> Routing:
        group_key = jax.random.fold_in(router_key, index)
        inputs = RouterInputs(
            x,
            info.mask,
            info.token_ids,
            info.positions,
            info.sequence_ids,
            group_key,
            shared_key,
            train,
        )
        return bound.route(router, inputs, num_experts, capacity)

    with jax.named_scope("router"):
        # The group's first token stands for its global index.
        routing = jax.vmap(route)(x, info, token_index[:, 0])

    with jax.named_scope("experts"):
        # FSDP: gathered here and not by the caller, so that the backward pass is a reduce-scatter.
        weights = {
            name: _gather_over_data(parameters[name], axes).astype(x.dtype)
            for name, axes in config.expert_form.axes().items()
        }
        # Biases are not split over all the axes that matrices are.
        weights = dict(zip(weights, varying_alike(*weights.values()), strict=True))

    dropout = train and config.expert_dropout > 0

    @jnp.vectorize
    def row_key(token: jax.Array, expert: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(dropout_key, expert), token)

    experts = Experts(
        num_experts,
        first=jax.lax.axis_index(EXPERT) * (num_experts // jax.lax.axis_size(EXPERT)),
        parameters=weights,
        network=config.expert_form.network(x.shape[-1], mlp_width, config.expert_dropout),
        row_key=row_key if dropout else None,
    )
    # Each device of `model` computes with its slice of f; from here on their values differ. Said
    # on x and not on the buffers, so that the backward pass sums [T, d] over `model`, not [E*C, d].
    varying = jax.lax.pcast(x, MODEL, to="varying")
    y, dispatch_statistics = config.dispatch.apply(
        varying, routing.assignment, token_index, experts, EXPERT
    )
    y = jax.lax.psum(y, MODEL)
    with jax.named_scope("statistics"):
        report = _reduced_report(routing, dispatch_statistics, with_sums)
    if mode == Mode.OBSERVE:
        report = dataclasses.replace(report, routing=routing)
    return y, report


def _gather_over_data(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    # An all-gather among one device would still copy all weights, on CPUs four times over.
    if jax.lax.axis_size(DATA) == 1 or "expert_embed" not in axes:
        return value
    return jax.lax.all_gather(value, DATA, axis=axes.index("expert_embed"), tiled=True)


def _reduced_report(
    routing: Routing, dispatch_statistics: dict[str, Mean], with_sums: bool
) -> MoEReport:
    """Sums the groups' (sum, count) pairs over the whole mesh: one all-reduce of a few floats.

    Args:
      routing: of this device's groups.
      dispatch_statistics: the dispatch's statistics of this device.
      with_sums: see `MoESums`.
    """
    losses, statistics = jax.tree.map(lambda a: a.sum(axis=0), (routing.losses, routing.statistics))
    local = (losses, statistics | dispatch_statistics)
    flat, unravel = ravel_pytree(local)
    losses, statistics = unravel(jax.lax.psum(flat, TOKEN_AXES))
    sums = MoESums()
    if with_sums:
        counts = {name: mean.count for name, mean in routing.losses.items()}
        counts = {name: count.sum(axis=0) for name, count in counts.items()}
        sums = MoESums(losses, statistics, jax.lax.psum(counts, TOKEN_AXES))
    values = jax.tree.map(Mean.value, statistics, is_leaf=lambda leaf: isinstance(leaf, Mean))
    values |= load_evenness(values["load"])
    return MoEReport({name: mean.value() for name, mean in losses.items()}, values, sums=sums)
