"""Numbers that papers print of their models, beside which ours are counted.

A row of a config file names them (`moe_jax.training.rows`); `moe_jax.analysis.published` counts.
"""

import dataclasses
import enum
import re
from decimal import Decimal

_SCALES = {"": 0, "K": 3, "M": 6, "G": 9, "B": 9, "T": 12}


class Quantity(enum.StrEnum):
    """What is published, named with its convention.

    PARAMETERS: all of them.
    PARAMETERS_WITHOUT_EMBEDDINGS: without embedding tables and output layer (Shazeer).
    PARAMETERS_OF_BLOCKS: without embeddings, output layer and final norm (Clark).
    ACTIVATED: parameters without the experts that a token does not visit.
    ACTIVATED_WITHOUT_INPUT: and without the input embedding, of which a token reads one row.
    FLOPS_PER_TOKEN, FLOPS_PER_SEQUENCE, FLOPS_PER_IMAGE: algorithmic, of the forward pass.
    TRAINING_FLOPS_PER_SEQUENCE: (6 N + 12 n d L) L with N activated parameters without input
      embedding, n layers of width d and sequences of L tokens (DeepSeekMoE).
    OPS_PER_TIMESTEP: multiply-adds for a token, without embedding and output layer (Shazeer's
      language models; for their translators with the output layer, see their accounting).
    """

    PARAMETERS = "parameters"
    PARAMETERS_WITHOUT_EMBEDDINGS = "parameters without embeddings"
    PARAMETERS_OF_BLOCKS = "parameters of blocks"
    ACTIVATED = "activated parameters"
    ACTIVATED_WITHOUT_INPUT = "activated parameters without input embedding"
    FLOPS_PER_TOKEN = "FLOPs per token"
    FLOPS_PER_SEQUENCE = "FLOPs per sequence"
    FLOPS_PER_IMAGE = "FLOPs per image"
    TRAINING_FLOPS_PER_SEQUENCE = "training FLOPs per sequence"
    OPS_PER_TIMESTEP = "operations per timestep"


@dataclasses.dataclass(frozen=True)
class Published:
    """One number of a paper.

    Attributes:
      quantity: of what.
      printed: as the paper prints it: `7.4B`, `36.5M`, `124B`.
      source: where: `Table 9`.
      note: what a reader must know: an erratum with both numbers, a convention.
      relative_tolerance: how far ours may be, where that is more than half a unit of the last printed
        digit.
      cut_off: the print is cut off, not rounded: 933.7M is printed 933M.
    """

    quantity: Quantity
    printed: str
    source: str
    note: str = ""
    relative_tolerance: float = 0.0
    cut_off: bool = False

    @property
    def value(self) -> float:
        """The number."""
        return float(self._digits().scaleb(self._exponent()))

    @property
    def tolerance(self) -> float:
        """How far ours may be, absolute."""
        rounding = self.unit if self.cut_off else self.unit / 2
        return max(rounding, self.relative_tolerance * self.value)

    @property
    def unit(self) -> float:
        """What 1 more in the last printed digit is."""
        exponent = int(self._digits().as_tuple().exponent)
        return float(Decimal(1).scaleb(exponent + self._exponent()))

    def met_by(self, computed: float) -> bool:
        """Whether printing explains the difference."""
        difference = computed - self.value
        if self.cut_off and not difference >= 0:
            return False
        # Half a unit itself may be rounded up or to even.
        return abs(difference) <= self.tolerance * (1 + 1e-9)

    def as_printed(self, computed: float) -> str:
        """A number of ours with as many digits and the same letter."""
        exponent = int(self._digits().as_tuple().exponent)
        return f"{computed / 10 ** self._exponent():.{max(-exponent, 0)}f}{self._match()[2]}"

    def _digits(self) -> Decimal:
        return Decimal(self._match()[1])

    def _exponent(self) -> int:
        return _SCALES[self._match()[2]]

    def _match(self) -> re.Match[str]:
        match = re.fullmatch(r"([\d.]+)([KMGBT]?)", self.printed)
        if match is None:
            raise ValueError(f"{self.printed!r} is not a number such as 7.4B")
        return match
