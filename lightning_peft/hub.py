"""Adapter folders on the Hugging Face hub. Nothing here runs, and nothing is imported, unless a repository is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError, DependencyError, FormatError


def local_copy(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return a path of this machine: the given one, or a snapshot of the repository on the hub that is called so.

    Args:
        source: A path, or the id of a repository (``user/name``). What exists here is not looked for on the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        FormatError: There is no such repository, or the hub cannot be reached.
        ConfigError: A revision of what is no repository.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        if revision is not None:
            raise ConfigError(f"revision={revision!r}, but '{source}' is no id of a repository on the hub, such as 'user/name'.")
        return path
    hub: Any = _hub()
    try:
        # Nothing but data is fetched, whatever else the repository holds.
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's errors come from four packages
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"'{name}' is not here, and cannot be fetched from the Hugging Face hub: {reason}") from error


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
