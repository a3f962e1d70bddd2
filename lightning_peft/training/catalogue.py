"""What ``lightning-peft methods`` prints: the registry as a table, and one method's card."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re

from rich.console import Console
from rich.table import Table

from lightning_peft.strategies.registry import get_method, list_methods


def methods_table() -> str:
    """Return the table of all registered methods, third parties' included."""
    table = Table(title="methods", title_justify="left")
    for column in ("name", "class", "family", "what it does", "merges", "lr", "paper"):
        table.add_column(column, justify="right" if column == "lr" else "left")
    for info in list_methods():
        merges = "yes" if info.mergeable else "no"
        paper = _arxiv(info.paper)
        table.add_row(info.name, info.cls.__name__, info.family, info.summary, merges, f"{info.lr:g}", paper)
    return _text(table)


def method_card(name: str) -> str:
    """Return everything about one method: record, promises and options with their defaults.

    Raises:
        UnknownMethodError: No such method.
    """
    info = get_method(name)
    lines = [
        f"{info.name} ({info.cls.__name__}), family {info.family}, version {info.version}",
        info.summary,
        f"paper: {info.paper}",
        f"suggested: lr {info.lr:g}, weight decay {info.weight_decay:g}",
        f"merges into the base: {'yes' if info.mergeable else 'no'}; identity at the start: {'yes' if info.identity_at_init else 'no'}",
        f"layer kinds: {', '.join(sorted(info.layer_kinds)) or 'none'}; ports: {', '.join(info.ports) or 'none'}; "
        f"default roles: {', '.join(info.default_roles) or 'none'}",
        "",
        "options:",
    ]
    texts = _arguments(info.cls)
    for field in dataclasses.fields(info.cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = "required" if default is dataclasses.MISSING else repr(default)
        lines.append(f"  {field.name} = {value}" + (f"\n      {texts[field.name]}" if field.name in texts else ""))
    return "\n".join(lines)


def _arguments(cls: type) -> dict[str, str]:
    """Return the text of each argument in the docstrings of a class and its bases; the class's own wins."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, block = (inspect.getdoc(base) or "").partition("Args:\n")
        for match in re.finditer(r"^    (\w+): (.*(?:\n     .*)*)", block, re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found


def _arxiv(paper: str) -> str:
    match = re.search(r"arXiv (\S+)", paper)
    return match[1].rstrip(",") if match else "-"


def _text(table: Table) -> str:
    # A pipe has no width; a table cut to 80 columns would be hard to search.
    text = io.StringIO()
    Console(file=text, width=max(Console().width, 140)).print(table)
    return text.getvalue().rstrip()
