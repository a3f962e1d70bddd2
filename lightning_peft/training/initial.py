"""``init_from``: a fresh run that starts from an existing adapter."""

from __future__ import annotations

import os
import warnings

from torch import nn

from lightning_peft.checkpoint import AdapterFile, read_adapter, require_base
from lightning_peft.errors import CompatibilityError, FormatError
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.adapted_root import path_of
from lightning_peft.types import placed


def read_initial(path: str, name: str, strategy: PEFTStrategy, root: nn.Module) -> AdapterFile:
    """Read the adapter to start from and check it against the base; nothing is changed.

    Args:
        path: An adapter folder or a ``.ckpt``; of a checkpoint with several adapters, the one called ``name``.
        name: Name of the adapter to be trained.
        strategy: How it is going to be trained; where the file says otherwise, that is a warning.
        root: The adapted root.

    Raises:
        FormatError: The file is missing, damaged, foreign, or of a newer format.
        CompatibilityError: It was made for another base.
    """
    try:
        start = read_adapter(path, name if os.path.isfile(path) else None)
    except FormatError:
        start = read_adapter(path)  # one adapter under another name; or the error says what is wrong
    require_base(root, start.manifest)
    if start.strategy != strategy:
        warnings.warn(f"init_from='{path}' was trained as {start.strategy}, this run trains {strategy}.", stacklevel=2)
    return start


def start_from(start: AdapterFile, path: str, module: nn.Module, handle: Handle) -> None:
    """Copy the adapter's tensors, and those saved beside it, into the module; all are checked before the first is written.

    Raises:
        CompatibilityError: A shape or a set of keys differs.
    """
    live = module.state_dict(keep_vars=True)
    here = path_of(module, handle.root) or ""
    places = {key: _moved(key, start.manifest["root"], here) for key in start.extra_state}
    homeless = [key for key, place in places.items() if place not in live]
    if homeless:
        warnings.warn(
            f"init_from='{path}' also holds {', '.join(map(repr, homeless[:5]))}, for which {type(module).__name__} has no place; they "
            "are left out.",
            stacklevel=2,
        )
    extra = {key: live[place] for key, place in places.items() if place in live}
    for key, tensor in extra.items():
        if tensor.shape != start.extra_state[key].shape:
            raise CompatibilityError(
                f"init_from='{path}': '{key}' has shape {tuple(start.extra_state[key].shape)}, the module has {tuple(tensor.shape)}."
            )
    handle.load_state_dict(start.state)
    for key, tensor in extra.items():
        tensor.data.copy_(placed(start.extra_state[key], tensor))


def _moved(key: str, saved: str, here: str) -> str:
    """Return the key of a tensor below the adapted root where the root has the path ``here`` instead of ``saved``."""
    inside = not saved or key.startswith(f"{saved}.")
    parts = (here, key.removeprefix(f"{saved}.") if saved else key) if inside else (key,)
    return ".".join(part for part in parts if part)
