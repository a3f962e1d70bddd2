"""Trains with gradient checkpointing in two forked processes. Run by a test in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.child_processes import RanksAgree
from tests.training.language import LORA, Language, Watch, batches
from tests.training.toys import adapter_state, callback, trainer


class Ran(Watch):
    """In the children, where the training is."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.blocks["train"] == ["net.model.layers.0", "net.model.layers.1"] * self.expected
        assert set(self.runs["train"].values()) == {2 * (1 + self.expected)}  # two batches of four on each rank

    expected = True


class Plain(Ran):
    expected = False


def main(folder: Path) -> None:
    trained = []
    for checkpointing, watch in ((False, Plain()), (True, Ran())):
        torch.manual_seed(0)
        module, peft = Language(), callback(LORA, gradient_checkpointing=checkpointing)
        peft.apply(module)
        torch.manual_seed(1)
        trainer(folder, peft, RanksAgree(), watch, strategy="ddp_fork", devices=2).fit(module, batches())
        trained.append(adapter_state(module))
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=0, atol=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("two processes agree")
