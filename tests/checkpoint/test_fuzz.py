"""Damaged and forged files by the thousand: what loads is what was saved, or what the file says; anything else is a typed error.

Mutations follow from seeds, so that a failure names the case that repeats it. Each case has a deadline of its own.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import math
import random
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import lightning_peft as lp
from lightning_peft.checkpoint import AdapterFile, adapter_of, check_manifest, manifest_of, read_adapter, stamp
from lightning_peft.checkpoint.manifest import sealed
from lightning_peft.errors import FormatError, PEFTError
from lightning_peft.strategies.registry import resolve
from lightning_peft.untrusted import check_safetensors
from tests.checkpoint.toys import STRATEGIES, Net, Whole, adapted, assert_same, snapshot, x

TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"
RESEALED = f"{TENSORS}, its checksum made to fit"
DEADLINE = 10.0  # seconds for a case that takes milliseconds
SUBJECTS = ("lora with biases", "vera", "composed")


class Hang(BaseException):
    """A case took longer than its deadline; no Exception, so that nothing under test can catch it."""


@contextmanager
def deadline() -> Iterator[None]:
    def late(*args: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- bytes

WORDS = [
    b"0",
    b"1",
    b"9" * 30,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"[[[[",
    b'"a":',
    b"\\ud800",
    b"\0",
]
WORDS += [
    b"../",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    struct.pack("<Q", 2**63),
    struct.pack("<I", 2**31),
    b"\x85",
    b"R",
    b"cos\nsystem\n",
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return bytes that differ in one to three places: flipped, cut, doubled, moved, blanked, or with something else in between."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data)) if data else 0
        length = min(int(2 ** rng.uniform(0, 9)), len(data) - at)
        middle = data[at : at + length]
        kind = rng.randrange(9)
        if kind in (0, 1) and data:  # a bit
            middle = bytes([middle[0] ^ (1 << rng.randrange(8))]) + middle[1:]
        elif kind == 2 and data:  # a digit or another byte
            middle = (rng.choice(b"0123456789") if middle[0] in b"0123456789" else rng.randrange(256)).to_bytes(
                1, "big"
            ) + middle[1:]
        elif kind == 3:
            middle = b""
        elif kind == 4:
            middle = middle * 2
        elif kind == 5:
            middle = bytes(length)
        elif kind == 6:
            middle = rng.choice(WORDS) + middle
        elif kind == 7:
            other = rng.randrange(len(data)) if data else 0
            middle = data[other : other + length]
        else:
            return data[:at]
        data = data[:at] + middle + data[at + length :]
    return data


@lru_cache
def originals(subject: str) -> tuple[dict[str, bytes], bytes, AdapterFile]:
    """Return the two files of an adapter folder, a checkpoint, and what they hold."""
    whole = Whole()
    handle = adapted(whole.net, STRATEGIES[subject])
    head = {f"head.{key}": value for key, value in whole.head.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        lp.save_adapter(handle, folder, root="net", extra_state=head)
        files = {name: (Path(folder) / name).read_bytes() for name in (MANIFEST, TENSORS)}
        adapter = read_adapter(folder)
    found: dict[str, Any] = {"state_dict": whole.state_dict(), "epoch": 3, "global_step": 7}
    stamp(found, {"default": manifest_of(handle, root="net", extra_state=head)})
    buffer = io.BytesIO()
    torch.save(found, buffer)
    assert same(adapter, adapter_of(found))
    return files, buffer.getvalue(), adapter


def same(a: AdapterFile, b: AdapterFile) -> bool:
    """Return whether two adapters are equal in all that has an effect."""
    states = ((a.state, b.state), (a.extra_state, b.extra_state))
    fields = ("name", "root", "adapter_dtype", "base", "methods")
    return (
        a.strategy == b.strategy
        and all(a.manifest[field] == b.manifest[field] for field in fields)
        and a.manifest.get("usage") == b.manifest.get("usage")
        and all(one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items()) for one, two in states)
    )


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def case(target: str, subject: str, seed: int, folder: Path) -> str:
    """Read one mutated file; return what became of it."""
    rng = random.Random(f"{target} {subject} {seed}")
    files, checkpoint, original = originals(subject)
    if target == "checkpoint":
        path = folder / "a.ckpt"
        path.write_bytes(mutated(checkpoint, rng))
    else:
        path = folder
        damaged = {name: mutated(data, rng) if name in target else data for name, data in files.items()}
        if target == RESEALED:
            manifest = {**original.manifest, "file": {"sha256": hashlib.sha256(damaged[TENSORS]).hexdigest()}}
            damaged[MANIFEST] = json.dumps(sealed(manifest)).encode()
        for name, data in damaged.items():
            (folder / name).write_bytes(data)
    try:
        with deadline():
            found = read_adapter(path)
    except PEFTError as error:
        return type(error).__name__
    assert same(found, original), "a wrong load"
    return "equal"


def run(target: str, cases: int, folder: Path) -> Counter[str]:
    tally: Counter[str] = Counter()
    for seed in range(cases):
        subject = SUBJECTS[seed % len(SUBJECTS)]
        try:
            tally[case(target, subject, seed, folder)] += 1
        except BaseException as error:
            raise AssertionError(f"case({target!r}, {subject!r}, {seed}) ended in {type(error).__name__}: {error}") from error
    print(f"\n{cases} mutations of {target}: {dict(tally)}")
    return tally


TARGETS = {MANIFEST: 1000, TENSORS: 500, RESEALED: 700, "checkpoint": 800}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files(target: str, tmp_path: Path) -> None:
    tally = run(target, TARGETS[target], tmp_path)
    assert tally["FormatError"] > 0.8 * TARGETS[target]
    if target in (MANIFEST, "checkpoint"):  # spaces, and bytes between the records; of the tensor file every byte counts
        assert tally["equal"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("target", "cases"), [(MANIFEST, 6000), (TENSORS, 2000), (RESEALED, 5000), ("checkpoint", 7000)])
def test_twenty_thousand_mutated_files(target: str, cases: int, tmp_path: Path) -> None:
    assert sum(run(target, cases, tmp_path).values()) == cases


# ---------------------------------------------------------------- manifests by structure, with nothing to give them away

NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**53, 10**12, 2**63 - 1, 2**64]), st.floats())
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), st.sampled_from(["lora", "up", "re:(", "*", "all-linear"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)
SETTINGS = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,  # the wall clock of a busy machine; `deadline()` is what bounds a case
    suppress_health_check=list(hypothesis.HealthCheck),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, child in items for place in places(child, (*path, key))]


def changed(manifest: dict[str, Any], draw: Callable[[Any], Any]) -> dict[str, Any]:
    """Replace, remove, rename or double one value."""
    manifest = copy.deepcopy(manifest)
    *outer, last = draw(st.sampled_from(places(manifest)))
    holder: Any = manifest
    for step in outer:
        holder = holder[step]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "borrow"]))
    if kind == "remove":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.text(max_size=6))] = holder.pop(last)
    elif kind == "borrow":
        other: Any = manifest
        for step in draw(st.sampled_from(places(manifest))):
            other = other[step]
        holder[last] = copy.deepcopy(other)
    else:
        holder[last] = draw(PLAIN)
    return manifest


@hypothesis.settings(SETTINGS, max_examples=400)
@hypothesis.given(st.data(), st.sampled_from(SUBJECTS))
def test_a_forged_manifest_loads_as_what_it_says(data: Any, subject: str) -> None:
    """Without its checksum, as files before it: whatever loads has the strategy that it names and tensors that fit their checksums."""
    _, _, original = originals(subject)
    manifest = {key: value for key, value in original.manifest.items() if key != "checksum"}
    forged = changed(manifest, data.draw)
    try:
        with deadline():
            strategy = check_manifest(forged)
    except PEFTError:
        return
    assert strategy == resolve(forged["strategy"])
    assert set(forged) <= {*manifest, "usage"}


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forge")


@hypothesis.settings(SETTINGS, max_examples=250)
@hypothesis.given(st.data(), st.sampled_from(SUBJECTS))
@pytest.mark.filterwarnings("ignore:adapter '.*' was saved with", "ignore:.*base weights could not be compared")
def test_a_forged_folder_is_installed_whole_or_not_at_all(forge: Path, data: Any, subject: str) -> None:
    files, _, original = originals(subject)
    manifest = {key: value for key, value in original.manifest.items() if key != "checksum"}
    (forge / TENSORS).write_bytes(files[TENSORS])
    (forge / MANIFEST).write_text(
        json.dumps(changed(manifest, data.draw), ensure_ascii=False), encoding="utf-8", errors="replace"
    )
    model = Net()
    before = snapshot(model)
    try:
        with deadline():
            handle = lp.load_adapter(model, forge)
    except PEFTError:
        assert_same(before, snapshot(model))
        return
    assert all(torch.equal(value, original.state[key]) for key, value in handle.state_dict().items())
    model(x())
    handle.remove()
    assert_same(before, snapshot(model))


# ---------------------------------------------------------------- headers of tensor files

DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@hypothesis.settings(SETTINGS, max_examples=400)
@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from([*DTYPES, "F31"]),
            st.lists(st.one_of(st.integers(0, 3), st.sampled_from([2**32, 2**63, -1])), max_size=3),
            st.one_of(st.none(), st.tuples(st.integers(-2, 80), st.integers(-2, 80))),
        ),
        max_size=4,
    ),
    st.integers(-8, 8),
    st.one_of(st.just(0), st.integers(-20, 20)),
)
def test_a_header_gives_the_bytes_that_it_names_or_nothing(
    forge: Path, tensors: list[tuple[str, list[int], tuple[int, int] | None]], more: int, longer: int
) -> None:
    header: dict[str, Any] = {}
    at = 0
    for i, (dtype, shape, offsets) in enumerate(tensors):
        size = max(0, math.prod(shape)) * DTYPES.get(dtype, torch.int32).itemsize
        end = at + min(size, 10**4)
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": list(offsets or (at, end))}
        at = end
    body = bytes(i % 251 for i in range(max(0, at + more)))
    text = json.dumps(header).encode()
    path = forge / TENSORS
    path.write_bytes(struct.pack("<Q", max(0, len(text) + longer)) + text + body)
    try:
        with deadline():
            check_safetensors(path)
            found = load_file(path)
    except (FormatError, SafetensorError):
        return
    ends = sorted(tuple(record["data_offsets"]) for record in header.values())
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends)), "overlapping"
    assert set(found) == set(header)
    for key, record in header.items():
        start, stop = record["data_offsets"]
        assert (found[key].dtype, list(found[key].shape)) == (DTYPES[record["dtype"]], record["shape"])
        assert bytes(found[key].flatten().view(torch.uint8).tolist()) == body[start:stop]
