"""Files and models that do not fit: a typed error that says why and what to do, and an untouched model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoint import manifest_of, read_adapter, stamp
from lightning_peft.checkpoint.files import sha256
from lightning_peft.checkpoint.manifest import sealed
from lightning_peft.errors import CompatibilityError, ConflictError, FormatError, UnknownMethodError
from lightning_peft.strategies import registry
from tests.checkpoint.toys import LORA, Net, Whole, adapted, assert_same, snapshot, x


def save(folder: Path) -> Path:
    lp.save_adapter(adapted(Net()), folder)
    return folder


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the manifest and let its own checksum follow, so that what is refused is the change."""

    def apply(folder: Path) -> None:
        path = folder / "adapter.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(sealed(manifest)))

    return apply


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors and let the manifest's file checksum follow, as somebody who edits a file would."""

    def apply(folder: Path) -> None:
        path = folder / "adapter.safetensors"
        tensors = {k: v.clone() for k, v in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
        edit(lambda m: m["file"].update(sha256=sha256(path)))(folder)

    return apply


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def hf_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")


def sharded(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / ".metadata").write_text("")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (edit_bytes("adapter.safetensors", lambda d: d[: len(d) // 2]), "truncated or corrupted"),
    "empty tensors": (edit_bytes("adapter.safetensors", lambda d: b""), "truncated or corrupted"),
    "bit flipped": (edit_bytes("adapter.safetensors", flip), "truncated or corrupted"),
    "missing tensors": (lambda f: (f / "adapter.safetensors").unlink(), "incomplete"),
    "missing manifest": (lambda f: (f / "adapter.json").unlink(), "holds adapter.safetensors, and no adapter.json"),
    "truncated manifest": (edit_bytes("adapter.json", lambda d: d[: len(d) // 2]), "not JSON"),
    "manifest is not text": (edit_bytes("adapter.json", lambda d: b"\xff\xfe\x00"), "not JSON"),
    "manifest is a list": (edit_bytes("adapter.json", lambda d: b"[1]"), "no format number"),
    "newer format": (edit(lambda m: m.update(format=2)), "format 2.*reads up to 1.*pip install -U"),
    "format zero": (edit(lambda m: m.update(format=0)), "no format number"),
    "format true": (edit(lambda m: m.update(format=True)), "no format number"),
    "unknown field": (edit(lambda m: m.update(quantisation=4)), "unknown field 'quantisation'"),
    "misspelt field": (edit(lambda m: m.update(roots=m.pop("root"))), "unknown field 'roots'. Did you mean 'root'"),
    "missing field": (edit(lambda m: m.pop("tensors")), "lacks the field 'tensors'"),
    "field of another type": (edit(lambda m: m.update(root=None)), "'root' is NoneType, not str"),
    "no dtype": (edit(lambda m: m.update(adapter_dtype="int3")), "adapter_dtype 'int3' is none of"),
    "unknown tensor field": (edit(lambda m: m["tensors"]["up.lora_A"].update(scale=2)), "up.lora_A"),
    "unknown base field": (edit(lambda m: m["base"].update(colour=1)), "base is"),
    "values are words": (edit(lambda m: m["base"]["values"]["up.weight"].update(entries=["a"])), "else than numbers"),
    "newer method": (edit(lambda m: m["methods"].update(lora=2)), "'lora' has version 2.*pip install -U"),
    "method without version": (edit(lambda m: m["methods"].clear()), "version of method 'lora' is None"),
    "unknown option": (edit(lambda m: m["strategy"]["init_args"].update(rnk=2)), "unknown option 'rnk'.*'rank'"),
    "option out of range": (edit(lambda m: m["strategy"]["init_args"].update(rank=0)), "rank=0"),
    "strategy without class": (edit(lambda m: m["strategy"].pop("class_path")), "class_path"),
    "no checksum": (edit(lambda m: m.pop("file")), "incomplete"),
    "file without checksum": (edit(lambda m: m["file"].pop("sha256")), "file is"),
    "edited tensors": (edit_tensors(lambda t: t["up.lora_A"].mul_(2)), "'up.lora_A' has crc32"),
    "missing tensor": (edit_tensors(lambda t: t.pop("up.lora_A")), r"\['up.lora_A'\] missing"),
    "foreign tensor": (edit_tensors(lambda t: t.update(alien=torch.ones(1))), r"\['alien'\] unknown"),
    "other dtype": (edit_tensors(lambda t: t.update({"up.lora_A": t["up.lora_A"].half()})), "dtype float16"),
    "other shape": (edit_tensors(lambda t: t.update({"up.lora_A": t["up.lora_A"][:1].clone()})), "shape"),
    "folder of HF peft": (hf_folder, r"Hugging Face peft.*load_hf.*--to native"),
    "sharded checkpoint": (sharded, "no sharded checkpoint"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folder_is_refused_and_changes_nothing(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    damage(save(tmp_path))
    model = Net()
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        lp.load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path)
    with pytest.raises(FormatError, match=message):
        lp.inspect_adapter(tmp_path)


def test_every_single_bit_of_the_tensor_file_counts(tmp_path: Path) -> None:
    path = save(tmp_path) / "adapter.safetensors"
    data = path.read_bytes()
    for position in range(0, len(data), 37):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(FormatError):
            read_adapter(tmp_path)
    path.write_bytes(data)
    read_adapter(tmp_path)


def test_unknown_method(tmp_path: Path) -> None:
    save(tmp_path)
    edit(lambda m: m["strategy"].update(class_path="Lora2"))(tmp_path)
    with pytest.raises(UnknownMethodError, match="'Lora2'.*Did you mean.*'lora'.*Install the package"):
        lp.load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "nowhere.ckpt"])
def test_missing_path(path: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        lp.load_adapter(Net(), tmp_path / path)


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(12, 12)


OTHER_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other weights": (lambda: Net(seed=1), "weights are other ones.*'(up|down).weight'"),
    "other width": (lambda: Net(width=14), r"structure differs.*'down.weight 4x12'.*'down.weight 4x14'"),
    "one more layer": (Deeper, "has nothing, this model has 'middle.bias 12'"),
    "no such layers": (lambda: nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), "structure differs"),
}


@pytest.mark.parametrize(("make", "message"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_other_base_is_refused_and_not_touched(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    save(tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(CompatibilityError, match=f"another base model.*{message}.*Load the base"):
        lp.load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_whole_module_with_another_base_inside(tmp_path: Path) -> None:
    whole = Whole()
    lp.save_adapter(adapted(whole.net), tmp_path, root="net")
    with pytest.raises(CompatibilityError, match="weights are other ones"):
        lp.load_adapter(Whole(seed=1), tmp_path)


def test_taken_name_leaves_the_first_adapter_alone(tmp_path: Path) -> None:
    save(tmp_path)
    model = Net()
    adapted(model, lp.BitFit())
    before = snapshot(model)
    with pytest.raises(ConflictError, match="installed already"):
        lp.load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_failure_after_the_injection_takes_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    model = Net()
    before = snapshot(model)

    def broken(self: lp.Handle, state: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lp.Handle, "load_state_dict", broken)
    with pytest.raises(KeyboardInterrupt):
        lp.load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_file_of_another_target_set_is_refused_by_its_keys(tmp_path: Path) -> None:
    """A manifest that fits the base but not its own tensors (edited by hand)."""
    save(tmp_path)
    edit(lambda m: m["strategy"]["init_args"]["targets"].update(include=["up"]))(tmp_path)
    model = Net()
    before = snapshot(model)
    with pytest.raises(CompatibilityError, match="unexpected"):
        lp.load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_base_without_values_is_refused_after_saying_that_it_was_not_compared(tmp_path: Path) -> None:
    save(tmp_path)
    with torch.device("meta"):
        model = Net()
    with pytest.warns(UserWarning, match="could not be compared"), pytest.raises(CompatibilityError, match="Materialise"):
        lp.load_adapter(model, tmp_path)
    assert lp.handles(model) == {}
    with pytest.raises(CompatibilityError, match="no values yet"):
        lp.save_adapter(lp.inject(model, LORA), tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------- versions


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the test's own."""
    registry.list_methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def define(version: int, upgrade: bool) -> type[lp.PEFTStrategy]:
    """Version 2 calls `width` what version 1 called `size`, and counts it in pairs."""

    @dataclass(frozen=True, kw_only=True)
    class Toy(lp.PEFTStrategy):
        if version == 1:
            size: int = 4
        else:
            width: int = 9

        def plan(self, anatomy: Any) -> Any:
            return lp.LoRA(rank=self.size if version == 1 else 2 * self.width, targets=["up"]).plan(anatomy)

    if upgrade:
        Toy.upgrade = classmethod(lambda cls, args, saved: {"targets": args["targets"], "width": args["size"] // 2})  # type: ignore
    Toy.__qualname__ = "Toy"
    return lp.register(name="toy", family="additive", summary="", paper="", version=version)(Toy)


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize("composed", [False, True])
def test_older_method_version_is_upgraded(composed: bool, tmp_path: Path) -> None:
    def strategy(cls: type[lp.PEFTStrategy]) -> lp.PEFTStrategy:
        return lp.Compose(parts=(cls(), lp.BitFit())) if composed else cls()

    model = Net()
    lp.save_adapter(adapted(model, strategy(define(1, False))), tmp_path)  # with the default of version 1
    define(2, False)
    with pytest.raises(FormatError, match="files of version 1 cannot be read by version 2"):
        read_adapter(tmp_path)
    new = define(2, True)
    other = Net()
    handle = lp.load_adapter(other, tmp_path)
    assert torch.equal(other(x()), model(x()))
    assert handle.strategy == (lp.Compose(parts=(new(width=2), lp.BitFit())) if composed else new(width=2))


def test_defaults_are_spelled_out_in_the_file(tmp_path: Path) -> None:
    """A default that changes in a later version must not change what an old file means."""
    manifest = manifest_of(adapted(Net()))
    assert manifest["strategy"]["init_args"]["alpha"] == 16.0 == lp.LoRA().alpha


# ---------------------------------------------------------------- checkpoints


def checkpoint() -> dict[str, Any]:
    whole = Whole()
    handle = adapted(whole.net)
    found: dict[str, Any] = {"state_dict": whole.state_dict(), "epoch": 1}
    stamp(found, {"default": manifest_of(handle, root="net")})
    return found


def edit_checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = checkpoint()
        change(found)
        torch.save(found, path)

    return apply


class Custom:
    """What save_hyperparameters puts into a checkpoint when a user passes an object of an own class."""


LIVE = "net.up.peft.default.lora_A"
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no adapter": (edit_checkpoint(lambda c: c.pop("peft")), "holds no adapter.*PEFTCallback"),
    "foreign entry": (edit_checkpoint(lambda c: c.update(peft=[1])), "not one of lightning_peft"),
    "newer": (edit_checkpoint(lambda c: c["peft"].update(format=2)), "format 2.*pip install -U"),
    "newer manifest": (edit_checkpoint(lambda c: c["peft"]["adapters"]["default"].update(format=3)), "format 3"),
    "no state": (edit_checkpoint(lambda c: c.pop("state_dict")), "no state_dict"),
    "tensor gone": (edit_checkpoint(lambda c: c["state_dict"].pop(LIVE)), r"\['up.lora_A'\] missing"),
    "tensor changed": (edit_checkpoint(lambda c: c["state_dict"][LIVE].add_(1)), "'up.lora_A' has crc32"),
    "own class": (edit_checkpoint(lambda c: c.update(hyper_parameters=Custom())), "save_hyperparameters"),
    "truncated": (lambda p: (torch.save(checkpoint(), p), p.write_bytes(p.read_bytes()[:3000])), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "text": (lambda p: p.write_text("hello"), "no checkpoint"),
    "a tensor": (lambda p: torch.save(torch.ones(2), p), "holds Tensor"),
}


@pytest.mark.parametrize(("write", "message"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_broken_checkpoint_is_refused(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write(path)
    model = Whole()
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        lp.load_adapter(model, path)
    assert_same(before, snapshot(model))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit_checkpoint(lambda c: c.update(evil=Evil()))(tmp_path / "a.ckpt")
    with pytest.raises(FormatError):
        lp.load_adapter(Whole(), "a.ckpt")
    assert not (tmp_path / "pwned").exists()
