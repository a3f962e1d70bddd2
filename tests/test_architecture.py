"""The direction of imports (design.md, section 3) and the cost of `import lightning_peft`, checked by machine."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "lightning_peft"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom to the top. A module may import its own unit and the units of lower layers.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "optional", "files", "hub", "untrusted"),
    ("quantization",),
    ("nn",),
    ("surgery",),
    ("strategies",),
    ("authoring", "loading", "checkpoint", "cost", "interop", "serving"),
    ("training",),
    ("__init__", "__main__"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# The foundation is a few files of one layer, the command line's `__main__` belongs to the package itself.
SIDEWAYS = {("interop", "checkpoint"), ("serving", "checkpoint")} | {
    (a, b) for units in (LAYERS[0], LAYERS[-1]) for a in units for b in units
}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}  # only in training/
OPTIONAL = {"transformers", "peft", "bitsandbytes"}  # never at module level
METHODS = {"nn", "strategies"}  # no optional package anywhere, and no architecture by name
PLAIN_WORDS = {"bit", "encoder-decoder"}  # model types of transformers too
# Where a method may name an architecture: module, word, what it means there.
OTHERWISE = {
    ("nn.bottleneck", "bert"): "initialisation N(0, 0.02²), a value of `init`, called so by the authors of three methods",
    ("strategies.architectural.meft", "bert"): "the same",
    ("strategies.hybrid.unipelt", "bert"): "the same",
}


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is the dotted module, `from a import b` counts as `a.b`."""

    target: str
    line: int
    module_level: bool  # runs when the module is imported
    type_checking: bool


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Yield every import in `source`, also those inside functions, with relative ones made absolute."""

    def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        return [f"{base}.{alias.name}" for alias in node.names]

    def walk(node: ast.AST, module_level: bool, type_checking: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(node):
                yield Import(target, node.lineno, module_level, type_checking)
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                yield from walk(child, module_level, True)
            for child in node.orelse:
                yield from walk(child, module_level, type_checking)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, module_level and not inside, type_checking)

    yield from walk(ast.parse(source), True, False)


def unit_of(target: str) -> str:
    """Return the unit that `lightning_peft.…` names; the package itself, or a name it exports, is `__init__`."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return one line for each import of `source` that breaks a rule; `module` is its dotted name."""
    unit = "__init__" if module == PACKAGE else module.split(".")[1]
    if unit not in LEVEL:
        return [f"{module}: the unit {unit!r} has no layer; give it one in LAYERS"]
    found = []
    for item in imports(source, module, is_package=is_package):
        top = item.target.split(".")[0]
        where = f"{module}:{item.line}: imports {item.target}"
        if top == PACKAGE:
            other = unit_of(item.target)
            allowed = other == unit or (unit, other) in SIDEWAYS or LEVEL[other] < LEVEL[unit]
            if not allowed:
                direction = "upward" if LEVEL[other] > LEVEL[unit] else "sideways"
                found.append(f"{where}, {direction} from {unit} to {other}")
        elif top in LIGHTNING and unit != "training":
            found.append(f"{where}; only training/ may")
        elif top in OPTIONAL and unit in METHODS:
            found.append(f"{where}; {unit}/ must not")
        elif top in OPTIONAL and item.module_level and not item.type_checking:
            found.append(f"{where} at module level")
    return found


