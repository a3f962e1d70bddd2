"""Labelled tweets with MiniLM: LoRA against a trained head and against full fine-tuning, on the same budget of steps.

    python tests/benchmarks/tweets.py                      # seeds 0 1 2; 14 minutes a seed on two busy, stalling cores
    python tests/benchmarks/tweets.py 0

Three classes (negative, neutral, positive) that a small encoder does not tell apart perfectly. Every contender trains a new
classifier on the same rows in the same order, each with the learning rate that its strategy suggests (``lr="auto"``) unless one
is given. TF-IDF + logistic regression is the floor.
"""

from __future__ import annotations

import csv
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

import lightning_peft as lp  # noqa: E402

LABELS = ["negative", "neutral", "positive"]
TRAIN, TEST = 3000, 1500
STEPS, BATCH = 282, 32  # three passes over 3000 rows
CONTENDERS: dict[str, tuple[lp.PEFTStrategy, float | None]] = {
    "head": (lp.Head(), None),
    "lora": (lp.LoRA(rank=8, alpha=16, targets=("attention", "mlp")), None),
    "full": (lp.Full(), None),
}
"""Strategy and learning rate; None is the strategy's own."""


@dataclass(frozen=True)
class Score:
    """What one contender reached with one seed."""

    accuracy: float
    f1: float  # macro
    lr: float = float("nan")
    trained: int = 0
    parameters: int = 0  # of the model with its classifier, without what the adapter adds
    seconds: float = 0.0
    size: int = 0  # bytes of the adapter file


def sample(source: Path, seed: int, *, train: int = TRAIN, test: int = TEST) -> dict[str, list[dict[str, str]]]:
    """Return a random sample of the distinct texts; a text with two different labels is left out."""
    labels: dict[str, set[str]] = {}
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            labels.setdefault(row["text"], set()).add(row["label"])
    rows = [{"text": text, "label": next(iter(found))} for text, found in labels.items() if len(found) == 1]
    random.Random(seed).shuffle(rows)
    return {"test": rows[:test], "train": rows[test : test + train]}


def write(rows: Iterable[Mapping[str, str]], path: Path) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def train(
    base: Path,
    rows: Mapping[str, list[dict[str, str]]],
    strategy: lp.PEFTStrategy,
    *,
    seed: int,
    steps: int,
    lr: float | None = None,
) -> Score:
    """Train one contender and measure it on the rows that it has not seen."""
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        files = {split: write(rows[split], Path(folder) / f"{split}.csv") for split in ("train", "test")}
        data = lp.PEFTDataModule(
            data_path=files["train"],
            test_path=files["test"],
            task="sequence_classification",
            labels=LABELS,  # type: ignore[arg-type]
            max_length=96,
            truncation="right",
            val_fraction=0.0,
            batch_size=BATCH,
            length_grouped=True,
            seed=seed,
        )
        module = lp.PEFTLightningModule(
            strategy,
            str(base),
            task="sequence_classification",
            labels=LABELS,
            dtype="float32",
            lr="auto" if lr is None else lr,
            callback={"verbose": False},
        )
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", default_root_dir=folder, limit_val_batches=0, enable_checkpointing=False, **quiet
        )
        started = time.perf_counter()
        trainer.fit(module, data)
        seconds = time.perf_counter() - started
        peak = max(group["initial_lr"] for group in trainer.optimizers[0].param_groups)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        added = sum(p.numel() for name, p in module.base.named_parameters() if ".peft." in name)
        found = trainer.test(module, data, verbose=False)[0]
        size = (Path(folder) / "adapter" / "last" / "adapter.safetensors").stat().st_size
    parameters = sum(p.numel() for p in module.base.parameters()) - added
    return Score(found["test_accuracy"], found["test_f1"], peak, trained, parameters, seconds, size)


def floor(rows: Mapping[str, list[dict[str, str]]]) -> Score:
    """TF-IDF + logistic regression on the same rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    started = time.perf_counter()
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([row["text"] for row in rows["train"]], [row["label"] for row in rows["train"]])
    predicted, right = model.predict([row["text"] for row in rows["test"]]), [row["label"] for row in rows["test"]]
    seconds = time.perf_counter() - started
    return Score(float(accuracy_score(right, predicted)), float(f1_score(right, predicted, average="macro")), seconds=seconds)


def table(scores: Mapping[str, list[Score]]) -> str:
    """Return the means over seeds as text, with the accuracy of every seed."""
    lines = ["              accuracy  macro F1       lr     trained   share   seconds   adapter bytes   accuracy per seed"]
    for name, each in scores.items():
        accuracy, f1, seconds = (statistics.mean(getattr(s, field) for s in each) for field in ("accuracy", "f1", "seconds"))
        one, seeds = each[0], " ".join(f"{s.accuracy:.3f}" for s in each)
        line = f"{name:12s} {accuracy:10.3f}  {f1:8.3f} "
        if one.trained:
            line += (
                f"{one.lr:8.0e} {one.trained:11,d}  {one.trained / one.parameters:6.2%} {seconds:9.1f} {one.size:15,d}   {seeds}"
            )
        else:
            line += f"{'':28s}{seconds:9.1f} {'':15s}   {seeds}"
        lines.append(line)
    return "\n".join(lines)


def main(seeds: list[int]) -> None:
    from examples.assets import minilm, tweets

    base, source = minilm(), tweets()
    scores: dict[str, list[Score]] = {name: [] for name in ("TF-IDF + LR", *CONTENDERS)}
    for seed in seeds:
        rows = sample(source, seed)
        scores["TF-IDF + LR"].append(floor(rows))
        for name, (strategy, lr) in CONTENDERS.items():
            scores[name].append(train(base, rows, strategy, seed=seed, steps=STEPS, lr=lr))
            print(f"seed {seed}, {name}: {scores[name][-1]}", file=sys.stderr, flush=True)
        load = f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads"
        print(f"{len(scores['head'])} seeds, {STEPS} steps of {BATCH}, {TRAIN} rows to train, {TEST} to test; {load}")
        print(table(scores), flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [0, 1, 2])
