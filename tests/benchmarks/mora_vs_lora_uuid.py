"""MoRA against LoRA at the same number of trained parameters, memorising random pairs of UUIDs (arXiv 2405.12130, section 4).

    python tests/benchmarks/mora_vs_lora_uuid.py                     # seeds 0 1 2; about 12 minutes on two quiet cores
    python tests/benchmarks/mora_vs_lora_uuid.py --seeds 0 --out runs/mora_vs_lora_uuid

SmolLM2-135M is given the 32 hexadecimal digits of one UUID and has to write those of another. Nothing can be inferred: each pair has
to be stored, which is what the paper says a high rank is for. Both methods see the same pairs in the same order with the same schedule
and the same learning rates. The loss is that of the value's tokens. The accuracy is of what the model writes by itself, greedily
(`generate`, no teacher): digits that stand at their place, so one wrong token can spoil all that follow; by chance 1/16.

Writes ``OUT.json`` (every loss, every accuracy) and, with matplotlib, the loss curves as ``OUT.png``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

import lightning.pytorch as pl  # noqa: E402

import lightning_peft as lp  # noqa: E402

RANK, PAIRS, STEPS, BATCH, LR = 8, 16, 60, 8, 1e-3
DIGITS = 32
CONTENDERS: dict[str, lp.PEFTStrategy] = {
    "lora": lp.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"),
    "mora": lp.MoRA(rank=RANK, targets="all-linear"),  # as many numbers as LoRA of this rank
}


@dataclass(frozen=True)
class Memory:
    """What one method with one seed has memorised.

    Args:
        losses: Mean loss per token of the values, step by step, in nats.
        accuracy: Share of the digits of the written values that are right.
        exact: Share of the values that are right as a whole.
        trained: Parameters that trained.
    """

    losses: list[float]
    accuracy: float
    exact: float
    trained: int


class Curve(pl.Callback):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def pairs(seed: int, count: int) -> list[dict[str, str]]:
    """Return pairs of random UUIDs as hexadecimal digits."""
    draw = random.Random(seed)
    return [{side: uuid.UUID(int=draw.getrandbits(128), version=4).hex for side in ("key", "value")} for _ in range(count)]


def score(written: Sequence[str], values: Sequence[str]) -> tuple[float, float]:
    """Return the share of digits at their place, and of values that are right as a whole."""
    texts = [text.strip() for text in written]
    right = sum(a == b for text, value in zip(texts, values, strict=True) for a, b in zip(text, value, strict=False))
    return right / sum(map(len, values)), sum(map(str.__eq__, texts, values)) / len(values)


def memorise(
    base: str,
    strategy: lp.PEFTStrategy,
    *,
    seed: int,
    count: int = PAIRS,
    steps: int = STEPS,
    batch: int = BATCH,
    lr: float = LR,
) -> Memory:
    """Train on pairs, then let the model write the value of every key."""
    pl.seed_everything(seed, verbose=False)
    rows, curve = pairs(seed, count), Curve()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shared = {"prompt": "{key}:", "completion": " {value}", "max_length": 160, "batch_size": batch, "seed": seed}
        data = lp.PEFTDataModule(data_path=str(file), predict_path=str(file), val_fraction=0.0, **shared)  # type: ignore[arg-type]
        module = lp.PEFTLightningModule(
            strategy,
            base,
            task="causal_lm",
            dtype="float32",
            lr=lr,
            warmup=0.1,
            lr_scheduler="linear",
            generation={"max_new_tokens": DIGITS + 2},
            callback={"verbose": False, "export": False},
        )
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            default_root_dir=folder,
            limit_val_batches=0,
            enable_checkpointing=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[curve],
        )
        trainer.fit(module, data)
        written = [text for texts in trainer.predict(module, data) or [] for text in texts]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Memory(curve.losses, *score(written, [row["value"] for row in rows]), trained)


def table(found: Mapping[str, list[Memory]]) -> str:
    """Return the means over seeds, and each seed's accuracy."""
    lines = ["method   trained   loss, last tenth of the steps   right digits   right values   right digits per seed"]
    for name, each in found.items():
        tail = [statistics.fmean(m.losses[-max(1, len(m.losses) // 10) :]) for m in each]
        seeds = " ".join(f"{m.accuracy:.3f}" for m in each)
        means = [f"{statistics.fmean(v):.3f}{_error(v)}" for v in (tail, [m.accuracy for m in each], [m.exact for m in each])]
        lines.append(f"{name:6s} {each[0].trained:9,d}   {means[0]:>29s}   {means[1]:>12s}   {means[2]:>12s}   {seeds}")
    return "\n".join(lines)


def _error(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""


def draw(found: Mapping[str, list[Memory]], path: Path) -> None:
    """Write the loss curves: each seed thin, the mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (name, each) in zip(("C0", "C1"), found.items(), strict=False):
        steps = range(1, len(each[0].losses) + 1)
        for memory in each:
            axes.plot(steps, memory.losses, color=color, linewidth=0.5, alpha=0.6)
        mean = [statistics.fmean(losses) for losses in zip(*(m.losses for m in each), strict=True)]
        accuracy = statistics.fmean(m.accuracy for m in each)
        axes.plot(steps, mean, color=color, label=f"{name}, {each[0].trained:,} parameters: {accuracy:.0%} of the digits right")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token of the value, nats")
    axes.legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None, *, base: str | None = None) -> dict[str, list[Memory]]:
    """Run the contenders in turn; each seed is reported as soon as both have it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--out", type=Path, default=Path("runs/mora_vs_lora_uuid"))
    options = parser.parse_args(arguments)
    if base is None:
        from examples.assets import smollm2

        base = str(smollm2())
    found: dict[str, list[Memory]] = {name: [] for name in CONTENDERS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name, strategy in CONTENDERS.items():
            sizes = {"count": options.pairs, "steps": options.steps, "lr": options.lr}
            found[name].append(memorise(base, strategy, seed=seed, **sizes))
        print(f"seed {seed}, {options.pairs} pairs, {options.steps} steps of {BATCH}, lr {options.lr:g}")
        print(table(found), flush=True)
        saved = {name: [asdict(memory) for memory in each] for name, each in found.items()}
        settings = {"pairs": options.pairs, "steps": options.steps, "batch": BATCH, "lr": options.lr, "rank": RANK}
        options.out.with_suffix(".json").write_text(json.dumps({"settings": settings, "methods": saved}))
    try:
        draw(found, options.out.with_suffix(".png"))
    except ImportError:
        print("no picture: pip install 'lightning-peft[charts]'", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
