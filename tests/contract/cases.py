"""Which method is tested on which backbone, decided from the registry and the anatomy alone; and what every test does with it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, PEFTError, PortError, TargetError, UnsupportedLayerError
from lightning_peft.loading.quantize import quantize
from lightning_peft.nn.adapter import LayerKindName
from lightning_peft.quantization.config import Quantization
from lightning_peft.strategies.hybrid.compose import Composition
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.layers import DENSE, LayerKind, layer_kind, storage_of
from lightning_peft.types import stable_seed
from tests.backbones import BACKBONES, Backbone, loss_of, run, tensors

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Case:
    """One strategy on one backbone.

    Args:
        strategy: The method with the hyperparameters of its record's example, targets chosen for the backbone where it needs them.
        backbone: The backbone.
        obstacle: The error that its record and the anatomy lead to; None if the method can work there.
        label: Tells apart several cases of a method on a backbone.
    """

    strategy: lp.PEFTStrategy
    backbone: Backbone
    obstacle: type[PEFTError] | None
    label: str = ""

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.strategy.info.name, self.backbone.name, self.label)))

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the base as the method wants it: quantized, for methods of quantized bases."""
        scheme = self.strategy.base_quantization
        if scheme is None:
            return self.backbone.fresh(dtype)
        return stored(self.backbone, Quantization(scheme=scheme, backend="torch"), dtype)

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the frozen base model: the reference (torch picks other kernels for weights that want gradient)."""
        return self.fresh(dtype).requires_grad_(False)

    def installed(self, dtype: torch.dtype = torch.float32, name: str = "default", seed: int = 11) -> tuple[nn.Module, lp.Handle]:
        """Return a fresh model with the strategy installed."""
        torch.manual_seed(seed)
        model = self.fresh(dtype)
        return model, self.install(model, name, dtype)

    def install(self, model: nn.Module, name: str = "default", dtype: torch.dtype = torch.float32) -> lp.Handle:
        """Install the strategy, calibrated on the backbone's input if it needs that."""
        return install(model, self.strategy, self.backbone.batch(dtype), name)


def install(model: nn.Module, strategy: lp.PEFTStrategy, batch: dict[str, Tensor], name: str = "default") -> lp.Handle:
    """Install a strategy, calibrated on a batch if it needs that."""
    if not strategy.from_data:
        return lp.inject(model, strategy, name)
    found = lp.calibrate(model, strategy, [batch], lambda piece: loss_of(model(**piece)))
    return lp.inject(model, strategy, name, calibration=found)


