"""PEFTLightningModule with PEFTDataModule: the tokenizer goes one way, batches and labels the other."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from lightning.pytorch.cli import LightningCLI

from lightning_peft.training.data import PEFTDataModule
from lightning_peft.training.module import PEFTLightningModule
from tests.training import tiny
from tests.training.tiny import trainer


@pytest.fixture
def rows(tmp_path):
    """Texts whose label is told by one word, easy enough for a tiny model."""
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"w{2 + i % 20} w{22 + i // 20}", "label": "w0" if i % 2 else "w1"} for i in range(80)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _data(rows, **options):
    task = {"prompt": "{text}", "completion": "label", "labels": ["w0", "w1"]}
    return PEFTDataModule(data_path=rows, batch_size=8, val_fraction=0.25, **{**task, **options})


@pytest.mark.filterwarnings("ignore:lr=.*what full usually trains with")  # nothing here was trained before
@pytest.mark.parametrize("answers", ["score", "generate"])
def test_a_language_model_learns_to_answer(folder, rows, answers):
    module = PEFTLightningModule("full", folder, answers=answers, lr=1e-2)
    data = _data(rows)
    (before,) = trainer().validate(module, data, verbose=False)
    run = trainer(max_epochs=20)
    run.fit(module, data)
    after = {k: float(v) for k, v in run.callback_metrics.items()}
    assert set(before) == {"val_loss", "val_perplexity", "val_accuracy", "val_f1"}
    assert after["val_loss"] < before["val_loss"] / 2
    assert after["val_accuracy"] > 0.9
    assert after["val_f1"] > 0.9
    texts = run.predict(module, _data(rows, predict_texts=["w2 w23", "w3 w23"]))
    assert [t.strip() for batch in texts for t in batch] == ["w1", "w0"]


def test_free_answers_count_as_exact_matches(folder, rows):
    module = PEFTLightningModule("lora", folder, answers="generate", generation={"max_new_tokens": 2})
    (scores,) = trainer().validate(module, _data(rows, labels=None, eval_prompts=True), verbose=False)
    assert set(scores) == {"val_loss", "val_perplexity", "val_exact_match"}


def test_classes_are_those_of_the_data(tmp_path, rows):
    transformers.BertModel(tiny.bert()).save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    module = PEFTLightningModule("lora", str(tmp_path / "bert"), "sequence_classification", lr=1e-3)
    data = PEFTDataModule(data_path=rows, task="sequence_classification", val_fraction=0.25, batch_size=8)
    run = trainer(max_epochs=1)
    run.fit(module, data)
    assert module.labels == ["w0", "w1"]
    assert {"val_accuracy", "val_f1", "val_loss"} <= set(run.callback_metrics)
    ((first, *_), *_) = run.predict(module, PEFTDataModule(task="sequence_classification", data_path=rows, predict_texts=["w2"]))
    assert set(first) == {"label", "score"}


@pytest.mark.filterwarnings(
    "ignore:LightningCLI.s args parameter", "ignore::DeprecationWarning"
)  # Lightning 2.6 under jsonargparse 4.53
def test_the_command_line_builds_optimizer_and_scheduler(folder, rows, tmp_path):
    arguments = [
        "fit",
        f"--model.base={folder}",
        "--model.strategy=lora",
        "--model.optimizer=torch.optim.Adam",  # bitsandbytes has an Adam too, once it is imported
        "--model.optimizer.lr=3e-4",
        "--model.lr_scheduler=StepLR",
        "--model.lr_scheduler.step_size=5",
        f"--data.data_path={rows}",
        "--data.batch_size=8",
        "--data.prompt={text}",
        "--data.completion=label",
        "--trainer.max_steps=2",
        "--seed_everything=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli = LightningCLI(PEFTLightningModule, PEFTDataModule, args=arguments, auto_configure_optimizers=False)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 3e-4
    path = cli.trainer.checkpoint_callback.best_model_path
    again = PEFTLightningModule.load_from_checkpoint(path)
    inputs = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.eval()(input_ids=inputs).logits, cli.model.eval()(input_ids=inputs).logits)
    assert again.optimizer is not None
