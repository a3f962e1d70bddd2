"""A Lightning checkpoint back into the user's own class, adapters installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_peft.checkpoint import check_base, check_manifest, manifests_of
from lightning_peft.checkpoint.reading import load_checkpoint
from lightning_peft.strategies.install import inject
from lightning_peft.training import restoring
from lightning_peft.training.adapted_root import find_handle

M = TypeVar("M", bound=nn.Module)


def load_from_checkpoint(cls: type[M], path: str | os.PathLike[str], **kwargs: Any) -> M:
    """Build a LightningModule from a checkpoint that was saved with :class:`PEFTCallback`.

    The module is built as ``cls.load_from_checkpoint`` builds it, so that the base comes from where the class takes it (or from a
    ``checkpoint="full"`` file); then the adapters are installed that the checkpoint describes, and their tensors loaded.

    Args:
        cls: The user's LightningModule class.
        path: The ``.ckpt`` file.
        **kwargs: As for ``cls.load_from_checkpoint``: ``map_location``, and arguments of the class in place of the saved ones.

    Raises:
        FormatError: The file is damaged, or was saved without PEFTCallback.
        CompatibilityError: The class builds another base than the adapter was trained on, or tensors are missing.
    """
    manifests = manifests_of(load_checkpoint(Path(path)), f"'{path}'")

    class Adapted(cls):  # type: ignore[valid-type, misc]
        def configure_model(self) -> None:
            super().configure_model()
            for name, manifest in manifests.items():
                root = self.get_submodule(manifest["root"])
                if find_handle(self, name) is None:
                    strategy = check_manifest(manifest)
                    check_base(root, manifest)
                    inject(root, strategy, name, adapter_dtype=manifest["adapter_dtype"])

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            hook = restoring.lenient(self, tuple(manifests))
            try:
                return super().load_state_dict(*args, **kwargs)
            finally:
                hook.remove()

    Adapted.__name__, Adapted.__qualname__ = cls.__name__, cls.__qualname__
    model: M = Adapted.load_from_checkpoint(path, **kwargs)
    model.__class__ = cls
    return model
