"""Parameter groups: who owns a tensor decides its learning rate and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.handle import handles
from lightning_peft.training.shards import Shards

FAR = 10.0
"""A learning rate this many times away from the method's own makes a warning."""


def far_off(lr: float, strategy: PEFTStrategy) -> str | None:
    """Return a warning if ``lr`` is 10 times above or below the method's own, else None."""
    own = strategy.suggested[0]
    if lr > 0 and own / FAR < lr < own * FAR:
        return None
    return (
        f"lr={lr:g} is {'above' if lr > own else 'below'} {FAR:g} times what {strategy.info.name} usually trains with ({own:g} "
        "for Adam-like optimizers). Use lr='auto', or ignore this if you searched for it."
    )


def parameter_groups(
    module: nn.Module, *, weight_decay: float, extra_lr: float | None = None, wrapped: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Return the groups of all trainable parameters of ``module``, each parameter once.

    A tensor that a strategy owns gets the strategy's ``lr_scale`` and ``weight_decay`` for it; other trainable parameters, such as
    a task head, the plain values, or ``extra_lr``. Tensors with one dimension (biases, norms, vectors) do not decay unless their strategy says so.
    A group with a rate of its own carries it until :func:`set_rates`, since only the optimizer knows the plain one.

    Args:
        module: The module with adapters.
        weight_decay: Weight decay.
        extra_lr: Learning rate of what no strategy owns; None for the plain one.
        wrapped: What FSDP1 has made of the module: its slices of parameters do not tell how many dimensions these have.
    """
    shards = Shards(wrapped or module)

    def decay_of(parameter: nn.Parameter) -> float:
        return weight_decay if len(shards.shape(parameter)) > 1 else 0.0

    groups: dict[tuple[str, tuple[tuple[str, float], ...], float], list[nn.Parameter]] = {}
    taken: set[int] = set()
    for name, handle in handles(module).items():
        for slot in handle.trainable_slots():
            parameter = slot.tensor()
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                options = handle.strategy.group_options(slot)
                decay = options.get("weight_decay", decay_of(parameter))
                groups.setdefault((name, tuple(sorted(options.items())), decay), []).append(parameter)
                taken.add(id(parameter))
    for parameter in module.parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            rate = () if extra_lr is None else (("lr", extra_lr),)
            groups.setdefault(("extra", rate, decay_of(parameter)), []).append(parameter)
    return [_group(*key, parameters) for key, parameters in groups.items()]


def _group(owner: str, options: tuple[tuple[str, float], ...], decay: float, parameters: list[nn.Parameter]) -> dict[str, Any]:
    shown = "".join(f"-{key}_{value:g}" for key, value in options if key != "weight_decay")
    group: dict[str, Any] = {"params": parameters, "weight_decay": decay, "name": f"{owner}{shown}-decay_{decay:g}"}
    if options:
        group["peft_options"] = options  # tells PEFTCallback that this group is split already
    return group


def set_rates(optimizer: Optimizer, lr: float | None) -> None:
    """Give every group its learning rate: its own, or ``lr`` (the optimizer's where that is None) times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        options = dict(group.get("peft_options", ()))
        plain = group["lr"] if lr is None else lr
        group["lr"] = options.get("lr", plain * options.get("lr_scale", 1.0))
