"""Random states in a form that a checkpoint may hold: tensors and plain numbers, one record per rank."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import distributed

RNGState = dict[str, Any]


def rng_state() -> RNGState:
    """Return the states of Python's, NumPy's and torch's generators, of the current CUDA device too, in this process."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: RNGState = {
        "python": {"version": version, "numbers": torch.from_numpy(np.array(numbers, dtype=np.int64)), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: RNGState) -> None:
    """Set the generators of this process to a state that :func:`rng_state` returned."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def rank_and_world() -> tuple[int, int]:
    """Return this process' rank and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_rng_states(own: RNGState | None = None) -> list[RNGState]:
    """Return the states of all ranks, by rank, those of now unless ``own`` is given. Every rank has to call it."""
    own = rng_state() if own is None else own
    _, world = rank_and_world()
    if world == 1:
        return [own]
    states: list[Any] = [None] * world
    distributed.all_gather_object(states, own)
    return states


def restore_rank(states: list[RNGState]) -> None:
    """Restore this rank's state; with another number of ranks there is none to continue from, which is said."""
    rank, world = rank_and_world()
    if len(states) == world:
        restore_rng_state(states[rank])
    elif rank == 0:
        warnings.warn(
            f"the checkpoint holds random states of {len(states)} processes, this run has {world}. They are left as they are, so "
            "the run will not repeat the interrupted one exactly.",
            stacklevel=2,
        )
