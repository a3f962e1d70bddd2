"""Strategy × method × train, save, resume, merge, each for real on two CPU processes; ``-s`` prints the table of the README.

pytest -m "dist or slow" tests/distributed/test_cells.py -s
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.checkpoint import read_adapter
from tests.distributed import cases, ranks

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("distributed")]
README = Path(__file__).parents[2] / "README.md"
KINDS = {"single": "one process", "ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"}
# What cannot be: the words of the error.
REFUSED = {("fsdp1", "AdaLoRA"): "reads its parameters between steps"}
CELLS = [(kind, method) for method in cases.METHODS for kind in KINDS if (kind, method) not in REFUSED]
FAST = ("LoRA", "QLoRA", "PrefixTuning")
DONE: dict[tuple[str, str], set[str]] = {}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    file = read_adapter(folder / "adapter" / "last")
    return {**file.state, **file.extra_state}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What one process with whole batches has learnt, by method."""
    return {}


@pytest.mark.parametrize(("kind", "method"), [c if c[1] in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in CELLS])
def test_cell(kind: str, method: str, tmp_path: Path, alone: dict[str, dict[str, torch.Tensor]]) -> None:
    world = 1 if kind == "single" else 2
    done = DONE.setdefault((kind, method), set())

    ranks.run(cases.fit, kind, method, tmp_path, ranks=world)
    trained = adapter(tmp_path)
    if kind == "single":
        alone[method] = trained
    elif method not in alone:
        ranks.run(cases.fit, "single", method, tmp_path / "single", ranks=1)
        alone[method] = adapter(tmp_path / "single")
    # Two processes with half a batch each are one process with the whole batch.
    assert furthest(alone[method], trained) < 1e-5
    done.add("train")

    checkpoint = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"base.{k}" for k in checkpoint_keys(method)}
    assert all(type(tensor) is torch.Tensor for tensor in checkpoint["state_dict"].values())
    done.add("save")

    again = tmp_path / "again"
    ranks.run(cases.resume, kind, method, again, tmp_path / "step=8.ckpt", ranks=world)
    assert furthest(trained, adapter(again)) == 0.0
    done.add("resume")

    if method in cases.MERGES:
        base = cases.module(method).base if method == "QLoRA" else cases.base()
        for handle in lp.handles(base).values():
            handle.remove()
        handle = lp.load_adapter(base.eval(), tmp_path / "adapter" / "last")
        ids = cases.Texts().ids
        with torch.no_grad():
            adapted = base(ids).logits
            handle.merge(quantized="dense" if method == "QLoRA" else None)
            torch.testing.assert_close(base(ids).logits, adapted, rtol=1e-4, atol=1e-5)
        done.add("merge")


def checkpoint_keys(method: str) -> set[str]:
    module = cases.module(method)
    owned = {id(slot.tensor()): slot for slot in module.handle.slots}
    names: dict[int, str] = {}
    for name, tensor in module.base.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)  # of a tied tensor the first
    return {names[tensor] for tensor in owned}


@pytest.mark.parametrize(("kind", "method"), list(REFUSED))
def test_refused_cell(kind: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError, match=REFUSED[kind, method]):
        ranks.run(cases.fit, kind, method, tmp_path)


def table() -> Iterator[str]:
    yield f"| | {' | '.join(KINDS.values())} |"
    yield "|---" * (1 + len(KINDS)) + "|"
    for method in cases.METHODS:
        parts = "train, save, resume, merge" if method in cases.MERGES else "train, save, resume"
        cells = ["refused" if (kind, method) in REFUSED else parts for kind in KINDS]
        yield f"| `{method}` | {' | '.join(cells)} |"


def test_the_table_of_the_readme_is_what_ran(request: pytest.FixtureRequest) -> None:
    rows = list(table())
    print("\n" + "\n".join(rows))
    assert "\n".join(rows) in README.read_text(encoding="utf-8")
    for (kind, method), done in DONE.items():  # of the cells that were selected
        if request.session.testsfailed == 0:
            wanted = {"train", "save", "resume"} | ({"merge"} if method in cases.MERGES else set())
            assert done == wanted, (kind, method)
