"""Token-choice routers: every token chooses its K best experts.

Axis letters: S tokens in a group, K choices per token, E experts, C slots per expert, d width.

`TokenChoice` is what they share: serving the choices under capacity, losses and statistics. A
router of the family says in `choose` which experts a token wants and at which weights.
"""

import abc
import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.routing import losses, priority, scores, statistics
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.losses import Losses
from moe_jax.routing.priority import Priority
from moe_jax.routing.published import NO_DROPS, PublishedRouter
from moe_jax.routing.router import (
    Arrays,
    Mean,
    Router,
    RouterInputs,
    Routing,
    TokenAssignment,
    register,
)
from moe_jax.routing.scores import Exploration, RouterDtype


@register
@dataclasses.dataclass(frozen=True)
class Choice:
    """What the tokens of a group want, before capacity.

    Attributes:
      logits: [S, E] float32; the router z-loss reads them.
      experts: [S, K] int32, first choice first; E (out of range) where a token wants fewer.
      weights: [S, E] float32 gate of each expert, applied if the expert serves the token.
      probabilities: [S, E] float32, rows sum to 1; balancing losses read them. By default the softmax
        of the logits.
      clean: the same without exploration noise; the importance loss reads them. By default the
        probabilities.
      losses: further losses of this router, by name; their coefficients are in its `loss_coefficients`.
      statistics: further statistics of this router, by name; they are logged like the others.
    """

    logits: jax.Array
    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array = None  # type: ignore[assignment]
    clean: jax.Array = None  # type: ignore[assignment]
    losses: dict[str, Mean] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Mean] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.probabilities is None:
            object.__setattr__(self, "probabilities", jax.nn.softmax(self.logits))
        if self.clean is None:
            object.__setattr__(self, "clean", self.probabilities)


@dataclasses.dataclass
class TokenChoice(Router):
    """What all token-choice routers share.

    Attributes:
      k: K, experts per token.
      order: who gets a slot first; only `token` is causal for K > 1.
      no_token_left_behind: choices that found no slot try the token's next best experts, after all
        were served (Switch appendix B; second pass only).
      losses: coefficients of the auxiliary losses.
    """

    k: int = 1
    order: Priority = Priority.TOKEN
    no_token_left_behind: bool = False
    losses: Losses = dataclasses.field(default_factory=Losses)

    @abc.abstractmethod
    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """What the tokens of a group want."""

    @property
    def choices(self) -> int:
        """K."""
        return self.k

    @property
    def leak(self) -> str | None:
        """The priority order, or the second pass, where they look ahead."""
        if self.no_token_left_behind:
            return "a token's second pass comes after later tokens were served"
        return priority.leak_of(self.order, self.choices)

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficients by the names in `Routing.losses`."""
        return self.losses.coefficients

    def validate(self, num_experts: int) -> None:
        """Raises UserError unless 1 <= K <= E, and 2 K <= E for a second pass."""
        self.check_ranges("router")
        validate_k(self.k, num_experts)
        if self.no_token_left_behind and 2 * self.choices > num_experts:
            raise UserError(
                f"router.no_token_left_behind needs {self.choices} further experts for "
                f"{self.choices} choices, but there are {num_experts}; lower k or switch it off."
            )
        self.losses.validate(num_experts)

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Routes one group; logits, gates and losses are float32 whatever the compute dtype."""
        choice = self.choose(parameters, inputs, num_experts)
        gates = take_gates(choice.weights, choice.experts)
        order_key = jax.random.fold_in(inputs.key, 1)
        priority_order = priority.permutation(self.order, gates, order_key, inputs.train)
        slots = priority.position_in_expert(
            choice.experts, inputs.mask, num_experts, capacity, priority_order
        )
        assignment = TokenAssignment(choice.experts, slots, gates, capacity)
        if self.no_token_left_behind:
            assignment = second_pass(assignment, choice, inputs.mask, priority_order)
        return Routing(
            assignment,
            jax.lax.stop_gradient(choice.probabilities),
            losses=compute_losses(self.losses, choice, inputs) | choice.losses,
            statistics=statistics.with_own(
                statistics.of_token_choice(
                    assignment, choice.experts, choice.logits, choice.probabilities, inputs.mask
                ),
                choice.statistics,
            ),
        )


def validate_k(k: int, num_experts: int) -> None:
    """Raises UserError unless 1 <= K <= E."""
    if not 1 <= k <= num_experts:
        raise UserError(
            f"router.k is {k} but there are {num_experts} experts; "
            "choose k between 1 and num_experts."
        )