def stored(backbone: Backbone, config: Quantization, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a fresh model whose linear layers are quantized; all dense where it has none that could be."""
    return copy.deepcopy(_stored(backbone.name, config, dtype))


@functools.cache
def _stored(name: str, config: Quantization, dtype: torch.dtype) -> nn.Module:
    model = BACKBONES[name].fresh(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+% of the bytes")  # most of a tiny model is embeddings
        try:
            return quantize(model, config)
        except TargetError:
            return model


def members(strategy: lp.PEFTStrategy) -> tuple[lp.PEFTStrategy, ...]:
    """Return the strategies of which a combinator is made, found in its fields, or those that a system stands for."""
    if isinstance(strategy, Composition):
        return strategy.strategies
    found: list[lp.PEFTStrategy] = []
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, lp.PEFTStrategy)]
    return tuple(found)


def obstacle(strategy: lp.PEFTStrategy, anatomy: Anatomy) -> type[PEFTError] | None:
    """Return the error that planning must raise, as far as the record says what the method needs."""
    for member in members(strategy):
        if error := obstacle(member, anatomy):
            return error
    info = strategy.info
    if DENSE not in info.storages and all(storage_of(m) == DENSE for m in anatomy.root.modules()):
        return UnsupportedLayerError
    if any(port not in anatomy.ports for port in info.ports):
        return PortError
    if strategy.targets is None and info.default_roles:
        if anatomy.family == "inferred" or not all(anatomy.role_names(role) for role in info.default_roles):
            return TargetError
        sites = [site for role in info.default_roles for site in anatomy.sites(role)]
        if any(site.spec.kind not in info.layer_kinds for site in sites):
            return TargetError
    return None


def targeted(strategy: lp.PEFTStrategy, anatomy: Anatomy) -> lp.PEFTStrategy | None:
    """Return the strategy with targets named outright, wherever its default roles do not lead anywhere; None if nothing fits."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        if isinstance(value, tuple) and value and all(isinstance(v, lp.PEFTStrategy) for v in value):
            parts = [v if obstacle(v, anatomy) is None else targeted(v, anatomy) for v in value]
            if None in parts:
                return None
            changes[field.name] = tuple(parts)
        elif isinstance(value, lp.PEFTStrategy):
            part = value if obstacle(value, anatomy) is None else targeted(value, anatomy)
            if part is None:
                return None
            changes[field.name] = part
    info = strategy.info
    if info.default_roles:
        # Rank-1 weights (norms) take other hyperparameters; they have cases of their own.
        found = of_kinds(anatomy, info.layer_kinds - {"norm"} or info.layer_kinds)
        if not found:
            return None
        changes["targets"] = found
    return dataclasses.replace(strategy, **changes) if changes else None


RARE: dict[str, frozenset[LayerKindName]] = {
    "attention": frozenset({"embedding"}),
    "conv_net": frozenset({"conv"}),
    "experts": frozenset({"norm", "tensor"}),
}


def on_rare_kinds(strategy: lp.PEFTStrategy, anatomy: Anatomy, backbone: Backbone) -> Iterator[Case]:
    """Yield the strategy on those layer kinds that it could adapt here and does not, with linear layers beside them."""
    kinds = strategy.info.layer_kinds & RARE.get(backbone.name, frozenset())
    with contextlib.suppress(PEFTError):
        kinds -= {site.spec.kind for site in strategy.sites(anatomy)}
    if kinds:
        changes: dict[str, Any] = {"targets": of_kinds(anatomy, kinds | {"linear"})}
        if "norm" in kinds and "rank" in {field.name for field in dataclasses.fields(strategy)}:
            changes["rank"] = 1
        yield Case(dataclasses.replace(strategy, **changes), backbone, None, "-".join(sorted(kinds)))


def of_kinds(anatomy: Anatomy, kinds: frozenset[LayerKindName]) -> list[str]:
    return [p for p, m in anatomy.tree.modules.items() if kind_name(p, m) in kinds and anatomy.bypassed(p) is None]


def kind_name(path: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention) or path.rpartition(".")[2] == "experts":
        return "tensor"
    kind: LayerKind | None = layer_kind(module)
    return None if kind is None else kind.spec(module, "weight").kind


def example(info: lp.MethodInfo) -> lp.PEFTStrategy:
    """Return the method with the hyperparameters of its record."""
    return lp.resolve({"class_path": info.cls.__name__, "init_args": dict(info.example)})


def _cases() -> Iterator[Case]:
    for backbone in BACKBONES.values():
        anatomies: dict[str | None, Anatomy] = {}
        for info in lp.list_methods():
            strategy = example(info)
            wanted = strategy.base_quantization
            anatomy = anatomies.setdefault(wanted, anatomies.get(wanted) or lp.anatomy_of(Case(strategy, backbone, None).fresh()))
            error = obstacle(strategy, anatomy)
            yield Case(strategy, backbone, error)
            other = targeted(strategy, anatomy) if error is TargetError else None
            if other is not None:
                yield Case(other, backbone, None)
            if error in (None, TargetError):
                yield from on_rare_kinds(other or strategy, anatomy, backbone)


def _works(case: Case) -> bool:
    """Whether planning succeeds. A method may need what its record cannot say: biases, an untied head, a single body."""
    try:
        case.strategy.plan(lp.anatomy_of(case.fresh()))
    except (ConfigError, PortError, TargetError):
        return False
    return True


ALL = list(_cases())
POSSIBLE = [case for case in ALL if case.obstacle is None]
WORKING = [case for case in POSSIBLE if _works(case)]
UNDECLARED = [case for case in POSSIBLE if case not in WORKING]
REFUSED = [case for case in ALL if case.obstacle is not None]


class Identified(Protocol):
    """A case with the strategy that it is about."""

    @property
    def strategy(self) -> lp.PEFTStrategy:
        """The method."""

    @property
    def id(self) -> str:
        """Name of the case."""


SHARE, LEAST = 16, 1  # one in so many of a method's cases runs by default, for each test; and at least so many


def over(cases: Sequence[Identified]) -> Callable[[F], F]:
    """Parametrise a test by cases; by default a sample of each method's cases, another one for each test, and all as ``slow``."""

    def decorate(test: F) -> F:
        chosen: set[str] = set()
        for name in {case.strategy.info.name for case in cases}:
            own = sorted((case.id for case in cases if case.strategy.info.name == name), key=functools.partial(_draw, test))
            chosen |= set(own[: max(LEAST, -(-len(own) // SHARE))])
        marks = {case.id: () if case.id in chosen else pytest.mark.slow for case in cases}
        params = [pytest.param(case, id=case.id, marks=marks[case.id]) for case in cases]
        decorated: F = pytest.mark.parametrize("case", params)(test)
        return decorated

    return decorate


def _draw(test: Callable[..., object], case: str) -> int:
    return stable_seed(test.__module__, test.__name__, case)


def train_mode(model: nn.Module) -> None:
    """Put the model into training, but BatchNorm statistics of a frozen base in eval, as the callback does."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def train(
    model: nn.Module, handle: lp.Handle, batch: dict[str, Tensor], steps: int = 2, weight_decay: float = 0.0
) -> dict[int, Tensor]:
    """Take effective AdamW steps with the method's schedule; return the largest gradient seen by each parameter, by id."""
    train_mode(model)
    parameters = handle.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(10)
    seen = {id(p): torch.zeros(()) for p in parameters}
    for _ in range(steps):
        loss = loss_of(model(**batch))
        if (penalty := schedule.penalty()) is not None:
            loss = loss + penalty
        loss.backward()
        schedule.before_step(optimizer)
        for p in parameters:
            if p.grad is not None:
                seen[id(p)] = torch.maximum(seen[id(p)], p.grad.detach().abs().max().float())
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
    model.eval()
    return seen


def perturb(handle: lp.Handle, scale: float = 0.05) -> None:
    """Move every trainable tensor: at the start most branches are zero, which hides mistakes of scale and transposition."""
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale)


def calls(model: nn.Module, handle: lp.Handle, batch: dict[str, Tensor]) -> list[tuple[nn.Module, Any, Any, Tensor]]:
    """Run the model and note input and output of every adapted module.

    Layer by layer, since some models compute their norms in fp32 whatever their dtype, which blurs the last digits.
    """
    seen: list[tuple[nn.Module, Any, Any, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.append((module, args, kwargs, next(tensors(out)).detach().clone()))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in {e.module for e in handle.entries}]
    run(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that an injection may not leave changed: classes, attributes, hooks, flags, values."""
    seen: dict[str, Any] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None)))}
        hooks = {k: len(v) for k, v in vars(module).items() if "hooks" in k and hasattr(v, "__len__")}
        objects = {k: id(v) for k, v in vars(module).items() if k in ("forward", "config")}
        flags = {k: p.requires_grad for k, p in module._parameters.items() if p is not None}
        seen[path] = (type(module), sorted(vars(module)), list(module._modules), plain, hooks, objects, flags)
    seen["values"] = {k: v.detach().clone() for k, v in model.state_dict().items()}
    seen["objects"] = {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)}
    return seen


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; codes that are stored in a floating dtype may read as NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


def assert_same(after: dict[str, Any], before: dict[str, Any], *, objects: bool = True) -> None:
    """Compare two snapshots; ``objects=False`` for a copy of the model, whose tensors are other objects."""
    assert after.keys() == before.keys()
    for key in before:
        if key == "values":
            for name, value in before[key].items():
                assert same_bits(after[key][name], value), f"{name} changed"
        elif key == "objects" or not isinstance(before[key], tuple):
            assert not objects or after[key] == before[key], key
        else:
            *other, ids, flags = before[key]
            *found, found_ids, found_flags = after[key]
            assert found == other, f"'{key}' changed"
            assert found_flags == flags, f"requires_grad changed at '{key}'"
            assert found_ids.keys() == ids.keys(), f"'{key}' changed"
            assert not objects or found_ids == ids, f"forward or config changed at '{key}'"
