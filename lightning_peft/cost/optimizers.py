"""What an optimizer keeps and takes, seen by letting it make a step on tensors without numbers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.cost.tracer import Tracer
from lightning_peft.errors import ConfigError, did_you_mean

MakeOptimizer: TypeAlias = Callable[[Any], Optimizer]


def optimizer_named(value: str | MakeOptimizer) -> MakeOptimizer:
    """Return what makes the optimizer: a class of torch.optim by its name in any case, or what was given.

    Raises:
        ConfigError: torch has no such optimizer.
    """
    if not isinstance(value, str):
        if not callable(value):
            raise ConfigError(f"optimizer={value!r} is neither a name of torch.optim nor a function that takes parameters.")
        return value
    known = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    found = known.get(value.lower())
    if found is None:
        raise ConfigError(
            f"optimizer={value!r} is not one of torch.optim: {', '.join(sorted(known))}.{did_you_mean(value.lower(), known)} Others are "
            "given as a function that takes parameters and returns the optimizer."
        )
    # SGD had no default rate before torch 2.
    return lambda parameters: found(parameters, lr=1e-3)  # type: ignore[call-arg]


def optimizer_bytes(
    tracer: Tracer, parameters: Sequence[nn.Parameter], make: MakeOptimizer, *, together: bool
) -> tuple[int, int]:
    """Return the bytes of the optimizer's state, and of what one step takes besides.

    Args:
        tracer: The mode to count in.
        parameters: What it trains.
        make: Makes the optimizer of some parameters.
        together: torch steps through all parameters in one go, as on CUDA (``foreach``), instead of one by one.

    Raises:
        ConfigError: The optimizer cannot be tried on tensors without numbers.
    """
    kinds = Counter((p.shape, p.dtype) for p in parameters)
    state = step = 0
    for (shape, dtype), count in kinds.items():
        kept, taken = _one(tracer, shape, dtype, make)
        state += count * kept
        step = step + count * taken if together else max(step, taken)
    return state, step


def _one(tracer: Tracer, shape: torch.Size, dtype: torch.dtype, make: MakeOptimizer) -> tuple[int, int]:
    with tracer, tracer.any_values():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
        parameter.grad = torch.empty_like(parameter)
        try:
            optimizer = make([parameter])
            optimizer.step()  # makes the state
            watch = tracer.watch()
            optimizer.step()
            watch.stop()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"the optimizer cannot be tried without numbers: {type(error).__name__}: {error}") from error
    states = [t for t in optimizer.state[parameter].values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in states), watch.rise
