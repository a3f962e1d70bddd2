"""A Lightning checkpoint back into the user's own class, adapters installed."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_peft.checkpoint import check_manifest, entries_of, load_checkpoint, manifests_of, require_base
from lightning_peft.loading.quantize import quantize, require_same
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.strategies.install import reinstall
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.training import restoring
from lightning_peft.training.adapted_root import find_handle, find_root, strip_root, train_whole

M = TypeVar("M", bound=nn.Module)


def load_from_checkpoint(
    cls: type[M], path: str | os.PathLike[str], *, anatomy: dict[str, Any] | str | None = None, **kwargs: Any
) -> M:
    """Build a LightningModule from a checkpoint that was saved with :class:`PEFTCallback`.

    The module is built as ``cls.load_from_checkpoint`` builds it, so that the base comes from where the class takes it (or from a
    ``checkpoint="full"`` file); then the adapters are installed that the checkpoint describes, and their tensors loaded.

    Args:
        cls: The user's LightningModule class.
        path: The ``.ckpt``, a file or a folder of pieces.
        anatomy: Roles of an architecture that the package does not know, as given to :class:`PEFTCallback`.
        **kwargs: As for ``cls.load_from_checkpoint``: ``map_location``, and arguments of the class in place of the saved ones.

    Raises:
        FormatError: The file is damaged, or was saved without PEFTCallback.
        CompatibilityError: The class builds another base than the adapter was trained on, or tensors are missing.
    """
    checkpoint = load_checkpoint(Path(path))
    manifests = manifests_of(checkpoint, f"'{path}'")

    class Adapted(cls):  # type: ignore[valid-type, misc]
        def configure_model(self) -> None:
            super().configure_model()
            for name, manifest in manifests.items():
                if find_handle(self, name) is not None:
                    continue
                root = find_root(self, manifest["root"])[1]
                prefix = f"{manifest['root']}." if manifest["root"] else ""
                strategy = check_manifest(manifest)
                asked = manifest.get("usage", {}).get("quantization")
                if asked is not None and not require_same(root, QuantizeOptions.parse(asked)):
                    whole = {key.rpartition(".")[0].removeprefix(prefix) for key in manifest["extra"] if key.startswith(prefix)}
                    local = strip_root(QuantizeOptions.parse(asked), manifest["root"], anatomy_of(root, anatomy))
                    quantize(root, local.skipping(sorted(whole)), anatomy=anatomy)
                require_base(root, manifest)
                dtype, room = manifest["adapter_dtype"], entries_of(manifest)
                handle = reinstall(root, strategy, name, adapter_dtype=dtype, anatomy=anatomy, room=room)  # type: ignore[arg-type]
                handle.usage = dict(manifest.get("usage", {}))
                # Extra modules below the root train on, as they did in the run that saved them.
                extras = {key.rpartition(".")[0] for key in manifest["extra"] if key.startswith(prefix)}
                train_whole(handle, [self.get_submodule(path) for path in sorted(extras)])

        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            state_dict = restoring.renamed(state_dict, self)
            hook = restoring.lenient(self, tuple(manifests))
            try:
                return super().load_state_dict(state_dict, *args, **kwargs)
            finally:
                hook.remove()

    Adapted.__name__, Adapted.__qualname__ = cls.__name__, cls.__qualname__
    source: Any = path
    if Path(path).is_dir():  # Lightning reads files only
        source = io.BytesIO()
        torch.save(checkpoint, source)
        source.seek(0)
    model: M = Adapted.load_from_checkpoint(source, **kwargs)
    model.__class__ = cls
    return model
