"""Files made to do harm: each kind of attack ends in a typed error, before anything is allocated, followed, run or changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.checkpoint import adapter_of, check_manifest, manifest_of, read_adapter, stamp
from lightning_peft.checkpoint.files import sha256
from lightning_peft.checkpoint.manifest import MOST_STRATEGIES, sealed
from lightning_peft.errors import FormatError, PEFTError, UnknownMethodError, did_you_mean
from lightning_peft.surgery.targets import MOST_LAYERS
from lightning_peft.untrusted import MAX_BYTES, MAX_DEPTH, MAX_VALUES, check_plain, parse_json
from tests.checkpoint.toys import LORA, STRATEGIES, Net, Whole, adapted, assert_same, snapshot, x
from tests.training import tiny

TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"


def save(folder: Path, strategy: Any = LORA) -> Path:
    return lp.save_adapter(adapted(Net(), strategy), folder)


def craft(folder: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change a manifest as somebody would who knows the format: all its checksums fit."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["file"]["sha256"] = sha256(folder / TENSORS)
    path.write_text(json.dumps(sealed(manifest) if seal else manifest))


def refused(folder: Path, message: str, error: type[PEFTError] = FormatError) -> None:
    """Show that nobody reads the folder, and that a model is left as it was."""
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lp.load_adapter(model, folder)
    assert_same(before, snapshot(model))
    assert lp.handles(model) == {}


# ---------------------------------------------------------------- the manifest's own checksum


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in leaves(child, (*path, key))]
    if isinstance(value, list):
        return [leaf for i, child in enumerate(value) for leaf in leaves(child, (*path, i))]
    return [path]


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_value_of_a_manifest_counts(strategy: Any, tmp_path: Path) -> None:
    save(tmp_path, strategy)
    text = (tmp_path / MANIFEST).read_text()
    for path in leaves(json.loads(text)):
        manifest = json.loads(text)
        *outer, last = path
        holder = manifest
        for step in outer:
            holder = holder[step]
        value = holder[last]
        holder[last] = {str: f"{value}x", int: 17, float: 17.0, bool: not value, type(None): "lora"}[type(value)]
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(FormatError):
            read_adapter(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(json.loads(text)))  # other spaces, the same values
    read_adapter(tmp_path)


def test_an_alpha_changed_in_the_file_is_noticed(tmp_path: Path) -> None:
    save(tmp_path)
    craft(tmp_path, lambda m: m["strategy"]["init_args"].update(alpha=17.0), seal=False)
    refused(tmp_path, "not as it was written")
    whole = Whole()
    found: dict[str, Any] = {"state_dict": whole.state_dict()}
    stamp(found, {"default": manifest_of(adapted(whole.net), root="net")})
    found["state_dict"] = whole.state_dict()
    adapter_of(found)
    found["peft"]["adapters"]["default"]["strategy"]["init_args"]["alpha"] = 17.0
    with pytest.raises(FormatError, match="not as it was written"):
        adapter_of(found)


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    save(tmp_path)
    craft(tmp_path, lambda m: m.pop("checksum"), seal=False)
    lp.load_adapter(Net(), tmp_path)


def test_the_checksum_is_the_same_in_a_folder_and_in_a_checkpoint(tmp_path: Path) -> None:
    handle = adapted(Net())
    manifest = sealed({**manifest_of(handle), "usage": {"labels": ("ä", "b"), "rate": 1e-7, "n": 2**40, "none": None}})
    again = json.loads(json.dumps(manifest, ensure_ascii=False))
    torch.save(manifest, tmp_path / "m")
    for copy in (again, torch.load(tmp_path / "m", weights_only=True), dict(reversed(manifest.items()))):
        check_manifest(copy)
        assert sealed(copy)["checksum"] == manifest["checksum"]


# ---------------------------------------------------------------- JSON

TEXTS: dict[str, tuple[str, str]] = {
    "deep lists": ("[" * 100_000, "deeper than"),
    "deep lists that end": ("[" * 100_000 + "]" * 100_000, "deeper than"),
    "deep objects": ('{"a":' * 20_000 + "1" + "}" * 20_000, "deeper than"),
    "one level too deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deeper than"),
    "too many values": ("[" + "0," * MAX_VALUES + "0]", "more than"),
    "too many lists": ("[" + "[]," * (MAX_VALUES // 2 + 1) + "0]", "more than"),
    "integer of 10,000 digits": ("[" + "1" * 10_000 + "]", "not JSON"),
    "integer of 30 digits": ('{"format": ' + "1" * 30 + "}", "integer of"),
    "a key twice": ('{"format": 1, "format": 1}', "'format' stands there twice"),
    "half a character": ('{"format": "\\ud800"}', "half of a character"),
    "two values": ("{} {}", "not JSON"),
    "nothing": ("", "not JSON"),
    "a byte order mark": ("\ufeff{}", "not JSON"),
    "a zero byte": ('{"a\0": 1}', "not JSON"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_json_is_bounded(text: str, message: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    refused(tmp_path, message)


def test_a_file_of_any_length_is_not_read_whole(tmp_path: Path) -> None:
    save(tmp_path)
    os.truncate(tmp_path / MANIFEST, 1 << 40)  # sparse
    tracemalloc.start()
    try:
        refused(tmp_path, "more than 64 MiB")
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BYTES
    finally:
        tracemalloc.stop()


def test_too_many_values_are_refused_before_they_are_made() -> None:
    text = "[" + "[]," * MAX_VALUES + "0]"
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="more than"):
            parse_json(text, "it")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_depth_and_numbers_at_the_bounds_are_read() -> None:
    inner: Any = 2**63 - 1
    for _ in range(MAX_DEPTH):
        inner = [inner]
    assert parse_json(json.dumps(inner), "it") == inner
    assert parse_json("[-9223372036854775808, 1e308]", "it") == [-(2**63), 1e308]
    with pytest.raises(FormatError, match="integer of 64 bits"):
        parse_json("[9223372036854775808]", "it")


def test_values_that_hold_themselves_or_one_another_many_times() -> None:
    """What JSON cannot say and a pickle can."""
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(FormatError, match="deeper than"):
        check_plain(circle, "it")
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    with pytest.raises(FormatError, match="more than"):
        check_plain(laughs, "it")
    with pytest.raises(FormatError, match="characters"):
        check_plain(["x" * MAX_BYTES] * 2, "it")
    for foreign in ({1: 2}, torch.ones(1), {1, 2}, b"bytes", 1j):
        with pytest.raises(FormatError, match="keys other than texts|no plain value"):
            check_plain(foreign, "it")


def test_no_suggestion_is_searched_for_a_name_of_megabytes() -> None:
    assert did_you_mean("lorra", ["lora"])
    assert did_you_mean("lora" * 10**7, ["lora"]) == ""


# ---------------------------------------------------------------- manifests whose checksums fit


def strategy(**args: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["strategy"]["init_args"].update(args)


def method(name: str, **args: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m.update(strategy={"class_path": name, "init_args": args}, methods={name.lower(): 1})


def nested(depth: int) -> Callable[[dict[str, Any]], object]:
    def apply(manifest: dict[str, Any]) -> None:
        for _ in range(depth):
            parts = [manifest["strategy"], {"class_path": "BitFit", "init_args": {}}]
            manifest["strategy"] = {"class_path": "Compose", "init_args": {"parts": parts}}
        manifest["methods"].update(compose=1, bitfit=1)

    return apply


def tensor(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["tensors"]["up.lora_A"].update(fields)


CRAFTED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "vast rank": (strategy(rank=10**12), "rank=1000000000000 is beyond|cannot be read"),
    "rank of 100 digits": (strategy(rank=10**100), "integer of"),
    "infinite alpha": (strategy(alpha=float("inf")), "holds the number inf"),
    "alpha that is no number": (strategy(alpha=float("nan")), "holds the number nan"),
    "vast shared matrices": (method("VeRA", rank=10**9, targets=["up"]), "finds no room"),
    "matrices a little larger": (method("VeRA", rank=8, targets=["up"]), "finds no room"),
    "vast range of layers": (strategy(targets={"include": ["up"], "layers": ["0-99999999999"]}), "layers"),
    "range as long as allowed": (strategy(targets={"include": ["up"], "layers": [f"0-{MOST_LAYERS}"]}), "do not exist"),
    "many patterns": (strategy(rank_per_target={f"m{i}": 2 for i in range(20_000)}), "more than 10,000 values"),
    "compositions in one another": (nested(25), "deeper than"),
    "a wide composition": (method("Compose", parts=["bitfit"] * (MOST_STRATEGIES + 1)), "the strategy|has no attribute"),
    "a part that is no strategy": (method("Compose", parts=[1, 2]), "the strategy"),
    "arguments that are a list": (lambda m: m["strategy"].update(init_args=[1]), "the strategy"),
    "a pattern that is none": (strategy(targets=["re:("]), "no regular expression"),
    "code as a class": (lambda m: m["strategy"].update(class_path="os.system"), "unknown method 'os.system'"),
    "dunder as a class": (lambda m: m["strategy"].update(class_path="__import__"), "unknown method"),
    "class that is a number": (lambda m: m["strategy"].update(class_path=7), "unknown method '7'"),
    "vast tensor": (tensor(shape=[2**62, 2**62]), "has shape"),
    "negative shape": (tensor(shape=[-2, 8]), "has the shape"),
    "shape of fractions": (tensor(shape=[2.0, 8]), "has the shape"),
    "shape of lists": (tensor(shape=[[2], 8]), "has the shape"),
    "dtype of words": (tensor(dtype="__class__"), "has dtype"),
    "checksum of another type": (tensor(crc32="1"), "crc32"),
    "counts of words": (lambda m: m["base"]["structure"]["tensors"].update(a="b"), "counts something else"),
    "tensor outside": (lambda m: m["tensors"].update({"../../etc/passwd": m["tensors"].pop("up.lora_A")}), "missing"),
    "root of another place": (lambda m: m.update(root="../../etc"), ""),
    "checksum of nothing": (lambda m: m["base"].update(structure={"hash": "", "tensors": {}}), "structure differs"),
    "numbers without end": (
        lambda m: [v.update(stored="int8", entries=[1e308] * 8) for v in m["base"]["values"].values()], "weights are other ones"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CRAFTED.values(), ids=CRAFTED)
def test_crafted_manifest(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    save(tmp_path)
    craft(tmp_path, change)
    if message:
        refused(tmp_path, message, PEFTError)
    else:
        lp.load_adapter(Net(), tmp_path)


class Sly(Net):
    @property
    def trainer(self) -> nn.Module:
        raise RuntimeError("not attached")


@pytest.mark.parametrize("root", ["trainer", "__class__", "a..b", "up.weight", "é\x1b[31m", "." * 10_000])
def test_a_root_of_any_name_runs_nothing(root: str, tmp_path: Path) -> None:
    save(tmp_path)
    craft(tmp_path, lambda m: m.update(root=root))
    model = Sly()
    handle = lp.load_adapter(model, tmp_path)
    assert handle.root is model  # there is nothing of that name, and the model itself fits


def test_prompts_take_no_more_than_the_file_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.llama())
    lp.save_adapter(lp.inject(model, lp.PromptTuning(num_virtual_tokens=3)), tmp_path)
    lp.handles(model)["default"].remove()
    craft(tmp_path, strategy(num_virtual_tokens=10**12))
    with pytest.raises(FormatError, match="finds no room"):
        lp.load_adapter(model, tmp_path)
    craft(tmp_path, strategy(num_virtual_tokens=3))
    lp.load_adapter(model, tmp_path)


def test_unknown_class_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("open('pwned', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a")
    craft(tmp_path / "a", lambda m: m["strategy"].update(class_path="evil_module.Strategy"))
    refused(tmp_path / "a", "unknown method", UnknownMethodError)
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
@pytest.mark.parametrize("kind", ["absolute", "relative", "dangling", "circle", "through a folder"])
def test_links_out_of_the_folder_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    folder, outside = save(tmp_path / "a"), tmp_path / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    content = (outside / name).read_bytes()
    target: Path = {
        "absolute": outside / name,
        "relative": Path("..", "outside", name),
        "dangling": tmp_path / "nowhere",
        "circle": folder / name,
        "through a folder": folder / "in" / name,
    }[kind]
    if kind == "through a folder":
        (folder / "in").symlink_to(outside)
    (folder / name).symlink_to(target)
    refused(folder, "leads out of its folder|no file that can be opened")
    assert (outside / name).read_bytes() == content


def test_links_inside_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    (folder / TENSORS).rename(folder / "real")
    (folder / TENSORS).symlink_to("real")
    (tmp_path / "b").symlink_to(folder)
    read_adapter(folder)
    read_adapter(tmp_path / "b")


def test_a_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot_folder = save(cache / "snapshots" / "0123" / "last")
    (cache / "blobs").mkdir()
    for name in (TENSORS, MANIFEST):
        (snapshot_folder / name).rename(cache / "blobs" / name)
        (snapshot_folder / name).symlink_to(Path("..", "..", "..", "blobs", name))
    read_adapter(snapshot_folder)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_what_is_no_file_is_not_opened(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    refused(tmp_path, "incomplete|no adapter.json")


class Writer:
    """A tokenizer that writes into a folder of its own."""

    def save_pretrained(self, save_directory: str) -> None:
        (Path(save_directory) / "templates").mkdir()
        (Path(save_directory) / "templates" / "a.jinja").write_text("new")


def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jinja").write_text("old")
    (outside / MANIFEST).write_text("old")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / MANIFEST).symlink_to(outside / MANIFEST)
    lp.save_adapter(adapted(Net()), folder)  # in place of the link
    read_adapter(folder)
    before = sorted(p.name for p in folder.iterdir())
    (folder / "templates").symlink_to(outside)
    with pytest.raises(FormatError, match="leads out"):
        lp.save_adapter(adapted(Net()), folder, tokenizer=Writer())
    assert (outside / MANIFEST).read_text() == (outside / "a.jinja").read_text() == "old"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*before, "templates"])


# ---------------------------------------------------------------- safetensors headers


def write_tensors(folder: Path, header: Any, body: bytes, *, length: int | None = None) -> None:
    """Write a tensor file byte by byte; the manifest's checksum of it fits."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    craft(folder, lambda m: None)


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / TENSORS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, data[8 + length :]


