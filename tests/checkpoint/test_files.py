"""Adapter folders: what goes in comes out, and a save that fails loses nothing."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lightning_peft as lp
from lightning_peft import files
from lightning_peft.checkpoint import adapter_of, manifest_of, read_adapter, stamp, write_adapter
from lightning_peft.errors import FormatError, MergeError
from tests.checkpoint.toys import LORA, STRATEGIES, Net, Whole, adapted, assert_same, snapshot, x


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_round_trip_gives_the_same_output_and_the_same_file(strategy: lp.PEFTStrategy, tmp_path: Path) -> None:
    model = Net()
    handle = adapted(model, strategy)
    assert lp.save_adapter(handle, tmp_path / "a") == tmp_path / "a"
    other = Net()
    before = snapshot(other)
    loaded = lp.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(x()), model(x()))
    assert loaded.strategy == strategy
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    with safe_open(tmp_path / "a" / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == set(handle.state_dict())  # owned tensors only
    # The loaded adapter's own numbers say nothing about the base that it was made for: the file is the same again.
    lp.save_adapter(loaded, tmp_path / "b")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded.remove()
    assert_same(before, snapshot(other))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtype_of_the_adapter_survives(dtype: str, tmp_path: Path) -> None:
    model = Net()
    handle = adapted(model, adapter_dtype=dtype)
    lp.save_adapter(handle, tmp_path)
    other = Net()
    loaded = lp.load_adapter(other, tmp_path)
    assert {t.dtype for t in loaded.state_dict().values()} == {getattr(torch, dtype)}
    assert torch.equal(other(x()), model(x()))


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    handle = adapted(Net(), STRATEGIES["vera"])
    lp.save_adapter(handle, tmp_path)
    state = read_adapter(tmp_path).state
    assert sum(t.numel() for t in state.values()) == 4 * 12 + 12 * 4 + (4 + 12) + (
        4 + 4
    )  # A (r x in), B (out x r); d and b twice


def test_tensors_that_are_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    handle = adapted(Net(), lp.BitFit())
    joint = torch.arange(12.0)
    with torch.no_grad():
        handle.slots[0].tensor().set_(joint)
        handle.slots[1].tensor().set_(joint[:4])
    lp.save_adapter(handle, tmp_path)
    assert torch.equal(read_adapter(tmp_path).state["down.bias"], torch.arange(4.0))


def test_several_handles_have_files_of_their_own(tmp_path: Path) -> None:
    model = Net()
    first = adapted(model, LORA, "first", seed=1)
    second = adapted(model, lp.BitFit(), "second", seed=2)
    lp.save_adapter(first, tmp_path / "first")
    lp.save_adapter(second, tmp_path / "second")
    other = Net()
    lp.load_adapter(other, tmp_path / "first", "first")
    # The second one's base is the model before the first came, which has changed nothing in the base.
    lp.load_adapter(other, tmp_path / "second", "second")
    assert torch.equal(other(x()), model(x()))


def test_order_of_installation_does_not_matter_for_the_base_check(tmp_path: Path) -> None:
    """BitFit has changed the biases when the second adapter is injected; the fingerprint is of the model before."""
    model = Net()
    adapted(model, lp.BitFit(), "biases")
    lp.save_adapter(adapted(model, LORA, "lora"), tmp_path)
    lp.load_adapter(Net(), tmp_path)


def test_nested_root_loads_alone_and_in_the_whole(tmp_path: Path) -> None:
    whole = Whole()
    handle = adapted(whole.net)
    lp.save_adapter(handle, tmp_path / "alone")
    lp.save_adapter(handle, tmp_path / "placed", root="net")
    for folder in ("alone", "placed"):
        net = Net()
        lp.load_adapter(net, tmp_path / folder)
        assert torch.equal(net(x()), whole.net(x()))
    other = Whole()
    handle = lp.load_adapter(other, tmp_path / "placed")
    assert handle.root is other.net
    assert torch.equal(other(x()), whole(x()))


def test_root_that_is_a_sequential(tmp_path: Path) -> None:
    """Its children run in order, the reserved one included."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))

    first, second = model(), model()
    lp.save_adapter(adapted(first, lp.VeRA(rank=4, targets=["0", "2"])), tmp_path)
    lp.load_adapter(second, tmp_path)
    assert torch.equal(second(x()), first(x()))
    assert not torch.equal(second(x()), model()(x()))


def test_extra_tensors_travel_with_the_adapter(tmp_path: Path) -> None:
    whole = Whole(head_seed=1)
    handle = adapted(whole.net)
    extra = {f"head.{k}": v for k, v in whole.head.state_dict().items()}
    lp.save_adapter(handle, tmp_path, root="net", extra_state=extra)
    other = Whole(head_seed=2)
    before = snapshot(other)
    loaded = lp.load_adapter(other, tmp_path)
    assert torch.equal(other(x()), whole(x()))
    loaded.remove()
    assert_same(before, snapshot(other))
    loaded = lp.load_adapter(other, tmp_path)
    loaded.merge()
    loaded.remove()  # a plain fine-tuned model, head included
    torch.testing.assert_close(other(x()), whole(x()))
    with pytest.warns(UserWarning, match="no place.*extra_state"):
        lp.load_adapter(Net(), tmp_path)
    assert set(read_adapter(tmp_path).extra_state) == {"head.weight", "head.bias"}
    short = Whole(classes=2)
    before = snapshot(short)
    with pytest.raises(lp.errors.CompatibilityError, match="number of labels"):
        lp.load_adapter(short, tmp_path)
    assert_same(before, snapshot(short))


