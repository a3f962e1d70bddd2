"""A PEFT method of your own, in one file of your own package: every layer's input is scaled, channel by channel.

``h = W (exp(c tanh(s)) ⊙ x) + b`` with one trained number ``s`` for each input channel, which starts at zero: the identity.

Say in the `pyproject.toml` of your package where it is; nothing of lightning_peft is touched:

    [project.entry-points."lightning_peft.methods"]
    input_scaling = "my_package.own_method:InputScaling"

From then on `lightning-peft methods` lists it, `strategy: input_scaling` in a YAML means it, and the callback, checkpoints, adapter
folders, `merge`, `estimate`, `compare` and compositions with other methods work. As a script this file trains it on a toy:

    python examples/own_method.py
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.authoring import Anatomy, BaseLayer, BuildContext, MergeableModule, Plan, adapt, require

# ---------------------------------------------------------------------- the mathematics: one layer


class ScaledInput(MergeableModule):
    """The adapter of one layer: ``input_scale`` s (in,)."""

    def __init__(self, context: BuildContext, *, limit: float) -> None:
        super().__init__(context)
        self.limit = limit
        self.input_scale = context.empty(context.spec.in_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.input_scale)

    def factors(self) -> Tensor:
        """Return exp(c tanh(s)), (in,)."""
        return torch.exp(self.limit * torch.tanh(self.input_scale))

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): what the layer does with its input scaled, however its weight is stored."""
        return base((x * self.factors()).to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same as a change of the weight (out, in)."""
        return (weight * self.factors()).to(weight.dtype), bias


# ---------------------------------------------------------------------- the method: what it changes in a model


@lp.register(
    name="input_scaling",
    family="additive",
    summary="Scales the input of every layer, channel by channel.",
    paper="none; an example",
    lr=1e-2,
    mergeable=True,
    layer_kinds=frozenset({"linear"}),
    default_roles=("attention", "mlp"),
)
@dataclass(frozen=True, kw_only=True)
class InputScaling(lp.PEFTStrategy):
    """A learned scale on the input of layers.

    Args:
        limit: c: no factor leaves the range from exp(-c) to exp(c).
    """

    limit: float = 1.0

    def validate(self) -> None:
        require(self.limit > 0, self, "limit", "it must be above 0")

    def plan(self, anatomy: Anatomy) -> Plan:
        build = functools.partial(ScaledInput, limit=self.limit)
        return Plan(tuple(adapt(site, build) for site in self.sites(anatomy)))


def main(steps: int = 200) -> tuple[float, float]:
    """Fit the scales of a small network to those of another one; return the loss before and after."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    x, scales = torch.randn(256, 8), torch.linspace(0.5, 2.0, 8)
    wanted = net(x * scales).detach()
    handle = lp.inject(net, InputScaling(targets="all-linear"))
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=InputScaling.info.lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(net(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    handle.merge()
    print(f"{handle.num_trainable()} parameters: loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
