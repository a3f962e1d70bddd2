"""What the README shows is what runs: its Python blocks, its method table, its files, its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_peft as lp
from lightning_peft.strategies.strategy import ALL_STORAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def table() -> str:
    """The method table, from the registry; paste it into the README when this test says so."""
    rows = ["| name | class | family | what it does | merges | paper |", "|---|---|---|---|---|---|"]
    for info in lp.list_methods():
        if info.cls.__module__.startswith("lightning_peft."):
            merges = "yes" if info.mergeable else "no"
            rows.append(
                f"| `{info.name}` | `lp.{info.cls.__name__}` | {info.family} | {info.summary} | {merges} | {info.paper} |"
            )
    return "\n".join(rows)


def storages() -> str:
    """The table of methods and storages, from the promises in the registry, which the contract suite holds them to."""
    columns = sorted(ALL_STORAGES, key=("dense", "nf4", "fp4", "int8").index)
    rows = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for info in lp.list_methods():
        if info.cls.__module__.startswith("lightning_peft."):
            works = "trains, merges" if info.mergeable else "trains"
            rows.append(f"| `{info.name}` | {' | '.join(works if c in info.storages else 'no' for c in columns)} |")
    return "\n".join(rows)


# Lightning's own advice on the README's minimal loop: no validation data, no logger package, a toy module.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.parametrize("block", BLOCKS, ids=["callback", "plain-loop", "quantized"])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert any((tmp_path / "runs" / "readme").iterdir())


def test_method_table_is_the_registry() -> None:
    assert table() in README


def test_storage_table_is_the_registry() -> None:
    assert storages() in README


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_public_class_of_a_method_is_exported() -> None:
    ours = [info.cls for info in lp.list_methods() if info.cls.__module__.startswith("lightning_peft.")]
    assert [cls for cls in ours if getattr(lp, cls.__name__, None) is not cls] == []
