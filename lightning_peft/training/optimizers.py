"""Optimizers that the user made: frozen parameters out, adapters in, groups split where a method wants it.

Groups are edited in place. An optimizer may have been built before the adapters were there (``LightningCLI --optimizer``), and a
scheduler, Lightning and the checkpoint all hold on to the optimizer and its list of groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_peft.errors import ConfigError

_PER_GROUP_LISTS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")
_SPLITTABLE = (
    schedulers.LambdaLR,
    schedulers.MultiplicativeLR,
    schedulers.StepLR,
    schedulers.MultiStepLR,
    schedulers.ConstantLR,
    schedulers.LinearLR,
    schedulers.ExponentialLR,
    schedulers.PolynomialLR,
    schedulers.CosineAnnealingLR,
    schedulers.CosineAnnealingWarmRestarts,
    schedulers.ReduceLROnPlateau,
)


def reach(optimizers: Sequence[Optimizer], base: Iterable[nn.Parameter], trainable: Iterable[nn.Parameter]) -> int:
    """Drop frozen base parameters from all groups and append missing trainable ones to the first group.

    Args:
        optimizers: The optimizers of the run.
        base: Parameters below the adapted root; the user's other parameters are left alone, trained or not.
        trainable: What has to be in an optimizer.

    Returns:
        How many parameters were appended.

    Raises:
        ConfigError: There are parameters to train and no optimizer.
    """
    frozen = {id(p) for p in base if not p.requires_grad}
    present: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in frozen]
            present |= {id(p) for p in group["params"]}
    missing = [p for p in trainable if id(p) not in present]
    if missing and not optimizers:
        raise ConfigError("configure_optimizers returned no optimizer, so the adapter would never train.")
    if missing:
        optimizers[0].param_groups[0]["params"].extend(missing)
    return len(missing)


def split_groups(
    optimizers: Sequence[Optimizer], configs: Iterable[Any], options: Iterable[tuple[nn.Parameter, dict[str, float]]]
) -> None:
    """Give parameters with options of their own a group of their own.

    Args:
        optimizers: The optimizers of the run.
        configs: Lightning's scheduler configs, each with a ``scheduler``.
        options: Parameters with ``lr_scale`` (a factor on the group's learning rate) and ``weight_decay``.

    Raises:
        ConfigError: A scheduler keeps one value per group in a way that cannot be split, or an option is unknown.
    """
    wanted = {id(p): tuple(sorted(o.items())) for p, o in options if o}
    if not wanted:
        return
    known = [c.scheduler for c in configs]
    for optimizer in optimizers:
        attached = [s for scheduler in known for s in _flat(scheduler) if s.optimizer is optimizer]
        for index in range(len(optimizer.param_groups)):
            group = optimizer.param_groups[index]
            kinds = dict.fromkeys(wanted.get(id(p), ()) for p in group["params"])
            if list(kinds) in ([], [()]) or group.get("peft_options") in kinds:
                continue
            for kind in kinds:
                if kind:
                    _split(optimizer, index, dict(kind), [p for p in group["params"] if wanted.get(id(p), ()) == kind], attached)
            group["params"][:] = [p for p in group["params"] if id(p) not in wanted]
    for container in known:
        if hasattr(container, "_schedulers") and hasattr(container, "_last_lr"):  # its list is a report of the groups
            container._last_lr = [g["lr"] for g in container._schedulers[0].optimizer.param_groups]


def _split(optimizer: Optimizer, index: int, options: dict[str, float], params: list[Any], attached: list[Any]) -> None:
    unknown = options.keys() - {"lr_scale", "weight_decay"}
    if unknown:
        raise ConfigError(f"group option {sorted(unknown)[0]!r} is unknown; there are lr_scale and weight_decay.")
    for scheduler in attached:
        if not isinstance(scheduler, _SPLITTABLE):
            raise ConfigError(
                f"the method gives some of its tensors a learning rate of their own, and {type(scheduler).__name__} cannot take more "
                "groups after it was made. Use another scheduler, or build the groups in configure_optimizers."
            )
    scale = options.get("lr_scale", 1.0)
    group = {key: value for key, value in optimizer.param_groups[index].items() if key != "params"}
    for rate in ("lr", "initial_lr"):
        if rate in group:
            group[rate] = group[rate] * scale
    if "weight_decay" in options:
        group["weight_decay"] = options["weight_decay"]
    # Not add_param_group: it would reject parameters that the old group still holds.
    optimizer.param_groups.append({"params": params, **group, "peft_options": tuple(sorted(options.items()))})
    for scheduler in attached:
        for name in _PER_GROUP_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) > index:
                values.append(values[index] if name == "lr_lambdas" else values[index] * scale)


def _flat(scheduler: Any) -> list[Any]:
    """Return the scheduler, and those that a SequentialLR or ChainedScheduler holds instead of it."""
    inner = getattr(scheduler, "_schedulers", None)
    if inner is None:
        return [scheduler]
    return [leaf for s in inner for leaf in _flat(s)]
