"""The quickstart beside a plain loop over HF peft: the same model, rows, batches, steps and hyperparameters; accuracy and speed.

    python tests/benchmarks/quickstart_vs_hf.py            # seeds 0 1 2; 9 minutes a seed on two busy, stalling cores
    python tests/benchmarks/quickstart_vs_hf.py 0

Ours is the real thing: ``configs/quickstart.yaml`` through LightningCLI and ``Trainer.fit``. The HF loop runs inside the same fit,
one step after each step of ours, so that whatever else the machine does hits both alike. Everything Lightning and our callback do
between two steps of HF counts as ours. Both fetch their batches from a loader of their own. HF starts from our initial values of A
and B, so that a difference in accuracy is a difference between the two trainings and not between two draws.

A machine that gives idle memory back to its host stalls for seconds on touching it again; this keeps the memory of both:

    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184 python tests/benchmarks/quickstart_vs_hf.py
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lightning_peft import LoRA  # noqa: E402
from lightning_peft.training.cli import PEFTCLI  # noqa: E402
from lightning_peft.training.data import PEFTDataModule  # noqa: E402
from lightning_peft.training.generation import answer_scores  # noqa: E402
from lightning_peft.training.metrics import F1, Accuracy  # noqa: E402
from lightning_peft.training.schedulers import scheduler  # noqa: E402

BLOCK = 1  # steps of one contender before the other has its turn; while it waits, its memory gets cold


class Clock:
    """Seconds of the wall and of all cores of this process since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class HFLoop:
    """The loop that people write: HF peft's LoRA, the model's own loss, AdamW, warm-up and cosine.

    Args:
        base: Folder of the model.
        lora: Rank and alpha.
        batches: Batches with ``input_ids``, ``attention_mask`` and ``labels``, without end.
        lr: Peak learning rate.
        warmup: Share of the steps.
        steps: Length of the schedule.
        start: Initial values, as ``<path of the layer>.lora_A`` and ``.lora_B``.
    """

    def __init__(
        self,
        base: str,
        lora: LoRA,
        batches: Iterator[dict[str, Any]],
        *,
        lr: float,
        warmup: float,
        steps: int,
        start: Mapping[str, Tensor],
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=sorted({layer.rpartition(".")[2] for layer in (name.rpartition(".")[0] for name in start)}),
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(plain, config)
        self.batches = batches
        factors = self.factors()
        assert factors.keys() == start.keys()
        for name, value in start.items():
            factors[name].data.copy_(value)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
        self.scheduler = scheduler(self.optimizer, "cosine", warmup=warmup, total=steps)
        self.model.train()

    def warm_up(self) -> None:
        """Run the kernels once, which sets up threads and memory; whoever came first would else pay for both."""
        ids = torch.ones(2, 8, dtype=torch.long)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.zero_grad()

    def run(self, steps: int) -> list[Tensor]:
        """Train for some steps and return the ``input_ids`` that were seen."""
        seen = []
        for batch in itertools.islice(self.batches, steps):
            loss = self.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            seen.append(batch["input_ids"])
        return seen

    def factors(self) -> dict[str, nn.Parameter]:
        """Return A and B of every adapted layer under the names that our files have."""
        named = dict(self.scored.named_parameters())
        return {name.removesuffix(".default.weight"): p for name, p in named.items() if ".lora_" in name}

    @property
    def scored(self) -> nn.Module:
        """The model without peft's outer wrapper, whose forward hides its arguments."""
        model: nn.Module = self.model.base_model.model
        return model


def endless(datamodule: PEFTDataModule) -> Iterator[dict[str, Any]]:
    """Yield the training batches of one epoch after the other, in the order in which the Trainer gets them."""
    loader = datamodule.train_dataloader()
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader  # type: ignore[misc]


@dataclass(eq=False)
class InTurn(pl.Callback):
    """Gives the rival its turn after every block of steps of the Trainer, and keeps both times per block.

    The callback must come last. ``blocks`` holds pairs (ours, theirs) of (wall, CPU) seconds.
    """

    rival: HFLoop | None = None
    make_rival: Any = None
    blocks: list[tuple[tuple[float, float], tuple[float, float]]] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    apart: float = 0.0  # seconds inside fit that are not ours

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clock = Clock()
        self.rival = self.make_rival()
        self.rival.warm_up()
        self.apart += clock.read()[0]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock = Clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(batch["input_ids"])
        if len(self.seen) < BLOCK and trainer.global_step < trainer.max_steps:
            return
        ours, clock = self.clock.read(), Clock()
        assert self.rival is not None
        theirs = self.rival.run(len(self.seen))
        self.blocks.append((ours, clock.read()))
        if not all(map(torch.equal, self.seen, theirs)):
            raise AssertionError("the two loops did not see the same batches")
        self.seen = []
        self.apart += clock.read()[0]
        self.clock = Clock()


@dataclass(frozen=True)
class Result:
    """What one seed gave; seconds are (wall, CPU)."""

    seed: int
    ours: tuple[float, float]  # accuracy, F1 of spam
    theirs: tuple[float, float]
    blocks: list[tuple[tuple[float, float], tuple[float, float]]]
    apart: float  # largest ||ours - theirs|| / ||theirs|| of a trained tensor
    fit: float  # Trainer.fit from its call to its return, less the rival's turns: set-up, checkpoint and export included

    def ratios(self, clock: int) -> list[float]:
        """Return ours / theirs of every block; ``clock`` is 0 for the wall, 1 for the CPU."""
        return [ours[clock] / theirs[clock] for ours, theirs in self.blocks]

    def seconds(self, contender: int) -> float:
        return sum(block[contender][0] for block in self.blocks)


@torch.no_grad()
def score(model: nn.Module, datamodule: PEFTDataModule) -> tuple[float, float]:
    """Return accuracy and F1 of the second label on the held-out rows: the likelier answer wins."""
    accuracy, f1 = Accuracy(), F1(len(datamodule.labels))
    model.eval()
    for batch in datamodule.test_dataloader():
        chosen = answer_scores(model, batch).argmax(-1)
        accuracy.update(chosen, batch["answer_labels"])
        f1.update(chosen, batch["answer_labels"])
    return float(accuracy.compute()), float(f1.compute())


def compare(seed: int, *arguments: str) -> Result:
    """Train both contenders with ``configs/quickstart.yaml`` and further arguments; ``seed`` sets split, order and start."""
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml"), f"--seed_everything={seed}", f"--data.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        config += [
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={folder}",
            f"--model.callback.export={folder}/adapter",
        ]
        cli = PEFTCLI([*config, *arguments], run=False)
        trainer, module, datamodule = cli.trainer, cli.model, cli.datamodule
        module.configure_model()  # both models are loaded outside the measured time
        options = {"lr": module.lr, "warmup": module.warmup, "steps": trainer.max_steps}
        start = {name: value.clone() for name, value in module.handle.state_dict().items()}
        turns = InTurn(
            make_rival=lambda: HFLoop(module.source.name, module.strategy, endless(datamodule), start=start, **options)
        )
        trainer.callbacks.append(turns)
        clock = Clock()
        trainer.fit(module, datamodule)
        fit = clock.read()[0] - turns.apart
    datamodule.setup("test")
    assert turns.rival is not None
    mine, yours = module.handle.state_dict(), turns.rival.factors()
    apart = max(float((mine[name] - value.detach()).norm() / value.detach().norm()) for name, value in yours.items())
    return Result(seed, score(module.base, datamodule), score(turns.rival.scored, datamodule), turns.blocks, apart, fit)


def spread(values: list[float]) -> str:
    """Return the median, and the middle half of the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def table(results: list[Result]) -> str:
    """Return the figures as text."""
    lines = ["seed   accuracy ours   HF       F1 ours   HF       seconds ours   HF      fit ours   loop ours / HF: wall, CPU"]
    for r in results:
        lines.append(
            f"{r.seed:<6d} {r.ours[0]:13.4f}   {r.theirs[0]:.4f}   {r.ours[1]:7.4f}   {r.theirs[1]:.4f}   {r.seconds(0):12.1f}   "
            f"{r.seconds(1):<6.1f}  {r.fit:8.1f}   {spread(r.ratios(0))}, {spread(r.ratios(1))}"
        )
    ours, theirs = ([statistics.mean(side[i] for side in sides) for i in (0, 1)] for sides in _sides(results))
    everything = [[x for r in results for x in r.ratios(clock)] for clock in (0, 1)]
    total = [sum(r.seconds(i) for r in results) for i in (0, 1)]
    fit = sum(r.fit for r in results)
    lines += [
        f"mean   {ours[0]:13.4f}   {theirs[0]:.4f}   {ours[1]:7.4f}   {theirs[1]:.4f}   {total[0]:12.1f}   {total[1]:<6.1f}  {fit:8.1f}   "
        f"{spread(everything[0])}, {spread(everything[1])}     (seconds: sums)",
        f"accuracy ours - HF {ours[0] - theirs[0]:+.4f} (claim: at least -0.005); trained tensors differ by at most "
        f"{max(r.apart for r in results):.1e} of their norm",
        f"training loop ours / HF: median of {len(everything[0])} blocks {statistics.median(everything[0]):.3f}, sums "
        f"{total[0] / total[1]:.3f}; the whole of Trainer.fit / HF's bare loop {fit / total[1]:.3f} (claim: the loop at most 1)",
        "ratios: median [middle half] over blocks of steps run in turn",
    ]
    return "\n".join(lines)


def _sides(results: list[Result]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    return [r.ours for r in results], [r.theirs for r in results]


def main(seeds: list[int]) -> None:
    from examples.assets import smollm2, sms_spam

    arguments = [f"--model.base={smollm2()}", f"--data.data_path={sms_spam()}"]
    results = []
    for seed in seeds:
        results.append(compare(seed, *arguments))
        print(f"seed {seed} done; load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads", file=sys.stderr, flush=True)
        print(table(results), flush=True)


if __name__ == "__main__":
    chosen = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
    del sys.argv[1:]  # LightningCLI warns when both are there
    main(chosen)
