"""A folder in the format of Hugging Face peft: ``adapter_config.json`` and ``adapter_model.safetensors``, written whole, read as untrusted.

A file of others is refused unless every field of its config is known, every tensor has its place, and both are within the bounds of
:mod:`lightning_peft.untrusted`. ``adapter_model.bin``, the pickle of before 2023, is not read: peft itself rewrites it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft.errors import ConfigError, DependencyError, FormatError
from lightning_peft.files import staged
from lightning_peft.untrusted import check_safetensors, inside, parse_json, read_text

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class HFFile:
    """What a folder holds.

    Args:
        config: The fields of ``adapter_config.json``.
        tensors: The tensors, on the CPU, by the key in the file.
        where: Names the folder in messages.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    where: str

    def grouped(self, suffixes: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return the tensors of adapted modules by path and suffix, and the others by key, both without ``base_model.model.``."""
        layers: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            plain = key.removeprefix(PREFIX)
            suffix = next((s for s in suffixes if key.startswith(PREFIX) and plain.endswith(f".{s}")), None)
            if suffix is None:
                rest[plain] = tensor
            else:
                layers.setdefault(plain.removesuffix(f".{suffix}"), {})[suffix] = tensor
        return layers, rest


def is_hf_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds an adapter in the format of HF peft."""
    return (Path(path) / CONFIG).is_file()


def read_folder(folder: Path) -> HFFile:
    """Read an adapter folder of HF peft.

    Raises:
        FormatError: A file is missing, damaged, leads out of the folder, or is beyond the bounds.
    """
    if not folder.is_dir():
        raise FormatError(f"'{folder}' is no folder; give the one that holds {CONFIG}.")
    described, path = inside(folder, CONFIG), inside(folder, TENSORS)
    if not described.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise FormatError(f"'{folder}' is no adapter folder of HF peft: it holds {found}, and no {CONFIG}.")
    config = parse_json(read_text(described), f"'{described}'")
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError(f"'{described}' names no peft_type; it is no config of HF peft.")
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise FormatError(
                f"'{folder}' holds {PICKLE}, a pickle, which is not read. Rewrite it with peft: load it there and call save_pretrained, "
                f"which writes {TENSORS}."
            )
        raise FormatError(f"'{folder}' holds {CONFIG} but no {TENSORS}; the copy is incomplete.")
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"'{path}' is not a safetensors file: {error}.") from error
    odd = next((key for key, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if odd is not None:
        raise FormatError(f"'{path}': '{odd}' holds {tensors[odd].dtype}, and an adapter is made of floating-point numbers.")
    return HFFile(config, tensors, f"'{folder}'")


def write_folder(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter folder that HF peft loads, in place of the one that may lie there; a failure leaves that one.

    Raises:
        OSError: It cannot be written.
    """
    # One storage each: safetensors refuses tensors that share one.
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with staged(folder, last=(TENSORS, CONFIG)) as staging:
        try:
            save_file(plain, staging / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write '{Path(folder) / TENSORS}': {error}.") from error
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of an adapter: the given one, or a snapshot of the repository on the Hugging Face hub.

    Args:
        source: A folder, or the id of a repository (``user/name``).
        revision: Branch, tag or commit on the hub.

    Raises:
        FormatError: There is neither such a folder nor such a repository, or the hub cannot be reached.
        ConfigError: A revision of a folder.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(f"revision={revision!r}, but '{source}' is a folder of this machine, which has none.")
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FormatError(f"'{name}' is no folder, and no id of a repository on the hub, such as 'user/name'.")
    hub: Any = _hub()
    try:
        # Nothing but data is fetched, whatever else the repository holds.
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's errors come from four packages
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"'{name}' is no folder, and cannot be fetched from the Hugging Face hub: {reason}") from error


def push_folder(folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str | None) -> str:
    """Upload a folder to the hub, making the repository if needed, and return its address.

    Raises:
        DependencyError: huggingface_hub is missing.
        FormatError: The hub refuses it or cannot be reached.
    """
    hub: Any = _hub()
    api = hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo_id, revision=revision, commit_message=message)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"'{folder}' cannot be pushed to '{repo_id}': {reason}") from error
    return f"https://huggingface.co/{repo_id}"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError("the Hugging Face hub needs the package huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub
