"""The memory of a run, by what it is spent on; and how many tokens may run at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from lora.estimate.activations import saved_bytes
from lora.estimate.scratch import (
    head_gradient_bytes,
    logits_bytes,
    scratch_bytes,
    thread_bytes,
    widening_bytes,
)
from lora.estimate.workload import MOMENT_BYTES, TRAINED_BYTES, Workload

HOST_ACTIVATION_BYTES = 2 * 2**30  # what one micro-batch may take of a host: more runs no faster there
MOST_TOKENS = 2**20  # of a micro-batch; beyond it no kernel runs any faster


class Memory(NamedTuple):
    """Bytes at the peak of a training step."""

    model: int  # the base: as stored, or under full training its float32 copy
    adapter: int  # factors and a classifier's head
    optimizer: int  # two moments
    gradient: int
    activation: (
        int  # records of the forward, what a block has live at once, the buffer that weights are widened in
    )
    logits: int  # the largest chunk of them, with its gradient in place
    mapped: (
        int  # of the model's: pages of the checkpoint's files, which the system can take back and read again
    )

    @property
    def total(self) -> int:
        """Everything, mapped pages included."""
        return self.model + self.adapter + self.optimizer + self.gradient + self.activation + self.logits

    @property
    def resident(self) -> int:
        """What must fit: everything but mapped pages."""
        return self.total - self.mapped


def memory(workload: Workload, tokens: int, *, longest: int, accumulates: bool) -> Memory:
    """Return the bytes that training `workload` takes with micro-batches of `tokens` tokens.

    Args:
        workload: the model, and what is trained of it.
        tokens: the most tokens that run at once.
        longest: the most tokens of one sequence.
        accumulates: whether a step adds up the gradients of more than one micro-batch.
    """
    saved, logits = saved_bytes(workload, tokens), logits_bytes(workload, tokens, longest)
    # the logits' memory stays in the pool when the blocks' backward begins
    scratch = scratch_bytes(workload, tokens, longest) + thread_bytes(workload, tokens, longest)
    gradient = workload.held_parameters * workload.wide_bytes
    if accumulates:
        # a second set grows beside the sum, in the room that the records leave as they are used up
        gradient += max(head_gradient_bytes(workload), gradient - saved)
    maps = workload.device == "cpu" and workload.method != "full"
    return Memory(
        model=workload.model_bytes,
        adapter=TRAINED_BYTES * (workload.adapter_parameters + workload.head_parameters),
        optimizer=MOMENT_BYTES * workload.held_parameters,
        gradient=gradient,
        activation=saved + scratch + widening_bytes(workload),
        logits=logits,
        mapped=workload.model_bytes if maps else 0,
    )


def micro_batch_tokens(workload: Workload, budget_bytes: float, *, longest: int) -> int:
    """Return the most tokens that may run at once so that activations and logits stay within `budget_bytes`.

    A step may cut its batch into parts of this size without changing its result, since gradients are divided
    by the tokens that count in the whole step. 0 where the budget does not hold a single token.

    Args:
        workload: the model, and what is trained of it.
        budget_bytes: for activations and logits; model, adapters, moments and gradients are not in it.
        longest: the most tokens of one sequence.
    """

    def running(tokens: int) -> int:
        needed = memory(workload, tokens, longest=longest, accumulates=False)
        return needed.activation + needed.logits

    return most_tokens(running, budget_bytes)


def most_tokens(needed: Callable[[int], int], budget_bytes: float, limit: int = MOST_TOKENS) -> int:
    """Return the most tokens, from 0 to `limit`, whose `needed(tokens)` bytes stay within the budget."""
    return bisect_right(range(1, limit + 1), budget_bytes, key=needed)
