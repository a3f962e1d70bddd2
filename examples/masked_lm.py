"""Fine-tune a BERT-like model on your own texts with LoRA, then let it fill in a mask: load, data, strategy, fit, predict.

``python examples/masked_lm.py`` takes the MiniLM encoder and the SMS messages that PyPI packages ship. MiniLM comes without a
language-model head, so a new one trains beside the adapter; with ``bert-base-uncased`` in its place only the adapter would train.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

import lightning_peft as lp  # noqa: E402

TEXTS = ["I will call you [MASK] .", "You have [MASK] a prize !"]


def main(base: str, data: str, *, steps: int = 150, folder: str = "runs/masked_lm") -> dict[str, list[str]]:
    """Run the five steps on a model folder and a CSV with a column ``text``; return each text with its words for the mask."""
    # 1. The model, and 3. the strategy that adapts it.
    strategy = lp.LoRA(rank=8, targets=["attention", "mlp"])
    module = lp.PEFTLightningModule(strategy, base=base, task="masked_lm", lr=1e-3)

    # 2. The data: whole words are masked, anew in every epoch.
    options = {"task": "masked_lm", "text_column": "text", "max_length": 64, "truncation": "right"}
    texts = lp.PEFTDataModule(data_path=data, val_fraction=0.05, batch_size=32, **options)

    # 4. Fit: 20 validation batches before and after show what was learned.
    trainer = pl.Trainer(
        max_steps=steps,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        limit_val_batches=20,
        val_check_interval=1.0,
        logger=False,
    )
    trainer.validate(module, texts)
    trainer.fit(module, texts)
    trainer.validate(module, texts)

    # 5. Predict the mask.
    words = trainer.predict(module, lp.PEFTDataModule(predict_texts=TEXTS, **options))
    found = dict(zip(TEXTS, (row for batch in words for row in batch), strict=True))
    for text, word in found.items():
        print(f"{text}  ->  {', '.join(word)}")
    return found


if __name__ == "__main__":
    from examples.assets import minilm, sms_spam

    main(str(minilm()), str(sms_spam()))
