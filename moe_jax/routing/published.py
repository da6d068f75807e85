"""What a paper says of a router: one row of docs/routers.md, which stands beside the router's class."""

import dataclasses
import re

from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.router import Router

NO_DROPS = Capacity(rule=CapacityRule.NO_DROPS)
"""For papers that drop nothing."""


@dataclasses.dataclass(frozen=True)
class PublishedRouter:
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

    @property
    def year(self) -> int:
        """When the paper appeared; 9999 for what is from no paper."""
        found = re.search(r"(19|20)\d\d", self.paper)
        return int(found[0]) if found else 9999
