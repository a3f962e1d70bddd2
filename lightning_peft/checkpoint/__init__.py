"""Adapters as data: files of their own, and what lies about them in a Lightning checkpoint. No pickle, no network."""

from lightning_peft.checkpoint.files import AdapterFile, save_adapter, write_adapter
from lightning_peft.checkpoint.keys import file_keys, live_keys, strip_wrappers
from lightning_peft.checkpoint.loading import inspect_adapter, load_adapter
from lightning_peft.checkpoint.manifest import FORMAT, check_base, check_manifest, entries_of, manifest_of, require_base
from lightning_peft.checkpoint.reading import adapter_of, load_checkpoint, manifests_of, read_adapter, stamp
from lightning_peft.checkpoint.sharded import ShardedCheckpoint, is_sharded

__all__ = [
    "FORMAT",
    "AdapterFile",
    "ShardedCheckpoint",
    "adapter_of",
    "check_base",
    "check_manifest",
    "entries_of",
    "file_keys",
    "inspect_adapter",
    "is_sharded",
    "live_keys",
    "load_adapter",
    "load_checkpoint",
    "manifest_of",
    "manifests_of",
    "read_adapter",
    "require_base",
    "save_adapter",
    "stamp",
    "strip_wrappers",
    "write_adapter",
]
