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

from lightning_peft.errors import FormatError
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
