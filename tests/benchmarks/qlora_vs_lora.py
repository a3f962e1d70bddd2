"""QLoRA beside LoRA on the bf16 base: the same text, order, start of the adapter and steps; what the four bits cost in quality.

    python tests/benchmarks/qlora_vs_lora.py               # seeds 0 1 2
    python tests/benchmarks/qlora_vs_lora.py 0

SmolLM2-135M learns to write SMS messages: next-token loss on all tokens of packed messages, and on held-out messages, so that one
figure is a mean over thousands of tokens. Both run through ``PEFTLightningModule`` and ``Trainer.fit`` with sanity validation on: on
some CPUs bitsandbytes repacks its weights at the first forward in evaluation mode, which is exactly that one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

import lightning.pytorch as pl  # noqa: E402

import lightning_peft as lp  # noqa: E402

RANK, STEPS, BATCH, LENGTH = 16, 50, 4, 128
CLAIM = 0.03  # by which the mean loss of QLoRA may be above that of LoRA


@dataclass(frozen=True)
class Losses:
    """Mean loss per held-out token, in nats."""

    before: float
    after: float


def train(base: str, source: str, quantization: Mapping[str, Any] | None, *, seed: int, steps: int = STEPS) -> Losses:
    """Train on the messages of one split; ``quantization`` as :class:`lightning_peft.PEFTLightningModule` takes it."""
    pl.seed_everything(seed, verbose=False)
    data = lp.PEFTDataModule(
        data_path=source, packing=True, max_length=LENGTH, val_fraction=0.05, batch_size=BATCH, truncation="right", seed=seed
    )
    module = lp.PEFTLightningModule(
        lp.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"),
        base,
        task="causal_lm",
        dtype="bfloat16",
        quantization=None if quantization is None else dict(quantization),
        lr=5e-4,
        warmup=0.1,
        callback={"verbose": False},
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            precision="bf16-true",
            accelerator="cpu",
            default_root_dir=folder,
            num_sanity_val_steps=2,
            enable_checkpointing=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        after = trainer.validate(module, data, verbose=False)[0]["val_loss"]
        with module.handle.disabled():
            before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    return Losses(before, after)


def table(seeds: list[int], dense: list[Losses], stored: list[Losses]) -> str:
    """Return the losses of every seed, and how far the means are apart."""
    lines = ["seed   base bf16   LoRA    base NF4    QLoRA   QLoRA / LoRA"]
    for seed, a, b in zip(seeds, dense, stored, strict=True):
        lines.append(f"{seed:<6d} {a.before:9.4f}  {a.after:6.4f}   {b.before:8.4f}   {b.after:6.4f}   {b.after / a.after:10.4f}")
    means = [
        statistics.mean(getattr(losses, field) for losses in side) for side in (dense, stored) for field in ("before", "after")
    ]
    ratio = means[3] / means[1]
    lines.append(
        f"mean   {means[0]:9.4f}  {means[1]:6.4f}   {means[2]:8.4f}   {means[3]:6.4f}   {ratio:10.4f}  (claim: at most {1 + CLAIM})"
    )
    return "\n".join(lines)


def main(seeds: list[int]) -> None:
    from examples.assets import smollm2, sms_spam

    base, source = str(smollm2()), str(sms_spam())
    sides: dict[str, list[Losses]] = {"LoRA": [], "QLoRA": []}
    for seed in seeds:
        for name, quantization in (("LoRA", None), ("QLoRA", {"scheme": "nf4", "double_quant": True})):
            sides[name].append(train(base, source, quantization, seed=seed))
            print(f"seed {seed}, {name}: {sides[name][-1]}", file=sys.stderr, flush=True)
    print(table(seeds, sides["LoRA"], sides["QLoRA"]), flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [0, 1, 2])
