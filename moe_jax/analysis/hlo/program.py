"""The program: what runs in it, and how often."""

import functools
from collections.abc import Iterator

from moe_jax.analysis.hlo.collectives import Collective, collective_of
from moe_jax.analysis.hlo.kernels import Kernel, is_kernel, kernel_of
from moe_jax.analysis.hlo.op_names import op_names_of
from moe_jax.analysis.hlo.products import MatrixProduct, product_flops
from moe_jax.analysis.hlo.text import CONTAINERS, Instruction, Shape, operand_shapes, parse
from moe_jax.analysis.hlo.traffic import TrafficBytes, memory_bytes
from moe_jax.analysis.hlo.trips import Trips, trips_of


class Program:
    """A compiled program.

    Attributes:
      module: its name, such as jit_step.
    """

    def __init__(self, text: str) -> None:
        """Parses `compiled.as_text()`.

        Raises:
          ValueError: there is no entry computation.
        """
        self._module = parse(text)
        self.module = self._module.name

    def collectives(self) -> list[Collective]:
        """Every collective between at least two devices, in the order of the text."""
        return [
            found
            for computation, instruction in self._running()
            if (
                found := collective_of(
                    instruction,
                    self._operands(computation, instruction),
                    self.op_name(instruction.name),
                    self._module.devices,
                    self.trips(computation),
                )
            )
            and found.group_size > 1
        ]

    def matrix_products(self) -> list[MatrixProduct]:
        """Every dot and convolution, also within fusions, and cuBLAS calls on GPUs.

        Other custom calls are opaque and left out; `kernels` has Pallas's and attention by cuDNN. So
        nothing counts what else cuDNN computes, such as convolutions on GPUs.
        """
        return [
            MatrixProduct(self.op_name(instruction.name), flops, self.trips(computation))
            for computation, instruction in self._running()
            if (flops := product_flops(instruction, self._operands(computation, instruction)))
        ]

    def kernels(self) -> list[Kernel]:
        """Every kernel of Pallas, and cuDNN's attention, in the order of the text."""
        return [
            kernel_of(
                instruction,
                self._operands(computation, instruction),
                self.op_name(instruction.name),
                self.trips(computation),
            )
            for computation, instruction in self._running()
            if is_kernel(instruction)
        ]

    def memory_bytes(self) -> TrafficBytes:
        """TrafficBytes that one call reads from and writes to main memory (HBM) on one device."""
        return memory_bytes(self._module, self._trips)

    def op_name(self, instruction: str) -> str:
        """Where an instruction comes from: see `op_names.op_names_of`."""
        return self._op_names.get(instruction, "")

    def knows(self, instruction: str) -> bool:
        """Whether there is an instruction of this name."""
        return instruction in self._op_names

    def is_container(self, instruction: str) -> bool:
        """Whether it only runs other instructions: a loop, a conditional or a call."""
        return instruction in self._containers

    def trips(self, computation: str) -> Trips:
        """How often a computation runs."""
        return self._trips.get(computation, Trips(0, True))

    def _running(self) -> Iterator[tuple[str, Instruction]]:
        for computation, instructions in self._module.computations.items():
            if self.trips(computation).count:
                for instruction in instructions.values():
                    yield computation, instruction

    def _operands(self, computation: str, instruction: Instruction) -> list[Shape]:
        return operand_shapes(self._module.computations[computation], instruction)

    @functools.cached_property
    def _trips(self) -> dict[str, Trips]:
        return trips_of(self._module)

    @functools.cached_property
    def _containers(self) -> set[str]:
        return {
            instruction.name
            for computation in self._module.computations.values()
            for instruction in computation.values()
            if instruction.opcode in CONTAINERS
        }

    @functools.cached_property
    def _op_names(self) -> dict[str, str]:
        return op_names_of(self._module)
