"""What a forward pass is for; decides dropout, noise and expert capacity."""

import enum


class Mode(enum.StrEnum):
    """TRAIN: noise, dropout, training capacity. EVALUATE: none, evaluation capacity.

    DECODE: as EVALUATE, but no token is ever dropped, so that a token's output depends neither on
    the other sequences of its batch nor on how many tokens are decoded at once.
    """

    TRAIN = "train"
    EVALUATE = "evaluate"
    DECODE = "decode"
