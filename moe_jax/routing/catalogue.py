"""Every router of the library with the facts of its paper.

The documentation page docs/routers.md is written from here, and tests run over every entry.
"""

import dataclasses

from moe_jax.configuration import config_line
from moe_jax.routing.assignment import Router
from moe_jax.routing.balanced import BASE, Solver
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.deepseek import DeepSeekV2, DeepSeekV3
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.fixed import DrawnPer, HashKind, HashRouter, StaticGate, UniformRandom
from moe_jax.routing.losses import Losses
from moe_jax.routing.noisy_top_k import HierarchicalNoisyTopK, NoisyTopK
from moe_jax.routing.scores import Exploration
from moe_jax.routing.service import ServiceOrder
from moe_jax.routing.soft import SoftMoE, SoftVariant
from moe_jax.routing.token_choice import GShard, LaterChoices, TopK, VMoE

# The types that a config may hold as its router.
ROUTERS: tuple[type[Router], ...] = (
    TopK,
    GShard,
    VMoE,
    NoisyTopK,
    HierarchicalNoisyTopK,
    DeepSeekV2,
    DeepSeekV3,
    ExpertChoice,
    SoftMoE,
    HashRouter,
    UniformRandom,
    StaticGate,
    BASE,
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published way of routing.

    Attributes:
      name: what people call it.
      paper: where it is from.
      formula: who goes where and with which gate g; p is the softmax of the logits x W.
      gates: least and largest sum of a token's gates when nothing is dropped, for fields as in
        `router`.
      balance: what keeps the experts' load even; empty if nothing does.
      router: as the paper has it, valid for 8 experts, groups of 64 tokens and 264 token ids. Copy it
        (copy.deepcopy) before you change its fields.
      capacity: the rule of the paper or its code; no drops where it has none, and None where the
        router has its own.
    """

    name: str
    paper: str
    formula: str
    gates: tuple[float, float]
    balance: str
    router: Router
    capacity: Capacity | None


_MESH = Capacity(1.25, 2.0, CapacityRule.MESH)
_VMOE = Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND)
_NO_DROPS = Capacity(rule=CapacityRule.NO_DROPS)
_EXPERT_CHOICE = Capacity(2.0, 2.0, CapacityRule.EXPERT_CHOICE)
_BALANCING = "load-balancing loss"
_TOP_K_OF_SOFTMAX = "top-K of p; g = p"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "Switch",
        "Fedus et al. 2021",
        "top-1 of p under input jitter; g = p",
        (0, 1),
        _BALANCING,
        TopK(exploration=Exploration.JITTER, exploration_rate=0.01),
        _MESH,
    ),
    Entry(
        "Switch, sampling",
        "Fedus et al. 2021, Table 11",
        "one expert drawn from p; g = p",
        (0, 1),
        _BALANCING,
        TopK(exploration=Exploration.SAMPLE),
        _MESH,
    ),
    Entry(
        "Switch, input dropout",
        "Fedus et al. 2021, Table 11",
        "top-1 of p of the router's input under dropout; g = p",
        (0, 1),
        _BALANCING,
        TopK(exploration=Exploration.INPUT_DROPOUT, exploration_rate=0.1),
        _MESH,
    ),
    Entry(
        "Switch, No-Token-Left-Behind",
        "Fedus et al. 2021, appendix B",
        "top-1 of p; dropped tokens try their second best expert; g = p",
        (0, 1),
        _BALANCING,
        TopK(no_token_left_behind=True),
        _MESH,
    ),
    Entry(
        "GShard top-2",
        "Lepikhin et al. 2020, algorithm 1",
        "top-2 of p; g = p / (p1 + p2); second kept with probability 2 g2; first choices first",
        (0.5, 1),
        _BALANCING,
        GShard(),
        Capacity(1.0, 1.0, CapacityRule.GSHARD),
    ),
    Entry(
        "GShard top-2, causal",
        "the same, served left to right",
        "as GShard top-2",
        (0.5, 1),
        _BALANCING,
        GShard(order=ServiceOrder.TOKEN),
        Capacity(1.0, 1.0, CapacityRule.GSHARD),
    ),
    Entry(
        "GLaM",
        "Du et al. 2021; praxis",
        "top-2 of p; g = p / (p1 + p2); first choices first",
        (1, 1),
        _BALANCING,
        GShard(later_choices=LaterChoices.ALL),
        Capacity(2.0, 2.0, CapacityRule.PRAXIS),
    ),
    Entry(
        "ST-MoE top-n",
        "Zoph et al. 2022; Mesh TensorFlow",
        "top-n of p; g = p / sum of the n; later ones kept with probability g / 0.2",
        (1 / 3, 1),
        "load-balancing loss; router z-loss for stability",
        GShard(k=3, threshold=0.2, losses=Losses(load_balancing=1e-2, router_z=1e-3)),
        Capacity(3.0, 3.0, CapacityRule.MESH),
    ),
    Entry(
        "V-MoE",
        "Riquelme et al. 2021",
        "top-K of the softmax of x W + N(0, 1/E^2); g = that softmax",
        (0, 1),
        "importance and load losses",
        VMoE(),
        _VMOE,
    ),
    Entry(
        "V-MoE, Batch Prioritized Routing",
        "Riquelme et al. 2021, section 4",
        "as V-MoE; tokens with the largest gate first",
        (0, 1),
        "importance and load losses",
        VMoE(order=ServiceOrder.BATCH_PRIORITY),
        _VMOE,
    ),
    Entry(
        "V-MoE, assignment-level priority",
        "asked for in google-research/vmoe issue 49",
        "as V-MoE; (token, expert) pairs with the largest gate first",
        (0, 1),
        "importance and load losses",
        VMoE(order=ServiceOrder.ASSIGNMENT_PRIORITY),
        _VMOE,
    ),
    Entry(
        "Noisy top-K",
        "Shazeer et al. 2017, eq. 3-5",
        "H = x W + N(0, 1) softplus(x W_noise); g = softmax of the K largest H",
        (1, 1),
        "importance and load losses",
        NoisyTopK(),
        _NO_DROPS,
    ),
    Entry(
        "Hierarchical noisy top-K",
        "Shazeer et al. 2017, appendix B",
        "noisy top-K over groups of experts, then within each; g = product of the two",
        (1, 1),
        "importance and load losses",
        HierarchicalNoisyTopK(groups=4, groups_per_token=2, k=2),
        _NO_DROPS,
    ),
    Entry(
        "Mixtral",
        "Jiang et al. 2024",
        "top-2 of p; g = softmax over the two logits",
        (1, 1),
        "load-balancing loss over all choices",
        TopK(k=2, renormalize=True, losses=Losses(load_balancing_all_choices=0.02)),
        _NO_DROPS,
    ),
    Entry(
        "OLMoE",
        "Muennighoff et al. 2024",
        _TOP_K_OF_SOFTMAX,
        (0, 1),
        "expert-level loss",
        TopK(k=4, losses=Losses(expert_level=1e-2, router_z=1e-3)),
        _NO_DROPS,
    ),
    Entry(
        "DeepSeekMoE",
        "Dai et al. 2024, eq. 9-17",
        _TOP_K_OF_SOFTMAX + " (beside shared experts)",
        (0, 1),
        "expert-level and device-level losses",
        TopK(k=3, losses=Losses(expert_level=3e-3, device_level=0.05, devices=4)),
        _NO_DROPS,
    ),
    Entry(
        "DeepSeek-V2, device-limited",
        "DeepSeek-AI 2024a, section 2.2",
        "top-K of p within the M devices of largest p; g = 16 p",
        (0, 16),
        "expert-level, device-level and communication losses",
        DeepSeekV2(
            k=2,
            losses=Losses(
                expert_level=0.003,
                device_level=0.05,
                communication=0.02,
                devices=4,
                devices_per_token=2,
            ),
        ),
        _NO_DROPS,
    ),
    Entry(
        "DeepSeek-V3",
        "DeepSeek-AI 2024b, eq. 12-20",
        "s = sigmoid(x W); top-K of s + bias within the best groups; g = 2.5 s / sum of chosen s",
        (2.5, 2.5),
        "expert bias, moved against each batch's load; sequence-wise loss",
        DeepSeekV3(k=2, groups=4, groups_per_token=2),
        _NO_DROPS,
    ),
    Entry(
        "Loss-free balancing",
        "Wang et al. 2024",
        "s = sigmoid(x W); top-K of s + bias; g = s",
        (0, 2),
        "expert bias, moved against each batch's load",
        DeepSeekV3(
            k=2, groups=1, groups_per_token=1, renormalize=False, gate_scale=1.0, losses=Losses()
        ),
        _NO_DROPS,
    ),
    Entry(
        "DeepSpeed-MoE, random token selection",
        "Rajbhandari et al. 2022",
        "top-1 of p; slots are given in random order; g = p",
        (0, 1),
        _BALANCING,
        TopK(order=ServiceOrder.RANDOM),
        Capacity(1.0, 1.0, CapacityRule.DEEPSPEED),
    ),
    Entry(
        "Expert Choice",
        "Zhou et al. 2022",
        "each expert takes the C tokens of largest p; g = p",
        (0, 1),
        "by construction: every expert takes C tokens",
        ExpertChoice(),
        _EXPERT_CHOICE,
    ),
    Entry(
        "Expert Choice, capped",
        "Zhou et al. 2022, section 4.5",
        "each expert takes the C tokens of largest weight in an entropy-regularised linear program; "
        "g = p",
        (0, 1),
        "by construction: every expert takes C tokens",
        ExpertChoice(cap=2),
        _EXPERT_CHOICE,
    ),
    Entry(
        "Soft MoE",
        "Puigcerver et al. 2023",
        "l = scale x/|x| . mu/|mu|; slots take tokens by softmax over tokens, tokens take slots by "
        "softmax over slots",
        (1, 1),
        "by construction: every slot takes a mean of all tokens",
        SoftMoE(),
        None,
    ),
    *(
        Entry(
            f"Soft MoE, {name}",
            "Puigcerver et al. 2023, Table 2",
            formula,
            (1, 1),
            "by construction",
            SoftMoE(variant=variant, slots_per_expert=slots),
            None,
        )
        for name, variant, slots, formula in (
            ("soft/uniform", SoftVariant.SOFT_UNIFORM, 1, "soft dispatch, uniform combine"),
            ("uniform/soft", SoftVariant.UNIFORM_SOFT, 1, "uniform dispatch, soft combine"),
            ("uniform", SoftVariant.UNIFORM, 1, "uniform dispatch and combine"),
            ("identity", SoftVariant.IDENTITY, 8, "slot i takes token i (E P = S)"),
        )
    ),
    Entry(
        "Hash, random",
        "Roller et al. 2021",
        "expert of a token id from a random table; g = 1",
        (1, 1),
        "",
        HashRouter(vocab_size=264),
        _NO_DROPS,
    ),
    Entry(
        "Hash, balanced",
        "Roller et al. 2021",
        "frequent ids first, each to the expert with the least tokens so far; g = 1",
        (1, 1),
        "by the ids' frequencies (`token_counts`)",
        HashRouter(vocab_size=264, kind=HashKind.BALANCED),
        _NO_DROPS,
    ),
    Entry(
        "Hash, modulo",
        "Zhou et al. 2022, section 4.5",
        "token id modulo E; g = 1",
        (1, 1),
        "",
        HashRouter(vocab_size=264, kind=HashKind.MODULO),
        _NO_DROPS,
    ),
    Entry(
        "Uniform random, per token",
        "a baseline",
        "an expert drawn uniformly for each token; g = 1",
        (1, 1),
        "by construction, on average",
        UniformRandom(),
        _NO_DROPS,
    ),
    Entry(
        "THOR",
        "Zuo et al. 2021",
        "an expert drawn uniformly for each batch; g = 1; with the task's consistency_weight",
        (1, 1),
        "",
        UniformRandom(per=DrawnPer.BATCH),
        None,
    ),
    Entry(
        "BASE",
        "Lewis et al. 2021",
        "training: the balanced assignment of largest total score x W; evaluation: largest score; "
        "g = sigmoid(score)",
        (0, 1),
        "by construction in training: every expert gets at most S / E tokens, rounded up",
        BASE(),
        Capacity(1.0, 8.0),
    ),
    Entry(
        "S-BASE",
        "Clark et al. 2022",
        "as BASE; training: largest entry of the Sinkhorn plan of the scores",
        (0, 1),
        "nearly, by the Sinkhorn plan",
        BASE(solver=Solver.SINKHORN),
        Capacity(2.0, 8.0),
    ),
    Entry(
        "Static gate",
        "a baseline",
        "every token goes to the same experts with given weights",
        (1, 1),
        "",
        StaticGate(weights=(0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        None,
    ),
)


def routers_page() -> str:
    """The documentation page: one row for each entry."""
    rows = [
        "| "
        + " | ".join(
            (
                entry.name,
                entry.paper,
                entry.formula,
                _sum_of_gates(entry.gates),
                entry.balance or "nothing",
                "yes" if entry.router.leak is None else f"no: {entry.router.leak}",
                f"`{config_line(entry.router)}`",
                f"`{config_line(entry.capacity)}`" if entry.capacity else "its own slots",
            )
        )
        + " |"
        for entry in ENTRIES
    ]
    return _PAGE.format(rows="\n".join(rows))


def _sum_of_gates(gates: tuple[float, float]) -> str:
    low, high = (f"{value:.3g}" for value in gates)
    return low if low == high else f"{low} to {high}"


_PAGE = """# Routers

Written by `python experiments/router_table.py` from moe_jax/routing/catalogue.py; a test compares.

One line of a config swaps the routing: `config.model.moe.router = ...`, and usually
`config.model.moe.capacity = ...`. K, E and the coefficients below fit 8 experts; the papers'
numbers are in the classes' docstrings. *Gates sum to* is meant for a token of which nothing was
dropped. A router that is not causal is refused in a decoder unless `model.accept_leak` is true or
the model is `bidirectional`. Every token-choice router takes any `order` of service, a second pass
(`no_token_left_behind`) and any of the `losses`; those with one linear map also `exploration`,
`logit_soft_cap` and `dtype`. Coefficients are those of the paper where it sums the losses of all
layers, as the task's `auxiliary_reduction=sum` does; OLMoE's is a mean.

| name | paper | who goes where, with which gate g | gates sum to | balanced by | causal | router | capacity |
|---|---|---|---|---|---|---|---|
{rows}
"""