def validate_expert_groups(groups: int, groups_per_token: int, num_experts: int) -> None:
    """Raises UserError unless the groups divide E and a token can go to that many of them."""
    if groups < 1 or num_experts % groups:
        raise UserError(
            f"router.groups is {groups}, which does not divide the {num_experts} experts; "
            "use a divisor."
        )
    if not 1 <= groups_per_token <= groups:
        raise UserError(
            f"router.groups_per_token is {groups_per_token}; it must be between 1 and "
            f"router.groups={groups}."
        )


def take_gates(weights: Float[Array, "S E"], experts: Int[Array, "S K"]) -> Float[Array, "S K"]:
    """[S, K] float32 weights of the chosen experts; 0 where no choice was made."""
    num_experts = weights.shape[1]
    gates = jnp.take_along_axis(weights, jnp.minimum(experts, num_experts - 1), axis=1)
    return jnp.where(experts < num_experts, gates, 0.0)


def second_pass(
    assignment: TokenAssignment,
    choice: Choice,
    mask: Bool[Array, " S"],
    priority_order: Int[Array, " N"] | None,
) -> TokenAssignment:
    """Gives choices without a slot one in the token's next best expert (Switch appendix B).

    The j-th choice of a token tries the j-th most probable of the experts that the token did not
    choose, in the same priority order, among the slots that the first pass left. Its gate is that
    expert's weight beside the token's first choices, so renormalised gates no longer sum to 1.
    """
    num_experts, capacity = choice.weights.shape[1], assignment.capacity
    wanted = jax.nn.one_hot(choice.experts, num_experts).any(axis=1)
    _, next_best = jax.lax.top_k(
        jnp.where(wanted, -1.0, choice.probabilities), choice.experts.shape[1]
    )
    dropped = (assignment.position_in_expert == capacity) & (choice.experts < num_experts)
    experts = jnp.where(dropped, next_best, num_experts)
    taken = priority.filled(
        assignment.experts, assignment.position_in_expert, num_experts, capacity
    )
    slots = priority.position_in_expert(experts, mask, num_experts, capacity, priority_order, taken)
    rerouted = slots < capacity
    experts = jnp.where(rerouted, experts, assignment.experts)
    slots = jnp.where(rerouted, slots, assignment.position_in_expert)
    return TokenAssignment(experts, slots, take_gates(choice.weights, experts), capacity)


def compute_losses(wanted: Losses, choice: Choice, inputs: RouterInputs) -> dict[str, Mean]:
    """The losses whose coefficient is not 0."""
    arguments = (choice.probabilities, choice.experts, inputs.mask)
    functions = {
        "load_balancing": lambda: losses.load_balancing(*arguments),
        "load_balancing_all_choices": lambda: losses.load_balancing_all_choices(*arguments),
        "expert_level": lambda: losses.expert_level(*arguments),
        "device_level": lambda: losses.device_level(*arguments, wanted.devices),
        "communication": lambda: losses.communication(
            *arguments, wanted.devices, wanted.devices_per_token
        ),
        "sequence_wise": lambda: losses.sequence_wise(*arguments, inputs.sequence_ids),
        "importance": lambda: losses.importance(choice.clean, inputs.mask),
        "router_z": lambda: losses.router_z(choice.logits, inputs.mask),
    }
    return {name: functions[name]() for name in wanted.coefficients}


