"""What the README shows is what runs: its Python blocks, its method tables, its files, its commands.

python -m tests.test_readme     writes the tables anew, from the registry
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.cost.planned import plan_model
from lightning_peft.errors import PEFTError
from lightning_peft.strategies.strategy import ALL_STORAGES
from lightning_peft.surgery.walk import base_parameters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
METHODS = [info for info in lp.list_methods() if info.cls.__module__.startswith("lightning_peft.")]


@functools.cache
def smollm2() -> nn.Module:
    """SmolLM2-135M as it is published, without its numbers."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))


@functools.cache
def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with a classifier of two labels, without its numbers."""
    sizes = {"vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=12))


def share(info: lp.MethodInfo, model: nn.Module) -> str:
    """What a method trains with its default options, relative to the base; a dash where it has none or does not apply."""
    settings: dict[str, Any] = {"dtype": None, "precision": "32-true", "quantization": "auto", "gradient_checkpointing": None}
    try:
        planned = plan_model(model, lp.resolve(info.name), adapter_dtype="auto", on_cuda=False, **settings)
    except PEFTError:
        return "–"
    return f"{100 * sum(p.numel() for p in planned.trainable()) / planned.parameters:.3g}%"


def promises(info: lp.MethodInfo) -> str:
    """What the contract suite holds a method to, in words."""
    kept = {
        "merges": info.mergeable,
        "starts as the base": info.identity_at_init,
        "quantized base": info.base_quantization is None and info.storages == ALL_STORAGES,
        "quantized base only": info.base_quantization is not None,
        "adds positions": info.adds_positions,
    }
    return ", ".join(words for words, holds in kept.items() if holds)


def methods() -> str:
    """The table of methods."""
    rows = [
        "| name | class | family | what it does | SmolLM2-135M | MiniLM | promises | paper |",
        "|---|---|---|---|---:|---:|---|---|",
    ]
    for info in METHODS:
        shares = " | ".join(share(info, model) for model in (smollm2(), minilm()))
        what = f"| `{info.name}` | `lp.{info.cls.__name__}` | {info.family} | {info.summary}"
        rows.append(f"{what} | {shares} | {promises(info)} | {info.paper} |")
    return "\n".join(rows)


def storages() -> str:
    """The table of methods and storages, from the promises in the registry, which the contract suite holds them to."""
    columns = sorted(ALL_STORAGES, key=("dense", "nf4", "fp4", "int8").index)
    rows = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for info in METHODS:
        works = "trains, merges" if info.mergeable else "trains"
        rows.append(f"| `{info.name}` | {' | '.join(works if c in info.storages else 'no' for c in columns)} |")
    return "\n".join(rows)


TABLES = {"methods": methods, "methods and storages": storages}


def with_tables(readme: str) -> str:
    """Return the README with its tables as the registry has them."""
    for title, made in TABLES.items():
        mark = re.escape(f"<!-- table: {title}; made by tests/test_readme.py -->\n")
        readme, found = re.subn(rf"({mark})(\|.*\n)+", lambda match, made=made: f"{match[1]}{made()}\n", readme)
        assert found == 1, f"the README has no place for the table of {title}"
    return readme


# Lightning's own advice on the README's minimal loop: no validation data, no logger package, a toy module.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.parametrize("block", BLOCKS, ids=["callback", "plain-loop", "quantized"])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert any((tmp_path / "runs" / "readme").iterdir())


def test_tables_are_the_registry() -> None:
    assert with_tables(README) == README, "the registry has changed; write the tables anew: python -m tests.test_readme"


def test_shares_are_those_of_the_papers_formulas() -> None:
    rank, hidden, blocks, base = 8, 384, 6, 22_713_986
    assert sum(p.numel() for _, _, p in base_parameters(minilm())) == base
    assert share(lp.LoRA.info, minilm()) == f"{100 * blocks * 2 * 2 * rank * hidden / base:.3g}%"
    assert share(lp.Full.info, minilm()) == "100%"
    assert share(lp.Head.info, minilm()) == f"{100 * (2 * hidden + 2) / base:.3g}%"
    assert share(lp.Head.info, smollm2()) == "–"  # its head is its embedding
    sides = blocks * (4 * 2 * hidden + 2 * 5 * hidden) + 2 * hidden  # in and out of attention, feed-forward and pooler
    assert share(lp.QLoRA.info, minilm()) == f"{100 * 64 * sides / base:.3g}%"
    assert share(lp.Compose.info, smollm2()) == "–"  # of what?


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_public_class_of_a_method_is_exported() -> None:
    assert [info.name for info in METHODS if getattr(lp, info.cls.__name__, None) is not info.cls] == []


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_tables(README))
