"""What a forward pass is for; decides dropout, noise and expert capacity."""

import enum


class Mode(enum.StrEnum):
    """TRAIN: noise, dropout, training capacity. EVALUATE: none, evaluation capacity.

    OBSERVE: as EVALUATE, and the MoE layers also report where every token went.
    DECODE: as EVALUATE, but no token is ever dropped, so that a token's output depends neither on
    the other sequences of its batch nor on how many tokens are decoded at once.
    """

    TRAIN = "train"
    EVALUATE = "evaluate"
    OBSERVE = "observe"
    DECODE = "decode"
