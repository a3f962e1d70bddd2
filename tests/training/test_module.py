"""PEFTLightningModule as a whole: lazy and eager bases, every stage, checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.errors import CompatibilityError, ConfigError
from lightning_peft.strategies.additive.houlsby import HoulsbyAdapter
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.surgery.handle import handles
from lightning_peft.training.callback import PEFTCallback
from lightning_peft.training.module import PEFTLightningModule
from tests.training import tiny
from tests.training.tiny import loader, ragged, tokenizer, trained, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A base model with its tokenizer in a local folder."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny.llama(attention_dropout=0.1)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """An encoder without a task head."""
    torch.manual_seed(0)
    transformers.BertModel(tiny.bert()).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def _batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [ragged([8, 5 + i], generator=generator) for i in range(count)]


def _classes():
    return [{**b, "labels": torch.tensor([i % 3, (i + 1) % 3])} for i, b in enumerate(_batches())]


def test_a_base_given_by_name_is_loaded_late_and_once(folder):
    module = PEFTLightningModule("lora", folder)
    assert module.base is None
    assert list(module.parameters()) == []
    module.configure_model()
    base = module.base
    module.configure_model()
    assert module.base is base
    assert base.training
    assert list(handles(base)) == ["default"]


def test_making_the_module_reads_nothing():
    module = PEFTLightningModule("lora", "no/such-model")  # would fail if it were loaded
    with pytest.raises(ConfigError, match="cannot load base='no/such-model'"):
        module.configure_model()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_works_alone(folder, stage):
    module = PEFTLightningModule("lora", folder, generation={"max_new_tokens": 3})
    result = getattr(trainer(), stage)(module, loader(_batches()))
    assert len(result) == (4 if stage == "predict" else 1)


def test_fit_twice_and_other_stages_between(folder):
    module = PEFTLightningModule("lora", folder)
    data = loader(_batches())
    trainer().fit(module, data)
    first = trained(module)
    trainer().validate(module, data, verbose=False)
    trainer().fit(module, data)
    assert all((trained(module)[n] != v).any() for n, v in first.items())


def test_the_untouched_base_goes_through_the_same_metrics(folder):
    data = loader(_batches())
    module = PEFTLightningModule(LoRA(init="pissa"), folder)
    plain = PEFTLightningModule("lora", folder)
    (zero_shot,) = trainer().validate(plain, data, verbose=False)  # LoRA changes nothing before the first step
    trainer(max_epochs=3).fit(module, data)
    (tuned,) = trainer().validate(module, data, verbose=False)
    with module.base_only():
        (base,) = trainer().validate(module, data, verbose=False)
    assert base == zero_shot
    assert tuned != base


def _saved(module, data, **options):
    run = trainer(max_epochs=2, enable_checkpointing=True, **options)
    run.fit(module, data)
    return run, run.checkpoint_callback.last_model_path or run.checkpoint_callback.best_model_path


@pytest.mark.parametrize("strategy", [LoRA(rank=2), "prefix_tuning", [LoRA(rank=2), HoulsbyAdapter(width=4)]], ids=str)
def test_a_checkpoint_loads_the_plain_lightning_way(folder, strategy):
    module = PEFTLightningModule(strategy, folder)
    _, path = _saved(module, loader(_batches()))
    again = PEFTLightningModule.load_from_checkpoint(path)
    assert again.strategy == module.strategy
    module.eval()
    again.eval()
    batch = _batches()[0]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(module(**inputs).logits, again(**inputs).logits)
    assert "base.model.embed_tokens.weight" not in torch.load(path, weights_only=True)["state_dict"]


def test_a_task_head_comes_back_with_the_checkpoint(encoder):
    module = PEFTLightningModule("lora", encoder, "sequence_classification", labels=["a", "b", "c"])
    _, path = _saved(module, loader(_classes()))
    assert module.extra_modules == ["base.classifier"]
    torch.manual_seed(1)  # a new head would start elsewhere
    again = PEFTLightningModule.load_from_checkpoint(path)
    assert torch.equal(again.base.classifier.weight, module.base.classifier.weight)
    assert again.labels == ["a", "b", "c"]
    broken = torch.load(path, weights_only=True)
    del broken["state_dict"]["base.classifier.weight"]
    torch.save(broken, path)
    with pytest.raises(CompatibilityError, match="classifier.weight"):
        PEFTLightningModule.load_from_checkpoint(path)


def test_labels_come_from_the_data_module_and_go_into_the_checkpoint(encoder):
    class Data(pl.LightningDataModule):
        labels = ["x", "y", "z"]

        def train_dataloader(self):
            return loader(_classes())

    module = PEFTLightningModule("lora", encoder, "sequence_classification")
    run = trainer(enable_checkpointing=True)
    run.fit(module, Data())
    again = PEFTLightningModule.load_from_checkpoint(run.checkpoint_callback.best_model_path)
    assert again.labels == ["x", "y", "z"]
    assert again.base.config.id2label == {0: "x", 1: "y", 2: "z"}


def test_a_module_that_was_given_a_model_needs_it_again(tmp_path):
    base = transformers.LlamaForCausalLM(tiny.llama())
    plain = copy.deepcopy(base)
    module = PEFTLightningModule("lora", base)
    assert module.handle.root is base  # at once
    _, path = _saved(module, loader(_batches()))
    with pytest.raises(ConfigError, match="base=model"):
        PEFTLightningModule.load_from_checkpoint(path)
    again = PEFTLightningModule.load_from_checkpoint(path, base=plain)
    assert all(torch.equal(v, trained(again)[n]) for n, v in trained(module).items())


@pytest.mark.parametrize("damage", ["missing", "renamed", "other base"])
def test_a_checkpoint_that_does_not_fit_is_refused(folder, damage, tmp_path):
    module = PEFTLightningModule(LoRA(rank=2), folder)
    _, path = _saved(module, loader(_batches()))
    broken = torch.load(path, weights_only=True)
    key = next(k for k in broken["state_dict"] if k.endswith("lora_A"))
    if damage == "missing":
        del broken["state_dict"][key]
    elif damage == "renamed":
        broken["state_dict"][key.replace("lora_A", "lora_C")] = broken["state_dict"].pop(key)
    else:
        torch.manual_seed(9)
        transformers.LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "other")
        broken["hyper_parameters"]["base"] = str(tmp_path / "other")
    torch.save(broken, path)
    with pytest.raises(CompatibilityError):
        PEFTLightningModule.load_from_checkpoint(path)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resume_is_exact(folder, tmp_path):
    data = loader(_batches())

    def run(seed, to, ckpt=None):
        pl.seed_everything(seed, verbose=False)
        module = PEFTLightningModule(LoRA(rank=2, dropout=0.1), folder)
        keep = ModelCheckpoint(tmp_path / to, filename="{epoch}", save_top_k=-1)
        trainer(max_epochs=4, callbacks=[keep], enable_checkpointing=True).fit(module, data, ckpt_path=ckpt)
        return trained(module)

    whole = run(3, "whole")
    resumed = run(99, "resumed", str(tmp_path / "whole" / "epoch=1.ckpt"))
    assert not (tmp_path / "resumed" / "epoch=1.ckpt").exists()  # it did not start anew
    assert all(torch.equal(v, resumed[n]) for n, v in whole.items())


def test_the_callback_is_added_once_and_the_users_own_is_kept(folder):
    module = PEFTLightningModule("lora", folder)
    run = trainer()
    run.fit(module, loader(_batches()))
    assert [c for c in run.callbacks if isinstance(c, PEFTCallback)] == [module.peft]
    own = PEFTCallback("lora", export=False)
    other = PEFTLightningModule("lora", folder)
    run = trainer(callbacks=[own])
    run.fit(other, loader(_batches()))
    assert [c for c in run.callbacks if isinstance(c, PEFTCallback)] == [own]
    assert list(handles(other.base)) == ["default"]
    with pytest.raises(ConfigError, match="the same strategy"):
        trainer(callbacks=[PEFTCallback(LoRA(rank=3))]).fit(PEFTLightningModule("lora", folder), loader(_batches()))


def test_options_of_the_callback_pass_through(folder):
    module = PEFTLightningModule("lora", folder, callback={"merge_on_end": True, "export": False})
    trainer().fit(module, loader(_batches()))
    assert module.handle.merged


def test_hyperparameters_are_plain_data_and_the_module_can_be_copied(folder):
    module = PEFTLightningModule(LoRA(rank=2), folder, optimizer=lambda g: torch.optim.SGD(g, lr=1.0), tokenizer=tokenizer())
    assert module.hparams["strategy"] == {"class_path": "LoRA", "init_args": {"rank": 2}}
    assert "optimizer" not in module.hparams
    assert "tokenizer" not in module.hparams
    pickle.dumps(dict(module.hparams))
    module.configure_model()
    module.optimizer = None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        inputs = torch.tensor([[5, 6, 7]])
        assert torch.equal(twin.eval()(input_ids=inputs).logits, module.eval()(input_ids=inputs).logits)
        assert twin.handle.root is twin.base
