"""The module tree of one model without its adapters: paths, aliases, order, and the Hugging Face models inside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import nn

from lightning_peft.surgery.stack import RESERVED


def join(*parts: str) -> str:
    """Join path parts, skipping empty ones: ``join("", "a", "b.c")`` is ``"a.b.c"``."""
    return ".".join(part for part in parts if part)


def is_within(path: str, ancestor: str) -> bool:
    """Return whether ``path`` is ``ancestor`` or lies below it; everything lies below the root ``""``."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


class ModuleTree:
    """A snapshot of the paths of a model. Nothing inside a child named ``peft`` belongs to it.

    Args:
        root: The adapted root; all paths are relative to it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules: dict[str, nn.Module] = {}
        """Module by path, in model order; a module that is reachable on several paths has its first one."""
        self.aliases: dict[str, str] = {}
        """Further paths of shared modules, with their first path."""
        first: dict[nn.Module, str] = {}
        for path, module in _walk(root, "", ()):
            if module in first:
                self.aliases[path] = first[module]
            else:
                first[module] = path
                self.modules[path] = module
        self.order = {path: i for i, path in enumerate(self.modules)}

    def __contains__(self, path: str) -> bool:
        return path in self.modules or path in self.aliases

    def __getitem__(self, path: str) -> nn.Module:
        return self.modules[self.canonical(path)]

    def canonical(self, path: str) -> str:
        """Return the first path of the module at ``path``."""
        return self.aliases.get(path, path)

    def path_of(self, module: object) -> str | None:
        """Return the path of a module object, or None if it is not in the tree."""
        return next((path for path, other in self.modules.items() if other is module), None)

    def children(self, path: str) -> tuple[str, ...]:
        """Return the paths of the direct children of the module at ``path``."""
        names = (name for name, child in self[path].named_children() if name != RESERVED and child is not None)
        return tuple(self.canonical(join(path, name)) for name in names)

    def below(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield the module at ``path`` and all below it, in model order."""
        return ((other, module) for other, module in self.modules.items() if is_within(other, path))

    @cached_property
    def hf_roots(self) -> tuple[str, ...]:
        """Paths of the outermost Hugging Face models: modules with ``config.model_type`` and ``base_model_prefix``.

        Read by shape, so that transformers is not imported. A LightningModule that merely keeps a ``config`` is no HF model.
        """
        found: list[str] = []
        for path, module in self.modules.items():
            if any(is_within(path, root) for root in found):
                continue
            if model_type(module) is not None and isinstance(getattr(module, "base_model_prefix", None), str):
                found.append(path)
        return tuple(found)

    def hf_base(self, path: str) -> str:
        """Return the path of the base model inside the HF model at ``path``: itself when it has no head."""
        module = self[path]
        base = getattr(module, str(getattr(module, "base_model_prefix", "")) or "", None)
        return self.path_of(base) or path if isinstance(base, nn.Module) else path


def model_type(module: nn.Module) -> str | None:
    """Return ``module.config.model_type`` if there is one."""
    value = getattr(getattr(module, "config", None), "model_type", None)
    return value if isinstance(value, str) and value else None


def _walk(module: nn.Module, path: str, chain: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != RESERVED and not any(child is above for above in chain):
            yield from _walk(child, join(path, name), (*chain, module))