@dataclasses.dataclass
class LinearRouter(TokenChoice):
    """What routers share that take a softmax of one linear map of the token.

    Attributes:
      exploration: how other experts are tried in training.
      exploration_rate: epsilon of the jitter, or the rate of the input dropout.
      logit_soft_cap: c of c * tanh(logits / c); 0 for none (praxis).
      dtype: what inputs, weights, logits, probabilities and gates are rounded to; every paper's is
        float32 in the end.
      init_deviation: of the weights at the start. That of a normalized token's logits is sqrt(d)
        times as large, so that small models with 0.02 begin nearer to uniform routing than large ones.
    """

    exploration: Exploration = Exploration.ARGMAX
    exploration_rate: float = 0.0
    logit_soft_cap: float = 0.0
    dtype: RouterDtype = RouterDtype.FLOAT32
    init_deviation: float = scores.INIT_DEVIATION

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        scores.validate_init_deviation(self.init_deviation)
        scores.validate_exploration(self.exploration, self.exploration_rate)
        if not self.logit_soft_cap >= 0:
            raise UserError(
                f"router.logit_soft_cap is {self.logit_soft_cap}; it must be above 0, or 0 for none."
            )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """weights: [d, E] float32."""
        weights = scores.initial_weights(key, width, num_experts, self.init_deviation)
        return {"weights": weights}

    def logits(self, parameters: Arrays, inputs: RouterInputs) -> Float[Array, "S E"]:
        """[S, E] float32, of the explored input and capped."""
        x = scores.explored_input(inputs, self.exploration, self.exploration_rate)
        logits = scores.product(self.rounded(x), self.rounded(parameters["weights"]))
        return self.rounded(scores.soft_cap(logits, self.logit_soft_cap))

    def softmax(self, logits: Float[Array, "S E"]) -> Float[Array, "S E"]:
        """[S, E] float32 probabilities."""
        return self.rounded(jax.nn.softmax(logits))

    def rounded(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The numbers that the router's dtype can represent, float32."""
        return scores.rounded(x, self.dtype)

    def clean(
        self, parameters: Arrays, inputs: RouterInputs, probabilities: Float[Array, "S E"]
    ) -> Float[Array, "S E"]:
        """[S, E] the probabilities of the input without noise."""
        if not inputs.train or self.exploration in (Exploration.ARGMAX, Exploration.SAMPLE):
            return probabilities
        return self.softmax(self.logits(parameters, dataclasses.replace(inputs, train=False)))

    def ranking(self, logits: Float[Array, "S E"], inputs: RouterInputs) -> Float[Array, "S E"]:
        """[S, E] what the K largest are taken of: the logits, or draws with `sample`."""
        if inputs.train and self.exploration == Exploration.SAMPLE:
            # The K largest of logits plus Gumbel noise are K draws without replacement.
            return logits + jax.random.gumbel(inputs.key, logits.shape)
        return logits


@dataclasses.dataclass
class TopK(LinearRouter):
    """Softmax over all experts, then the K largest (Switch with K = 1, DeepSeekMoE, OLMoE).

    With `renormalize` it is Mixtral: a softmax over the selected logits alone is the same.

    Attributes:
      renormalize: divide the K gates by their sum (Mixtral: True; Switch, DeepSeekMoE: False).
      gate_scale: multiplies the gates (DeepSeek-V2: 16, Switch: 1). A gate starts near 1/E, so E
        lets an expert's output start as large as a dense layer's.
    """

    losses: Losses = dataclasses.field(default_factory=lambda: Losses(load_balancing=1e-2))
    renormalize: bool = False
    gate_scale: float = field(1.0, above=0, factor=True)

    @property
    def largest_gate(self) -> float:
        """Probabilities times the scale."""
        return self.gate_scale

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K most probable experts of each token."""
        logits = self.logits(parameters, inputs)
        probabilities = self.softmax(logits)
        _, experts = jax.lax.top_k(self.ranking(logits, inputs), self.k)
        weights = self.gate_scale * probabilities
        if self.renormalize:
            chosen = take_gates(probabilities, experts).sum(axis=1, keepdims=True)
            weights = weights / jnp.maximum(chosen, 1e-9)
        clean = self.clean(parameters, inputs, probabilities)
        return Choice(logits, experts, self.rounded(weights), probabilities, clean)


@dataclasses.dataclass
class Switch(TopK):
    """Top-1 of the softmax of a jittered input, with the load-balancing loss at 1e-2 (Fedus et al. 2021).

    `TopK` with the paper's choices as defaults: section 2.1 has K = 1 and alpha = 1e-2, Table 11 the
    jitter of 1e-2.
    """

    exploration: Exploration = Exploration.JITTER
    exploration_rate: float = 0.01


class LaterChoices(enum.StrEnum):
    """Which choices after the first are kept (Mesh TensorFlow's `second_policy`).

    ALL, NONE; THRESHOLD: those whose normalised gate exceeds the threshold; RANDOM: each with
    probability gate / threshold.
    """

    ALL = "all"
    NONE = "none"
    THRESHOLD = "threshold"
    RANDOM = "random"


@dataclasses.dataclass
class GShard(LinearRouter):
    """Top-2 with renormalised gates and an optional second expert (GShard algorithm 1).

    With K > 2 it is the top-n of ST-MoE, where each later choice is optional. The gates are divided
    by their sum before choices are left out, and not again after. GShard's `2 g2 > U` is a threshold
    of 0.5; Mesh TensorFlow and ST-MoE use 0.2.

    Attributes:
      later_choices: which choices after the first are kept in training.
      evaluation_later_choices: the same in evaluation, which draws nothing, so `random` is refused
        (Mesh TensorFlow draws there too).
      threshold: see `LaterChoices`.
    """

    k: int = 2
    order: Priority = Priority.CHOICE
    losses: Losses = dataclasses.field(default_factory=lambda: Losses(load_balancing=1e-2))
    later_choices: LaterChoices = LaterChoices.RANDOM
    evaluation_later_choices: LaterChoices = LaterChoices.ALL
    threshold: float = 0.5

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        if self.evaluation_later_choices == LaterChoices.RANDOM:
            raise UserError(
                "router.evaluation_later_choices is random, but evaluation draws nothing; use all, "
                "threshold or none."
            )
        if not 0 < self.threshold <= 1:
            raise UserError(f"router.threshold is {self.threshold}; it must be in (0, 1].")

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K most probable experts, some of the later ones left out."""
        logits = self.logits(parameters, inputs)
        probabilities = self.softmax(logits)
        _, experts = jax.lax.top_k(self.ranking(logits, inputs), self.k)
        chosen = take_gates(probabilities, experts).sum(axis=1, keepdims=True)
        weights = probabilities / jnp.maximum(chosen, 1e-9)
        policy = self.later_choices if inputs.train else self.evaluation_later_choices
        keep_key = jax.random.fold_in(inputs.key, 2)
        keep = _kept(policy, take_gates(weights, experts), self.threshold, keep_key)
        experts = jnp.where(keep.at[:, 0].set(True), experts, num_experts)
        clean = self.clean(parameters, inputs, probabilities)
        return Choice(logits, experts, self.rounded(weights), probabilities, clean)


def _kept(policy: LaterChoices, gates: jax.Array, threshold: float, key: jax.Array) -> jax.Array:
    """[S, K] bool; the first column is not meant."""
    match policy:
        case LaterChoices.ALL:
            return jnp.ones(gates.shape, bool)
        case LaterChoices.NONE:
            return jnp.zeros(gates.shape, bool)
        case LaterChoices.THRESHOLD:
            return gates > threshold
    return jax.random.uniform(key, gates.shape) < gates / threshold


@dataclasses.dataclass
class VMoE(TokenChoice):
    """The K largest of a noisy softmax, not renormalised (V-MoE section 2 and appendix A).

    First choices are served first; `order=batch_priority` is the paper's Batch Prioritized Routing.

    Attributes:
      noise: the noise on the logits in training has the deviation noise / E.
      load_weight: coefficient of `losses.load` (0.005, like the importance loss).
    """

    k: int = 2
    order: Priority = Priority.CHOICE
    losses: Losses = dataclasses.field(default_factory=lambda: Losses(importance=0.005))
    noise: float = field(1.0, at_least=0)
    load_weight: float = 0.005

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficients by the names in `Routing.losses`."""
        return self.losses.coefficients | ({"load": self.load_weight} if self.load_weight else {})

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        if not self.load_weight >= 0:
            raise UserError(
                f"router.load_weight is {self.load_weight}; a coefficient is at least 0."
            )
        if self.load_weight and not self.noise:
            raise UserError(
                "router.noise is 0, where the load loss is not defined; set router.load_weight=0."
            )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """weights: [d, E] float32, LeCun normal as in vmoe."""
        return {"weights": jax.nn.initializers.lecun_normal()(key, (width, num_experts))}

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K most probable experts under noise."""
        clean = scores.product(inputs.x, parameters["weights"])
        deviation, noisy, extra = self.noise / num_experts, clean, {}
        if inputs.train and self.noise:
            noisy = clean + deviation * jax.random.normal(inputs.key, clean.shape)
        top, experts = jax.lax.top_k(noisy, self.k)
        if inputs.train and self.load_weight:
            extra["load"] = losses.load(clean, top[:, -1:], deviation, inputs.mask)
        probabilities = jax.nn.softmax(noisy)
        return Choice(
            noisy, experts, probabilities, probabilities, jax.nn.softmax(clean), losses=extra
        )


_MESH = Capacity(1.25, 2.0, CapacityRule.MESH)
_VMOE = Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND)
_BALANCING = "load-balancing loss"
_TOP_K_OF_SOFTMAX = "top-K of p; g = p"

PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "Switch",
        "Fedus et al. 2021",
        "top-1 of p under input jitter; g = p",
        (0, 1),
        _BALANCING,
        Switch(),
        _MESH,
    ),
    PublishedRouter(
        "Switch, sampling",
        "Fedus et al. 2021, Table 11",
        "one expert drawn from p; g = p",
        (0, 1),
        _BALANCING,
        TopK(exploration=Exploration.SAMPLE),
        _MESH,
    ),
    PublishedRouter(
        "Switch, input dropout",
        "Fedus et al. 2021, Table 11",
        "top-1 of p of the router's input under dropout; g = p",
        (0, 1),
        _BALANCING,
        TopK(exploration=Exploration.INPUT_DROPOUT, exploration_rate=0.1),
        _MESH,
    ),
    PublishedRouter(
        "Switch, No-Token-Left-Behind",
        "Fedus et al. 2021, appendix B",
        "top-1 of p; dropped tokens try their second best expert; g = p",
        (0, 1),
        _BALANCING,
        TopK(no_token_left_behind=True),
        _MESH,
    ),
    PublishedRouter(
        "GShard top-2",
        "Lepikhin et al. 2020, algorithm 1",
        "top-2 of p; g = p / (p1 + p2); second kept with probability 2 g2; first choices first",
        (0.5, 1),
        _BALANCING,
        GShard(),
        Capacity(1.0, 1.0, CapacityRule.GSHARD),
    ),
    PublishedRouter(
        "GShard top-2, causal",
        "Lepikhin et al. 2020, served left to right",
        "as GShard top-2",
        (0.5, 1),
        _BALANCING,
        GShard(order=Priority.TOKEN),
        Capacity(1.0, 1.0, CapacityRule.GSHARD),
    ),
    PublishedRouter(
        "GLaM",
        "Du et al. 2021; praxis",
        "top-2 of p; g = p / (p1 + p2); first choices first",
        (1, 1),
        _BALANCING,
        GShard(later_choices=LaterChoices.ALL),
        Capacity(2.0, 2.0, CapacityRule.PRAXIS),
    ),
    PublishedRouter(
        "ST-MoE top-n",
        "Zoph et al. 2022; Mesh TensorFlow",
        "top-n of p; g = p / sum of the n; later ones kept with probability g / 0.2",
        (1 / 3, 1),
        "load-balancing loss; router z-loss for stability",
        GShard(k=3, threshold=0.2, losses=Losses(load_balancing=1e-2, router_z=1e-3)),
        Capacity(3.0, 3.0, CapacityRule.MESH),
    ),
    PublishedRouter(
        "V-MoE",
        "Riquelme et al. 2021",
        "top-K of the softmax of x W + N(0, 1/E^2); g = that softmax",
        (0, 1),
        "importance and load losses",
        VMoE(),
        _VMOE,
    ),
    PublishedRouter(
        "V-MoE, Batch Prioritized Routing",
        "Riquelme et al. 2021, section 4",
        "as V-MoE; tokens with the largest gate first",
        (0, 1),
        "importance and load losses",
        VMoE(order=Priority.BATCH_PRIORITY),
        _VMOE,
    ),
    PublishedRouter(
        "V-MoE, assignment-level priority",
        "Riquelme et al. 2021; asked for in google-research/vmoe issue 49",
        "as V-MoE; (token, expert) pairs with the largest gate first",
        (0, 1),
        "importance and load losses",
        VMoE(order=Priority.ASSIGNMENT_PRIORITY),
        _VMOE,
    ),
    PublishedRouter(
        "Mixtral",
        "Jiang et al. 2024",
        "top-2 of p; g = softmax over the two logits",
        (1, 1),
        "load-balancing loss over all choices",
        TopK(k=2, renormalize=True, losses=Losses(load_balancing_all_choices=0.02)),
        NO_DROPS,
    ),
    PublishedRouter(
        "OLMoE",
        "Muennighoff et al. 2024",
        _TOP_K_OF_SOFTMAX,
        (0, 1),
        "expert-level loss",
        TopK(k=4, losses=Losses(expert_level=1e-2, router_z=1e-3)),
        NO_DROPS,
    ),
    PublishedRouter(
        "DeepSeekMoE",
        "Dai et al. 2024, eq. 9-17",
        _TOP_K_OF_SOFTMAX + " (beside shared experts)",
        (0, 1),
        "expert-level and device-level losses",
        TopK(k=3, losses=Losses(expert_level=3e-3, device_level=0.05, devices=4)),
        NO_DROPS,
    ),
    PublishedRouter(
        "DeepSpeed-MoE, random token selection",
        "Rajbhandari et al. 2022",
        "top-1 of p; slots are given in random order; g = p",
        (0, 1),
        _BALANCING,
        TopK(order=Priority.RANDOM),
        Capacity(1.0, 1.0, CapacityRule.DEEPSPEED),
    ),
)
"""What papers do with the routers of this file."""
