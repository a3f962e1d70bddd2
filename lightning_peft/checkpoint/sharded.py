"""Sharded checkpoints: the folders that FSDP strategies write with ``torch.distributed.checkpoint``, read whole by one process.

torch's own reader unpickles their index without limits. Here nothing but its own records is accepted, and no more is read than the
files hold.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import FormatError
from lightning_peft.untrusted import load_archive

INDEX, REST = ".metadata", "meta.pt"  # torch's index of the pieces, and what Lightning puts beside them
_OPTIMIZER = re.compile(r"optimizer_(\d{1,3})")
_RECORDS = {  # what an index consists of
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {str(t).removeprefix("torch.") for t in vars(torch).values() if isinstance(t, torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath", "Path", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path"},  # Python 3.13
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"the index asks for {module}.{name}")
        return super().find_class(module, name)


def is_sharded(folder: Path) -> bool:
    """Return whether a folder is a sharded checkpoint."""
    return (folder / INDEX).is_file()


class ShardedCheckpoint:
    """A folder of pieces.

    Args:
        folder: Where it is.

    Raises:
        FormatError: It is incomplete, damaged, or its index holds anything but torch's own records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._refused():
            self._index: Any = _Index(io.BytesIO((folder / INDEX).read_bytes())).load()
            self._check()

    @property
    def module_key(self) -> str:
        """What the module's tensors are filed under: ``model`` by FSDP1 of Lightning 2.6, ``state_dict`` by FSDP2."""
        return "model" if any(key.startswith("model.") for key in self._index.state_dict_metadata) else "state_dict"

    def read(self, *, values: bool = True) -> dict[str, Any]:
        """Return the dict that an unsharded run would have saved, on the CPU.

        Args:
            values: Read the tensors; otherwise the module's come without values (meta device), and optimizers not at all.

        Raises:
            FormatError: Files are missing or damaged, or hold objects other than tensors and plain values.
        """
        with self._refused():
            parts = _nested(self._flat(values), self._index.planner_data or {})
            path = self.folder / REST
            rest = load_archive(path) if path.is_file() else {}
            if not isinstance(rest, Mapping):
                raise FormatError(f"'{path}' holds {type(rest).__name__}, not the rest of a Lightning checkpoint.")
            optimizers = sorted((int(found[1]), part) for part in parts if (found := _OPTIMIZER.fullmatch(str(part))))
            states = {"optimizer_states": [numbered(parts[part]) for _, part in optimizers]} if values and optimizers else {}
            return {**rest, "state_dict": parts.get(self.module_key, {}), **states}

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except FormatError:
            raise
        except pickle.UnpicklingError as error:
            raise FormatError(f"'{self.folder}' cannot be loaded safely: {str(error).splitlines()[0]}.") from error
        except BaseException as error:  # damaged bytes can fail anywhere; torch's CheckpointException is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "CheckpointException":
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise FormatError(f"'{self.folder}' is no sharded checkpoint, or is incomplete: {reason}") from error

    def _check(self) -> None:
        tensors = self._tensors().values()
        claimed = sum(math.prod(record.size) * record.properties.dtype.itemsize for record in tensors)
        held = sum(path.stat().st_size for path in self.folder.glob("*.distcp"))
        if claimed > held:
            raise FormatError(
                f"'{self.folder}' is incomplete: its index names {claimed:,} bytes of tensors, its files hold {held:,}."
            )
        for info in self._index.storage_data.values():
            place = Path(info.relative_path)
            if place.name != str(place) or (self.folder / place).is_symlink():
                raise FormatError(f"'{self.folder}': its index points to '{place}', outside the folder.")

    def _tensors(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        known = self._index.state_dict_metadata
        return {key: record for key, record in known.items() if isinstance(record, TensorStorageMetadata)}

    def _flat(self, values: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        index, plain = self._index, {}

        class Reader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
                return index

        class Planner(DefaultLoadPlanner):
            def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
                plain[read_item.dest_index.fqn] = load_archive(value)

        device = "cpu" if values else "meta"
        tensors = self._tensors()
        flat: dict[str, Any] = {k: torch.empty(r.size, dtype=r.properties.dtype, device=device) for k, r in tensors.items()}
        if not values:
            return flat
        flat |= {key: io.BytesIO() for key in index.state_dict_metadata.keys() - tensors.keys()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*intent is to load in a single process")
            load(flat, storage_reader=Reader(self.folder), planner=Planner(flatten_state_dict=False), no_dist=True)
        return flat | plain


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state under the numbers that ``Optimizer.state_dict`` gives parameters, in place of their names."""
    groups = state["param_groups"]
    groups = [groups[i] for i in sorted(groups)] if isinstance(groups, Mapping) else groups
    names = [name for group in groups for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    return {
        "state": {number[name]: dict(values) for name, values in state.get("state", {}).items() if name in number},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }


def _nested(flat: Mapping[str, Any], places: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return values at their places in nested dicts; positions in a list are keys too."""
    whole: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = places.get(key, (key,))
        level: Any = whole
        for step in path:
            level = level.setdefault(step, {})
            if not isinstance(level, dict) or isinstance(step, Tensor):
                raise FormatError(f"the index puts '{key}' below a value.")
        level[last] = value
    return whole
