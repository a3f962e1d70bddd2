"""Tensors that lie in pieces on several ranks: whole ones from their pieces, and the pieces of whole ones.

A checkpoint written from whole tensors is the same file whatever strategy wrote it, so that a run may continue under another one.
Only tensors that train are ever gathered; the frozen base stays where it is. FSDP2 keeps a parameter as a DTensor. FSDP1 (with
``use_orig_params``) keeps a slice of the flattened parameter on each rank, in the order of the ranks, empty on some. The states of
an optimizer lie like their parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_peft.errors import ConfigError
from lightning_peft.nn.adapter import AdapterModule
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.namespace import is_a
from lightning_peft.types import in_pieces, placed, strip_wrappers, whole

SHARDED = ("FSDPStrategy", "ModelParallelStrategy")
"""Lightning strategies that keep a parameter in pieces."""


@dataclass(frozen=True)
class _Slice:
    """A parameter of FSDP1."""

    shape: torch.Size
    group: Any


class Shards:
    """How the parameters of a module lie over the ranks. Every rank has to call the same methods in the same order.

    Args:
        model: The module, wrapped (FSDP1) or with sharded parts (FSDP2).
    """

    def __init__(self, model: nn.Module) -> None:
        self._slices: dict[int, _Slice] = {}
        for unit in model.modules():
            handle: Any = getattr(unit, "_handle", None) if is_a(unit, "FullyShardedDataParallel") else None
            if handle is not None:
                flat = handle.flat_param
                for parameter, shape in zip(flat._params or (), flat._shapes, strict=True):
                    self._slices[id(parameter)] = _Slice(shape, handle.process_group)

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape of the whole parameter."""
        known = self._slices.get(id(parameter))
        return parameter.shape if known is None else known.shape

    def whole(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return a tensor from its pieces on all ranks.

        Args:
            tensor: The piece of this rank, or a tensor that is whole already.
            like: The parameter that it is, or belongs to.
        """
        tensor = whole(tensor.detach())
        known = self._slices.get(id(like))
        if known is None or tensor.dim() == 0:
            return tensor
        sizes = _sizes(tensor, known.group)
        if all(size == known.shape.numel() for size in sizes):  # not in pieces at the moment, or not at all (NO_SHARD)
            return tensor.view(known.shape)
        padded = tensor.new_zeros(max(sizes))
        padded[: tensor.numel()] = tensor.flatten()
        pieces = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(pieces, padded, group=known.group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)]).view(known.shape)

    def piece(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return this rank's piece of a tensor that every rank has, laid out like the parameter ``like``."""
        known = self._slices.get(id(like))
        if known is None or tensor.dim() == 0:
            return placed(tensor, like)
        sizes = _sizes(like, known.group)
        if all(size == known.shape.numel() for size in sizes):
            return tensor
        start = sum(sizes[: distributed.get_rank(known.group)])
        return tensor.flatten()[start : start + like.numel()].view(like.shape)

    @torch.no_grad()
    def write(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a tensor that every rank has into the pieces of a parameter or buffer."""
        into.detach().copy_(self.piece(tensor, into))

    # ------------------------------------------------------------------ optimizers

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return ``optimizer.state_dict()`` with whole tensors: what the optimizer of an unsharded run holds.

        Raises:
            ConfigError: The optimizer keeps tensors that are not laid out like their parameter (factored second moments).
        """
        packed = optimizer.state_dict()
        parameters = _parameters(optimizer)
        local = [packed["state"].get(index, {}) for index in range(len(parameters))]
        state: dict[int, dict[str, Any]] = {}
        for index, (parameter, known) in enumerate(zip(parameters, self._known(local), strict=True)):
            for name, found in known.items():
                if not isinstance(found, torch.dtype):
                    value = found
                elif name in local[index]:
                    value = local[index][name]
                    if id(parameter) in self._slices and value.shape != parameter.shape:
                        raise ConfigError(
                            f"{type(optimizer).__name__} keeps '{name}' of shape {tuple(value.shape)} for a piece of shape "
                            f"{tuple(parameter.shape)}, which cannot be put together. Use AdamW or another elementwise optimizer, or FSDP2."
                        )
                    value = self.whole(value, parameter)
                else:  # this rank has no piece of the parameter, so its optimizer has seen none
                    value = self.whole(torch.zeros(parameter.shape, dtype=found, device=parameter.device), parameter)
                state.setdefault(index, {})[name] = value.clone() if isinstance(value, Tensor) else value
        return {"state": state, "param_groups": packed["param_groups"]}

    def _known(self, local: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return for every parameter what some rank has: the dtype of what lies like the parameter, and other values themselves."""
        mine = [{k: v.dtype if isinstance(v, Tensor) and v.dim() else v for k, v in states.items()} for states in local]
        if not self._slices:
            return mine
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, mine)
        return [{k: v for rank in everyone for k, v in rank[index].items()} for index in range(len(local))]

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what :meth:`optimizer_state`, or the optimizer of an unsharded run, returned.

        Raises:
            ConfigError: It is of other parameter groups.
        """
        parameters = _parameters(optimizer)
        counts = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
        if counts[0] != counts[1]:
            raise ConfigError(
                f"the checkpoint's optimizer has groups of {counts[0]} tensors, this run's {counts[1]}. Use the strategy, extra_modules "
                "and optimizer of the run that saved it."
            )
        order = [index for group in state["param_groups"] for index in group["params"]]
        pieces = {}
        for position, index in enumerate(order):
            parameter, saved = parameters[position], state["state"].get(index)
            if saved is not None:
                shape = self.shape(parameter)
                pieces[index] = {
                    k: self.piece(v, parameter) if isinstance(v, Tensor) and v.shape == shape else v for k, v in saved.items()
                }
        optimizer.load_state_dict({"state": pieces, "param_groups": state["param_groups"]})


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by key, as the strategy has left them, without the prefixes of wrappers."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {strip_wrappers(name): tensor for name, tensor in named}


def agree(handle: Handle) -> None:
    """Give every rank the adapter of rank zero, while it is whole: FSDP does not, and without a seed each has drawn its own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    seeded = [entry.adapter for entry in handle.entries if isinstance(entry.adapter, AdapterModule)]
    seeds: list[Any] = [[adapter.seed for adapter in seeded]]  # from which schedules draw
    distributed.broadcast_object_list(seeds)
    for adapter, seed in zip(seeded, seeds[0], strict=True):
        adapter.seed = seed
    own = [slot.tensor() for slot in handle.slots if not slot.claimed]
    if in_pieces(own) or any(tensor.is_meta for tensor in own):
        return
    values: list[Any] = [[tensor.detach().cpu() for tensor in own] if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(values)
    with torch.no_grad():
        for tensor, value in zip(own, values[0], strict=True):
            tensor.copy_(value)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _sizes(tensor: Tensor, group: Any) -> list[int]:
    sizes: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(sizes, tensor.numel(), group=group)
    return [int(size) for size in sizes]