def test_head_inside_the_root_may_be_fresh(tmp_path: Path) -> None:
    """A classification head is initialised at random in each process: the file brings it, so it is no part of the base."""
    whole = Whole(head_seed=1)
    handle = adapted(whole, lp.LoRA(rank=2, targets=["net.up"]))
    extra = {f"head.{k}": v for k, v in whole.head.state_dict().items()}
    lp.save_adapter(handle, tmp_path, extra_state=extra)
    other = Whole(head_seed=2)
    lp.load_adapter(other, tmp_path)
    assert torch.equal(other(x()), whole(x()))


def test_tokenizer_writes_itself_into_the_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    lp.save_adapter(adapted(Net()), tmp_path, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("b a b").input_ids == tokenizer("b a b").input_ids
    lp.load_adapter(Net(), tmp_path)
    assert not list(tmp_path.glob(".saving*"))


def test_merged_adapter_is_not_saved(tmp_path: Path) -> None:
    handle = adapted(Net())
    handle.merge()
    with pytest.raises(MergeError, match="unmerge"):
        lp.save_adapter(handle, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_adapter_of_a_replaced_module_is_not_saved(tmp_path: Path) -> None:
    model = Net()
    handle = adapted(model)
    model.down = nn.Linear(12, 4)
    with pytest.raises(lp.errors.ConflictError, match="replaced"):
        lp.save_adapter(handle, tmp_path / "a")


# ---------------------------------------------------------------- atomic


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter, and its output."""
    model = Net()
    lp.save_adapter(adapted(model, seed=1), tmp_path)
    return tmp_path, model(x())


def assert_previous_is_there(saved: tuple[Path, torch.Tensor]) -> None:
    folder, out = saved
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    model = Net()
    lp.load_adapter(model, folder)
    assert torch.equal(model(x()), out)


@pytest.mark.parametrize("limit", [100, 1500])
def test_full_disk_leaves_the_previous_adapter(saved: tuple[Path, torch.Tensor], limit: int) -> None:
    """The kernel refuses to write more: inside the tensor file, and inside the manifest (after 1,500 bytes of tensors)."""
    handle = adapted(Net(), seed=2)
    size = (saved[0] / "adapter.safetensors").stat().st_size
    assert 100 < size < 1500 < (saved[0] / "adapter.json").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            lp.save_adapter(handle, saved[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_previous_is_there(saved)


def test_failing_sync_leaves_the_previous_adapter(saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lp.save_adapter(adapted(Net(), seed=2), saved[0])
    monkeypatch.undo()
    assert_previous_is_there(saved)


def test_failing_tokenizer_leaves_the_previous_adapter(saved: tuple[Path, torch.Tensor]) -> None:
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        lp.save_adapter(adapted(Net(), seed=2), saved[0], tokenizer=Broken())
    assert_previous_is_there(saved)


def test_everything_is_synced_before_anything_moves(saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, move = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda p: (steps.append(f"sync {p.name}"), sync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(f"move {Path(b).name}"), move(a, b)))
    lp.save_adapter(adapted(Net(), seed=2), saved[0])
    assert sorted(steps[:2]) == ["sync adapter.json", "sync adapter.safetensors"]
    assert steps[2:] == ["move adapter.safetensors", "move adapter.json", f"sync {saved[0].name}"]


@pytest.mark.parametrize("crash_at", [1, 2])
def test_killed_between_the_moves(saved: tuple[Path, torch.Tensor], crash_at: int) -> None:
    """Killed before the first move: the previous adapter. Between the two: a state that is refused, never a wrong adapter."""
    code = f"""
import os, sys
sys.path.insert(0, {os.getcwd()!r})
import lightning_peft as lp
from tests.checkpoint.toys import *
move, moves = os.replace, []
def replace(a, b):
    moves.append(b)
    if len(moves) == {crash_at}:
        os._exit(9)
    move(a, b)
os.replace = replace
lp.save_adapter(adapted(Net(), seed=2), {str(saved[0])!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 9
    model = Net()
    if crash_at == 1:
        lp.load_adapter(model, saved[0])
        assert torch.equal(model(x()), saved[1])
    else:
        with pytest.raises(FormatError, match="interrupted"):
            lp.load_adapter(model, saved[0])
    # The next save puts things right.
    lp.save_adapter(adapted(Net(), seed=3), saved[0])
    lp.load_adapter(Net(), saved[0])


def test_adapter_from_a_checkpoint_becomes_a_folder(tmp_path: Path) -> None:
    whole = Whole()
    handle = adapted(whole.net)
    checkpoint = {"state_dict": whole.state_dict()}
    stamp(checkpoint, {"default": manifest_of(handle, root="net")})
    write_adapter(adapter_of(checkpoint), tmp_path)
    other = Whole()
    lp.load_adapter(other, tmp_path)
    assert torch.equal(other(x()), whole(x()))
    assert "file" not in checkpoint["peft"]["adapters"]["default"]
    assert "file" in json.loads((tmp_path / "adapter.json").read_text())
