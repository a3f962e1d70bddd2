"""Single examples out of a collated batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.errors import DataError


def examples_of(batch: Any) -> Iterator[Any]:
    """Yield batches of one example each: every tensor, and every list of as many values, cut along its first dimension.

    Args:
        batch: A tensor, or a tuple, list or mapping with tensors in it. Scalars, and values that are no tensors, go with every example.

    Raises:
        DataError: The tensors do not agree about the number of examples, or there are none.
    """
    sizes = {len(tensor) for tensor in _tensors(batch) if tensor.dim()}
    if len(sizes) != 1:
        found = f"tensors of first dimensions {sorted(sizes)}" if sizes else f"no tensor ({type(batch).__name__})"
        raise DataError(
            f"a batch with {found} cannot be cut into examples. Give a dataloader with batch_size=1, or score whole batches: "
            "FISHMask(per='batch')."
        )
    (size,) = sizes
    if size == 1:
        yield batch
        return
    for i in range(size):
        yield _cut(batch, i, size)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _cut(value: Any, i: int, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.dim() else value
    if isinstance(value, Mapping):
        return type(value)({key: _cut(item, i, size) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        plain = len(value) == size and not any(True for _ in _tensors(value))
        items = [value[i]] if plain else [_cut(item, i, size) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
