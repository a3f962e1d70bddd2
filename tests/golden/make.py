"""Make the golden adapter of the installed version: `python tests/golden/make.py`. Run once per released version, then commit.

No number comes from a random generator: base, adapter and input follow a formula, and the expected output is computed here in
float64 from the equations of the papers (LoRA: W + alpha / r * B A; BitFit: another bias), without the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
RANK, ALPHA = 2, 3.0


def formula(*shape: int, shift: float) -> Tensor:
    """Return numbers of [-1, 1) that do not repeat, the same everywhere: the fractional parts of multiples of an irrational."""
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return ((steps * 0.6180339887498949 + shift) % 1.0 * 2 - 1).reshape(shape)


class Tiny(nn.Module):
    """Two linear layers with weights by formula."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(formula(*p.shape, shift=0.1 * i))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def given_input() -> Tensor:
    return formula(4, 6, shift=0.77)


def main() -> None:
    import lightning_peft as lp

    model = Tiny()
    handle = lp.inject(model, lp.Compose(parts=(lp.LoRA(rank=RANK, alpha=ALPHA, targets=["up", "down"]), lp.BitFit())))
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for i, (key, tensor) in enumerate(sorted(handle.state_dict().items())):
            tensor.copy_(formula(*tensor.shape, shift=0.05 * i))
            weights[key] = tensor.double()
    folder = lp.save_adapter(handle, HERE / lp.__version__)

    base = {name: p.double() for name, p in Tiny().named_parameters()}

    def linear(x: Tensor, layer: str) -> Tensor:
        a, b = (weights[f"{layer}.0.lora_{which}"] for which in "AB")
        return x @ (base[f"{layer}.weight"] + ALPHA / RANK * b @ a).T + weights[f"{layer}.bias"]

    expected = linear(torch.tanh(linear(given_input(), "up")), "down")
    (folder / "expected.json").write_text(json.dumps(expected.tolist(), indent=1) + "\n")


if __name__ == "__main__":
    main()