@functools.cache
def architecture() -> re.Pattern[str]:
    """Return what finds a model type of transformers (`gpt_neox`, `gpt-neox`), or a class of one, in a string or a name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kinds = sorted(set(CONFIG_MAPPING_NAMES) - PLAIN_WORDS, key=len, reverse=True)
    types = "|".join(re.sub("(?<=[a-z])(?=[0-9])", "[-_]?", re.sub("[-_]", "[-_ ]?", kind)) for kind in kinds)
    stems = "|".join({name.removesuffix("Config") for name in CONFIG_MAPPING_NAMES.values()})
    parts = "(?:Self)?Attention|Block|Config|Decoder|Embeddings|Encoder|For[A-Z][A-Za-z]+|Layer|LMHeadModel|MLP|Model|RMSNorm"
    return re.compile(rf"(?<![A-Za-z0-9])(?:(?i:{types})(?![A-Za-z0-9])|(?:{stems})(?:{parts})(?![a-z]))")


def architectures_named(source: str) -> set[str]:
    """Return the architectures that code names in strings and identifiers; docstrings and comments may."""
    texts: list[str] = []
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            texts.append(node.value)
        texts += [
            value for field in ("id", "attr", "arg", "name", "asname") if isinstance(value := getattr(node, field, None), str)
        ]
    return {match[0].lower() for text in texts for match in architecture().finditer(text)}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(path.read_text(encoding="utf-8"), module, is_package=is_package) == []


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for p in modules() if named(p).split(".")[0] in METHODS], ids=named)
def test_no_method_names_an_architecture(path: Path) -> None:
    found = architectures_named(path.read_text(encoding="utf-8"))
    assert {word for word in found if (named(path), word) not in OTHERWISE} == set()


def test_what_means_something_else_is_there() -> None:
    for module, word in OTHERWISE:
        assert word in architectures_named((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("if config.model_type == 'llama': pass", "llama"),
        ("raise ValueError('GPT-2 stores it transposed')", "gpt-2"),
        ("if is_gpt_neox(model): pass", "gpt_neox"),
        ("def t5_bias(x): pass", "t5"),
        ("if type(m).__name__ == 'LlamaRMSNorm': pass", "llamarmsnorm"),
        ("isinstance(m, BertSelfAttention)", "bertselfattention"),
        ("hf.T5ForConditionalGeneration", "t5forconditionalgeneration"),
    ],
)
def test_checker_finds_architecture(source: str, word: str) -> None:
    assert architectures_named(source) == {word}


def test_checker_lets_docstrings_and_comments_name_architectures() -> None:
    assert architectures_named('"""As BERT does."""\nx = 1  # as LlamaModel\ndef f():\n    """GPT-2."""\n') == set()
    assert architectures_named("class BitFit:\n    text = 'the base bit for bit, of an encoder-decoder too'\n") == set()


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in modules()}
    assert {str(folder) for folder in folders if not (folder / "__init__.py").is_file()} == set()


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("nn.low_rank", "from lightning_peft.surgery.inject import inject", "upward from nn to surgery"),
        ("nn.low_rank", "def f():\n    from lightning_peft import surgery", "upward from nn to surgery"),
        ("nn.low_rank", "from ..surgery import inject", "upward from nn to surgery"),
        ("nn.low_rank", "import lightning_peft.training.cli", "upward from nn to training"),
        ("nn.low_rank", "if TYPE_CHECKING:\n    from lightning_peft.strategies import LoRA", "upward from nn"),
        ("training.cli", "from lightning_peft import LoRA", "upward from training to __init__"),
        ("training.cli", "from .. import LoRA", "upward from training to __init__"),
        ("cost.flops", "from lightning_peft.checkpoint import save_adapter", "sideways from cost to checkpoint"),
        ("checkpoint.files", "from ..interop import save_hf", "sideways from checkpoint to interop"),
        ("surgery.inject", "def f():\n    import lightning.pytorch", "only training/ may"),
        ("cost.flops", "from pytorch_lightning import Callback", "only training/ may"),
        ("training.data", "import transformers", "at module level"),
        ("training.data", "try:\n    from peft import LoraConfig\nexcept ImportError:\n    pass", "at module level"),
        ("nn.low_rank", "def f():\n    import transformers", "nn/ must not"),
        ("strategies.additive.prefix", "if TYPE_CHECKING:\n    from peft import LoraConfig", "strategies/ must not"),
        ("quantization.bnb", "class A:\n    import bitsandbytes.nn", "at module level"),
        ("quantization.bnb", "if TYPE_CHECKING:\n    pass\nelse:\n    import bitsandbytes", "at module level"),
        ("novelty.file", "", "has no layer"),
    ],
)
def test_checker_finds_violation(module: str, source: str, message: str) -> None:
    found = violations(source, f"{PACKAGE}.{module}")
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("optional", "from lightning_peft.errors import DependencyError"),
        (
            "strategies.additive.prefix",
            "from lightning_peft.nn import virtual_tokens\nfrom ..strategy import PEFTStrategy",
        ),
        ("interop.hf", "from lightning_peft.checkpoint import files\nfrom ..errors import FormatError"),
        ("serving.bank", "from lightning_peft.checkpoint import load_adapter"),
        ("training.cli", "import lightning.pytorch\nfrom lightning_peft import errors"),
        ("training.data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("training.data", "import typing\nif typing.TYPE_CHECKING:\n    import transformers"),
        ("loading.hub", "def load():\n    from transformers import AutoModel"),
        ("nn.low_rank", "import lightning_utilities_of_somebody\nimport torch"),
    ],
)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_package_init_may_import_all_units_and_resolves_relative_imports() -> None:
    assert violations("from .training import PEFTCallback\nfrom .nn import x", PACKAGE, is_package=True) == []
    relative = violations("from .training import x", f"{PACKAGE}.nn", is_package=True)
    assert relative == []  # `.training` inside the package `nn` is nn.training
    assert len(violations("from ..training import x", f"{PACKAGE}.nn", is_package=True)) == 1


def test_import_is_cheap() -> None:
    """`import lightning_peft` in a fresh interpreter loads none of the heavy packages."""
    code = f"import json, sys, {PACKAGE}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) & (LIGHTNING | OPTIONAL) == set()
