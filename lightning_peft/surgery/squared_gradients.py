"""Squares of gradients of weights, added up over backward passes: what a method learns about the base from data."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_peft.errors import ConfigError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.surgery.layers import parameter
from lightning_peft.surgery.sites import Site, split_input


class SquaredGradients:
    """Σ (∂loss/∂θ)² of the weights and biases of some sites, in fp32 or better.

    Inside ``with`` the parameters want gradients; each gradient goes as soon as it has been counted. A quantized weight, which can
    have none, is counted by its layer's input and the gradient of its output: the gradient of the matrix that its codes stand for.

    Args:
        root: The adapted root.
        sites: Which weights.
    """

    def __init__(self, root: nn.Module, sites: Iterable[Site]) -> None:
        self._sums: dict[int, Tensor] = {}
        self._stored: dict[int, tuple[Tensor, bool, Tensor | None]] = {}
        self._parameters: list[Tensor] = []
        self._coded: list[nn.Linear] = []
        self._hooks: list[Any] = []
        self._probes: list[tuple[nn.Module, Tensor]] = []
        self._open: dict[nn.Module, Tensor] = {}
        for site in sites:
            module = site.module(root)
            for name in filter(None, (site.tensor, site.bias_name(module))):
                if name == "weight" and backend_of(module) is not None:
                    assert isinstance(module, nn.Linear)
                    if module not in self._coded:
                        self._coded.append(module)
                elif all(parameter(module, name) is not p for p in self._parameters):
                    self._parameters.append(parameter(module, name))

    def __enter__(self) -> SquaredGradients:
        for p in self._parameters:
            self._stored[id(p)] = (p, p.requires_grad, p.grad)
            p.grad = None
            p.requires_grad_(True)
            self._hooks.append(p.register_post_accumulate_grad_hook(self._count))
        for module in self._coded:
            self._hooks.append(module.register_forward_hook(self._watch, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for p, wanted, gradient in self._stored.values():
            p.requires_grad_(wanted)
            p.grad = gradient

    def add(self, loss: Tensor) -> None:
        """Count the gradients of a loss; nothing else gets one."""
        if not loss.requires_grad:
            raise ConfigError("the loss does not depend on the weights that are to be scored. Return the loss of training_step.")
        loss.backward(inputs=[*self._parameters, *(probe for _, probe in self._probes)])
        self._probes.clear()
        while self._open:
            module, gradient = self._open.popitem()
            self._put(id(module), gradient)

    def agree(self, count: int) -> int:
        """Add up the sums of all ranks, and return the sum of their counts; every rank has to call it."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return count
        counts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(counts, count)
        sums = [self._sums.setdefault(id(p), _zeros(p.shape, p)) for p in self._parameters]
        sums += [self._sums.setdefault(id(m), _zeros((m.out_features, m.in_features), m.weight)) for m in self._coded]
        for total in sums:
            distributed.all_reduce(total)
        return sum(counts)

    def of(self, root: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
        """Return the sums of a site's weight, canonical ``(*batch, out, in)``, and of its bias (out,) if it has one."""
        module, bias_name = site.module(root), site.bias_name(root.get_submodule(site.path))
        if module in self._coded:
            shape = (module.out_features, module.in_features)  # of the whole layer, of which the site may be a part
            weight = self._sum(id(module), parameter(module, site.tensor), shape)
        else:
            stored = parameter(module, site.tensor)
            weight = site.kind.canonical(self._sum(id(stored), stored, stored.shape))
        weight = weight if site.rows is None else site.rows.take(weight, -2)
        if bias_name is None:
            return weight, None
        stored = parameter(module, bias_name)
        bias = self._sum(id(stored), stored, stored.shape)
        return weight, bias if site.rows is None else site.rows.take(bias, -1)

    def _sum(self, key: int, like: Tensor, shape: Iterable[int]) -> Tensor:
        found = self._sums.get(key)
        return _zeros(shape, like) if found is None else found

    def _put(self, key: int, gradient: Tensor) -> None:
        square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
        known = self._sums.get(key)
        self._sums[key] = square if known is None else known.add_(square)

    def _count(self, p: Tensor) -> None:
        assert p.grad is not None
        self._put(id(p), p.grad.detach())
        p.grad = None

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        """Add zeros to the output of a quantized layer, whose gradient is that of the output."""
        x, _ = split_input(module, args, kwargs)
        probe = torch.zeros_like(out).requires_grad_(True)
        probe.register_post_accumulate_grad_hook(functools.partial(self._count_coded, module, x.detach()))
        self._probes.append((module, probe))
        return out + probe

    def _count_coded(self, module: nn.Module, x: Tensor, probe: Tensor) -> None:
        assert probe.grad is not None
        g, probe.grad = probe.grad, None
        part = g.reshape(-1, g.shape[-1]).T.to(x.dtype) @ x.reshape(-1, x.shape[-1])
        self._open[module] = self._open[module] + part if module in self._open else part
        self._probes = [(m, p) for m, p in self._probes if p is not probe]
        if all(m is not module for m, _ in self._probes):  # a layer may run several times in one forward
            self._put(id(module), self._open.pop(module))


def _zeros(shape: Iterable[int], like: Tensor) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
    return torch.zeros(tuple(shape), dtype=wide, device=like.device)
