"""Folders of pieces, as FSDP strategies write them: read whole by one process, and refused when they are not what they seem."""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_peft.checkpoint import ShardedCheckpoint, is_sharded, read_adapter
from lightning_peft.errors import FormatError

A, B = torch.randn(3, 4), torch.randn(5, dtype=torch.float64).bfloat16()
REST = {"epoch": 3, "callbacks": {"x": torch.ones(2)}}


def state(module: str = "state_dict") -> dict[str, Any]:
    moments = {"net.a": {"exp_avg": A * 2, "step": torch.tensor(3.0)}, "net.b": {"exp_avg": B}}
    groups = [{"params": ["net.b"], "lr": 0.1, "betas": (0.9, 0.99)}, {"params": ["net.a"], "lr": 0.2, "foreach": None}]
    return {module: {"net.a": A, "net.b": B}, "optimizer_0": {"state": moments, "param_groups": groups}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pieces.ckpt", state())


def write(folder: Path, content: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intent is to save in a single process")
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    torch.save(REST, folder / "meta.pt")
    return folder


@pytest.mark.parametrize("module", ["state_dict", "model"])
def test_it_reads_as_the_file_of_an_unsharded_run(module: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "pieces", state(module))
    assert is_sharded(folder)
    pieces = ShardedCheckpoint(folder)
    assert pieces.module_key == module
    found = pieces.read()
    assert found["epoch"] == 3
    assert found["state_dict"].keys() == {"net.a", "net.b"}
    assert found["state_dict"]["net.a"].equal(A)
    assert found["state_dict"]["net.b"].equal(B)
    (optimizer,) = found["optimizer_states"]
    assert optimizer["param_groups"] == [
        {"params": [0], "lr": 0.1, "betas": (0.9, 0.99)}, {"params": [1], "lr": 0.2, "foreach": None}
    ]  # fmt: skip
    assert optimizer["state"][1]["exp_avg"].equal(A * 2)
    assert optimizer["state"][1]["step"] == 3.0
    assert optimizer["state"][0]["exp_avg"].equal(B)

    outline = pieces.read(values=False)
    assert "optimizer_states" not in outline
    assert {k: (v.shape, v.is_meta) for k, v in outline["state_dict"].items()} == {
        "net.a": ((3, 4), True), "net.b": ((5,), True)
    }  # fmt: skip


class Attack:
    """Leaves a file behind where it is unpickled without limits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def edit_index(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        change(index)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return edit


def attack_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(folder / "attacked")))


def attack_rest(folder: Path) -> None:
    torch.save({"x": Attack(folder / "attacked")}, folder / "meta.pt")


def attack_value(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    content = state()
    content["optimizer_0"]["param_groups"][0]["lr"] = Attack(folder / "attacked")
    write(folder, content)
    if (folder / "attacked").exists():
        (folder / "attacked").rmdir()


def huge(index: Any) -> None:
    record = index.state_dict_metadata["state_dict.net.a"]
    record.size = torch.Size((2**40, 4))


def outside(index: Any) -> None:
    for key, info in index.storage_data.items():
        index.storage_data[key] = dataclasses.replace(info, relative_path="../elsewhere")


def link(folder: Path) -> None:
    piece = next(folder.glob("*.distcp"))
    piece.rename(folder.parent / "elsewhere")
    piece.symlink_to(folder.parent / "elsewhere")


def truncate(pattern: str) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (attack_index, "loaded safely"),
        (attack_rest, "loaded safely"),
        (attack_value, "loaded safely|incomplete"),
        (edit_index(huge), "names .* bytes of tensors"),
        (edit_index(outside), "outside the folder"),
        (link, "outside the folder"),
        (truncate(".metadata"), "no sharded checkpoint|loaded safely"),
        (truncate("*.distcp"), "incomplete"),
        (truncate("meta.pt"), "incomplete|safely"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "incomplete"),
        (lambda folder: torch.save([1], folder / "meta.pt"), "holds list"),
    ],
)
def test_damaged_and_hostile_folders_are_refused(damage: Callable[[Path], object], words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=words):
        ShardedCheckpoint(folder).read()
    assert not (folder / "attacked").exists()


def test_a_folder_without_an_adapter_says_so(folder: Path) -> None:
    with pytest.raises(FormatError, match="holds no adapter"):
        read_adapter(folder)
