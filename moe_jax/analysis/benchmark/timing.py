"""Interleaved timing of compiled programs, and what would take too much of the machine.

On a shared machine the same program takes 2 times as long within minutes, so a time means nothing:
in every round each program runs once, and what is reported is the median over rounds of the ratio
of two times of one round.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.analysis.benchmark.cases import Pass
from moe_jax.analysis.benchmark.variants import Layer
from moe_jax.parallel.memory import memory_of


class TooExpensive(Exception):  # noqa: N818 - a finding about a program, not an error.
    """A program takes more than it may; the message says in words of what."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
      bytes: of temporaries, arguments and outputs.
      flops: of one call, as XLA counts them (the body of a loop once).
    """

    bytes: float
    flops: float

    @classmethod
    def of_this_machine(cls, flops: float) -> "Limits":
        """Half of the memory of the device, which is the host's on CPU."""
        memory = memory_of(jax.devices()[0])
        return cls(math.inf if memory is None else memory / 2, flops)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles.

        Raises:
          TooExpensive: the program exceeds a limit.
        """
        # Before compiling, which takes seconds.
        cost: Any = lowered.cost_analysis()
        flops = cost["flops"]
        if flops > self.flops:
            raise TooExpensive(
                f"takes {flops / 1e12:.2f} TFLOP a call, the limit is {self.flops / 1e12:.2f}"
            )
        compiled = lowered.compile()
        memory: Any = compiled.memory_analysis()
        needed = (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        )
        if needed > self.bytes:
            raise TooExpensive(
                f"needs {needed / 1e9:.1f} GB of memory, the limit is {self.bytes / 1e9:.1f}"
            )
        return compiled


NO_LIMITS = Limits(float("inf"), float("inf"))


@dataclasses.dataclass(frozen=True)
class TimedProgram:
    """A compiled pass of a layer.

    Attributes:
      compiled: (parameters, x, cotangent) -> all outputs.
      cotangent: in the shape of y; random, so that nothing of the backward pass is left out.
    """

    compiled: jax.stages.Compiled
    cotangent: jax.Array

    @classmethod
    def of(
        cls, layer: Layer, which: Pass, parameters: Any, x: jax.Array, limits: Limits = NO_LIMITS
    ) -> "TimedProgram":
        """Compiles a layer.

        The outputs are y and the statistics, and with FORWARD_BACKWARD the gradients of the
        parameters and of x.

        Args:
          layer: see `variants`.
          which: the outputs alone, or the gradients too.
          parameters, x: examples of its arguments.
          limits: that the program must not exceed.

        Raises:
          TooExpensive: it does.
        """

        def forward(parameters: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            return layer(parameters, x)

        def forward_backward(parameters: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            y, pullback, statistics = jax.vjp(layer, parameters, x, has_aux=True)
            return y, statistics, pullback(cotangent)

        y, _ = jax.eval_shape(layer, parameters, x)
        cotangent = jax.random.normal(jax.random.key(0), y.shape, y.dtype)
        function = forward if which == Pass.FORWARD else forward_backward
        lowered = jax.jit(function, keep_unused=True).lower(parameters, x, cotangent)
        return cls(limits.compile(lowered), cotangent)

    def __call__(self, parameters: Any, x: jax.Array) -> Any:
        """Runs it: (y, statistics) or (y, statistics, gradients)."""
        return self.compiled(parameters, x, self.cotangent)

    @property
    def temp_bytes(self) -> int:
        """Bytes that the program allocates beside arguments and outputs."""
        memory: Any = self.compiled.memory_analysis()
        return memory.temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often programs run.

    Attributes:
      rounds: at most.
      least_rounds: even of a slow program.
      seconds: after these a program leaves the rounds that are left to the others.
    """

    rounds: int
    least_rounds: int
    seconds: float


# For figures that are published.
THOROUGH = Rounds(rounds=15, least_rounds=3, seconds=3.0)


def interleaved(calls: Mapping[str, Callable[[], Any]], schedule: Rounds) -> dict[str, np.ndarray]:
    """Times of calls that have run before, each once per round, in a new order every round.

    In one order for all rounds, a program would always find the caches as the same other left them.

    Args:
      calls: name -> a call that returns arrays.
      schedule: how many rounds.

    Returns:
      name -> [rounds] seconds, NaN in rounds without it.
    """
    times = {name: np.full(schedule.rounds, np.nan) for name in calls}
    order = np.random.default_rng(0)
    for number in range(schedule.rounds):
        for name in order.permutation(sorted(calls)):
            late = np.nansum(times[name]) > schedule.seconds
            if number < schedule.least_rounds or not late:
                times[name][number] = seconds_of(calls[name])
    return times


def seconds_of(call: Callable[[], Any]) -> float:
    """Until the last output is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def ratio_quartiles(times: np.ndarray, floor: np.ndarray) -> list[float]:
    """Lower quartile, median and upper quartile over rounds of time / floor's time of that round."""
    return [float(value) for value in np.nanquantile(times / floor, (0.25, 0.5, 0.75))]
