"""A Transformers run that is float64 from the first rotary angle to the last gradient.

`model.double()` is not enough. Transformers casts to float32 inside the forward whatever the weights are:
RMSNorm, the rotary angles and their inverse frequencies, the softmax of eager attention, the gated delta rule
with its decay and its state, and the logits before the loss. Each cast leaves an error near 1e-7, which would
hide a wrong implementation that is off by as much. `float64_only` replaces all of them at one place, by
reading every request for float32 as one for float64, and proves it by refusing any narrower floating tensor
that an operation still makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Float32FoundError(AssertionError):
    """An operation of a run that must be float64 made a narrower floating tensor."""


class _ReadFloat32AsFloat64(TorchFunctionMode):
    """Rewrites `x.float()`, `x.to(torch.float32)` and every `dtype=torch.float32` to their float64 form."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*(_widened(value) for value in args), **kwargs)


class _ForbidNarrowFloats(TorchDispatchMode):
    """Raises when an operation, forward or backward, returns a floating tensor that is not float64."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                raise Float32FoundError(f"{func} made a {leaf.dtype} tensor; expected float64 throughout")
        return result


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def float64_only() -> Iterator[None]:
    """Build and run a model in float64 alone.

    The model must be built inside: inverse frequencies computed in float32 and widened later keep its error.

    Raises:
        Float32FoundError: an operation made a narrower floating tensor.
    """
    with _default_dtype(torch.float64), _ForbidNarrowFloats(), _ReadFloat32AsFloat64():
        yield


def check_that_the_guard_bites(run_doubled: Callable[[], Any]) -> None:
    """Require that the guard rejects a plain `.double()` run, and a cast that only the backward makes.

    Args:
        run_doubled: a forward of a model that was built in float32 and then widened with `.double()`.
    """
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    leaf.register_hook(lambda gradient: gradient.to(torch.float32).to(torch.float64))
    for run in (run_doubled, lambda: leaf.sum().backward()):
        try:
            with _ForbidNarrowFloats():
                run()
        except Float32FoundError:
            continue
        raise AssertionError(
            "the float64 guard let a float32 cast pass; nothing recorded under it can be trusted"
        )