def offsets(first: int, last: int) -> Callable[[dict[str, Any]], object]:
    return lambda h: h["up.lora_A"].update(data_offsets=[first, last])


def field(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda h: h["up.lora_A"].update(fields)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "overlapping": lambda h: h["up.lora_A"].update(data_offsets=h["up.lora_B"]["data_offsets"], shape=h["up.lora_B"]["shape"]),
    "overlapping by halves": lambda h: h["up.lora_A"].update(data_offsets=[o - 8 for o in h["up.lora_A"]["data_offsets"]]),
    "out of range": offsets(10**9, 10**9 + 64),
    "far out of range": offsets(2**64 - 64, 2**64 - 1),
    "beyond 64 bits": offsets(2**64, 2**64 + 64),
    "negative": offsets(-64, 0),
    "backwards": offsets(64, 0),
    "too short": lambda h: h["up.lora_A"]["data_offsets"].__setitem__(1, h["up.lora_A"]["data_offsets"][1] - 4),
    "a hole": lambda h: h.pop("up.lora_A"),
    "three offsets": field(data_offsets=[0, 64, 64]),
    "fractional offsets": field(data_offsets=[0.0, 64.0]),
    "shape that does not fit": field(shape=[3, 8]),
    "negative side": field(shape=[-2, -8]),
    "sides that overflow": field(shape=[2**32, 2**32, 2**32]),
    "sides that overflow to the right number": field(shape=[2**63, 2, 16]),
    "unknown dtype": field(dtype="F31"),
    "dtype that does not fit": field(dtype="F64"),
    "dtype that is a number": field(dtype=3),
    "no shape": lambda h: h["up.lora_A"].pop("shape"),
    "a record that is a list": lambda h: h.update({"up.lora_A": [1]}),
    "metadata of numbers": lambda h: h.update(__metadata__={"a": 1}),
    "nested metadata": lambda h: h.update(__metadata__={"a": {"b": "c"}}),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_crafted_header(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    save(tmp_path)
    header, body = parts(tmp_path)
    change(header)
    write_tensors(tmp_path, header, body)
    refused(tmp_path, TENSORS)


def test_the_header_is_bounded_and_says_everything_once(tmp_path: Path) -> None:
    save(tmp_path)
    header, body = parts(tmp_path)
    text = json.dumps(header)
    good = text.encode()
    write_tensors(tmp_path, header, body)
    read_adapter(tmp_path)  # what is changed below is what is refused
    record = json.dumps(header["up.lora_A"])
    twice = (text[:-1] + f', "up.lora_A": {record}' + "}").encode()
    cases: dict[str, tuple[bytes, bytes, int | None]] = {
        "stands there twice": (twice, body, None),
        "deeper than": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", body, None),
        "would have 1,000,000 bytes": (good, body, 1_000_000),
        "would have 9,223,372,036,854,775,808": (good, body, 2**63),
        "not JSON": (b"\xff" + good, body, None),
        "safetensors file": (good, body + b"\0" * 8, None),
        "is no safetensors|not a safetensors": (good, body[:-4], None),
        "is not JSON": (b"", b"", None),
    }
    for message, (head, tail, length) in cases.items():
        write_tensors(tmp_path, head, tail, length=length)
        refused(tmp_path, message)
    (tmp_path / TENSORS).write_bytes(b"\1")
    craft(tmp_path, lambda m: None)
    refused(tmp_path, "of 1")


def test_metadata_says_nothing(tmp_path: Path) -> None:
    save(tmp_path)
    header, body = parts(tmp_path)
    write_tensors(tmp_path, {"__metadata__": {"format": "evil", "a": "x" * 10_000}, **header}, body)
    state = read_adapter(tmp_path).state
    assert set(state) == set(header)


# ---------------------------------------------------------------- Lightning checkpoints

LIVE = "net.up.peft.default.lora_A"


def checkpoint(change: Callable[[dict[str, Any]], object] = lambda c: None) -> dict[str, Any]:
    """Return what the callback writes, changed by somebody who knows the format."""
    whole = Whole()
    handle = adapted(whole.net)
    found: dict[str, Any] = {"state_dict": whole.state_dict(), "epoch": 1}
    stamp(found, {"default": manifest_of(handle, root="net")})
    change(found)
    for manifest in found["peft"]["adapters"].values():
        if isinstance(manifest, dict):
            manifest.pop("checksum")  # it would take as long to compute for a forged manifest as to be harmed by it
    return found


def of_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda c: change(c["peft"]["adapters"]["default"])


def of_tensor(value: Any, **record: Any) -> Callable[[dict[str, Any]], object]:
    def apply(found: dict[str, Any]) -> None:
        found["state_dict"][LIVE] = value
        found["peft"]["adapters"]["default"]["tensors"]["up.lora_A"].update(record)

    return apply


def laughing() -> list[Any]:
    value: list[Any] = ["ha"]
    for _ in range(40):
        value = [value, value]
    return value


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "manifest in itself": (of_manifest(lambda m: m.update(usage={"a": m})), "deeper than"),
    "a billion laughs": (of_manifest(lambda m: m.update(usage={"a": laughing()})), "more than"),
    "a tensor in the manifest": (of_manifest(lambda m: m["base"].update(values={"a": torch.ones(1)})), "holds a Tensor"),
    "manifest that is a tensor": (lambda c: c["peft"]["adapters"].update(default=torch.ones(1)), "holds a Tensor"),
    "names that are numbers": (lambda c: c["peft"].update(adapters={1: 2}), "keys other than texts"),
    "one number many times": (
        of_tensor(torch.zeros(1).expand(10**11), shape=[10**11], dtype="float32"), "fewer bytes than entries"
    ),
    "a list for a tensor": (of_tensor([1.0]), "no plain tensor, but list"),
    "a sparse tensor": (of_tensor(torch.eye(2).to_sparse()), "no plain tensor"),
    "a tensor without values": (of_tensor(torch.empty(10**11, device="meta"), shape=[10**11]), "no plain tensor"),
    "complex numbers": (of_tensor(torch.ones(2, 8, dtype=torch.complex64)), "has dtype"),
    "conjugates": (
        of_tensor(torch.ones(2, 8, dtype=torch.complex64).conj(), dtype="complex64"), "cannot be read|has crc32"
    ),
    "keys that are numbers": (lambda c: c["state_dict"].update({5: torch.ones(1)}), "has no state_dict"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_crafted_checkpoint(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint(change), path)
    model = Whole()
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        lp.load_adapter(model, path)
    assert_same(before, snapshot(model))


def repack(
    path: Path, change: Callable[[str, bytes], bytes] = lambda name, data: data, compression: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def saved_checkpoint(folder: Path) -> Path:
    path = folder / "a.ckpt"
    torch.save(checkpoint(), path)
    return path


def test_a_repacked_checkpoint_is_read(tmp_path: Path) -> None:
    """So that what the next tests refuse is refused for what they change."""
    path = saved_checkpoint(tmp_path)
    repack(path)
    read_adapter(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = saved_checkpoint(tmp_path)
    repack(path, lambda name, data: b"\0" * (50 << 20) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(FormatError, match="claims 52,"):
        read_adapter(path)


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved_checkpoint(tmp_path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="or is compressed"):
        read_adapter(path)


def test_records_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """A directory with one record a hundred times unpacks to a hundred times its size."""
    path = saved_checkpoint(tmp_path)
    repack(path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start, names = archive.start_dir, len(archive.namelist())
    directory = data[start : data.rfind(b"PK\5\6")]
    many = directory * 400
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, names * 400, names * 400, len(many), start, 0)
    path.write_bytes(data[:start] + many + tail)
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    assert claimed > path.stat().st_size  # a file that this test is about
    with pytest.raises(FormatError, match="claims"):
        read_adapter(path)


def test_bytes_before_the_archive_are_refused(tmp_path: Path) -> None:
    """Two readers may find two directories in such a file."""
    path = saved_checkpoint(tmp_path)
    path.write_bytes(b"PK\3\4" + b"\0" * 60 + path.read_bytes())
    with pytest.raises(FormatError, match="no checkpoint"):
        read_adapter(path)


@pytest.mark.parametrize("numel", [17, 10**6, 2**31 - 1, -1])
def test_a_storage_larger_than_its_record_reads_nothing_else(numel: int, tmp_path: Path) -> None:
    """What lies behind a record on the heap is nobody's tensor; torch 2.13 compares the sizes itself."""
    path = saved_checkpoint(tmp_path)

    def enlarge(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        at = data.index(b"lora_A")
        at = data.index(b"K\x10", at)  # 16 numbers
        return data[:at] + b"J" + struct.pack("<i", numel) + data[at + 2 :]

    repack(path, enlarge)
    try:
        state = read_adapter(path).state
    except FormatError:
        return
    original = adapter_of(checkpoint()).state
    assert all(torch.equal(state[key], value) for key, value in original.items())


def test_the_old_format_of_torch_is_refused(tmp_path: Path) -> None:
    """It has no sizes to compare, and Lightning does not write it."""
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="not a zip file"):
        read_adapter(path)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("open('pwned', 'w')",)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch, old", "zip"])
def test_no_form_of_pickle_is_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "a.ckpt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif form == "zip":
        torch.save(checkpoint(), path)
        repack(path, lambda name, data: pickle.dumps(Evil(), 2) if name.endswith("data.pkl") else data)
    else:
        torch.save(Evil(), path, _use_new_zipfile_serialization=form == "torch")
    for read in (read_adapter, lp.inspect_adapter, lambda p: lp.load_adapter(Whole(), p)):
        with pytest.raises(FormatError):
            read(path)
    assert not (tmp_path / "pwned").exists()


def test_what_was_saved_loads_and_gives_the_same(tmp_path: Path) -> None:
    """The bounds refuse nothing that this package writes."""
    for i, each in enumerate(STRATEGIES.values()):
        model, other = Net(), Net()
        handle = adapted(model, each)
        lp.load_adapter(other, lp.save_adapter(handle, tmp_path / str(i)))
        assert torch.equal(model(x()), other(x()))
        buffer = io.BytesIO()
        torch.save(sealed(manifest_of(handle)), buffer)
