"""The adapter folders that lie ready at the end of ``fit``: ``adapter/last`` and ``adapter/best``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.checkpoint import live_keys, read_adapter, save_adapter, strip_wrappers, write_adapter
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.adapted_root import other_keys, path_of

if TYPE_CHECKING:
    from lightning_peft.training.trainer_hooks import Owner


def folder_of(trainer: Any, name: str, given: bool | str) -> Path:
    """Return the folder for the exports of one adapter.

    ``<log_dir>/adapter`` beside the logger's files and ``checkpoints``, or ``<default_root_dir>/adapter`` without a logger; with
    one more level for adapters that are not called ``default``.
    """
    base = Path(given) if isinstance(given, str) else Path(trainer.log_dir or trainer.default_root_dir) / "adapter"
    return base if name == "default" else base / name


def tokenizer_of(trainer: Any, module: Any) -> Any:
    """Return the tokenizer of the LightningModule or of the data module, if one can save itself."""
    for holder in (module, trainer.datamodule):
        tokenizer = getattr(holder, "tokenizer", None)
        if hasattr(tokenizer, "save_pretrained"):
            return tokenizer
    return None


def export_last(
    folder: Path,
    trainer: Any,
    module: Any,
    handle: Handle,
    installed: list[tuple[Owner, Handle]],
    state: Mapping[str, Tensor],
) -> Path:
    """Write the adapter as it is at the end of training; ``state`` holds what has trained, by key in the module."""
    root = strip_wrappers(path_of(module, handle.root) or "")
    return save_adapter(
        handle,
        folder / "last",
        tokenizer=tokenizer_of(trainer, module),
        state={file: state[key] for file, key in live_keys(handle, root).items()},
        extra_state={key: state[key] for key in sorted(other_keys(module, installed)) if key in state},
        root=root,
    )


def export_best(folder: Path, trainer: Any, module: Any, name: str) -> Path | None:
    """Write the adapter of the best checkpoint, if a checkpoint callback kept one as a file."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best or not Path(best).exists():
        return None
    adapter = read_adapter(best, name)
    return write_adapter(adapter, folder / "best", tokenizer=tokenizer_of(trainer, module))
