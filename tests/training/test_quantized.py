"""Quantized bases in Lightning: quantize, inject, train, resume; sanity validation is on, which repacks weights of bitsandbytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError, PEFTError, TargetError, UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.preparation import preparation_of
from lightning_peft.training.serve import generate_text, merge_adapter
from tests.training import tiny
from tests.training.toys import (
    EarlyOptimizer,
    InConfigureModel,
    InSetup,
    Interrupt,
    Plain,
    adapter_state,
    callback,
    loader,
    same,
    trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
LORA = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0", "3"], "dropout": 0.1}}
ALL_LINEAR = {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1, "targets": "all-linear"}}
SIZES = dict(vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)


class Language(pl.LightningModule):
    """A transformers model in a user's own module, with a loss per step and shuffled data."""

    def __init__(self, kind: str = "llama") -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = MODELS[kind]()

    def step(self, ids: Tensor) -> Tensor:
        labels = ids if self.net.config.model_type in ("llama", "gpt2") else ids[:, 0] % 2
        return self.net(input_ids=ids, labels=labels).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    def train_dataloader(self) -> Any:
        ids = torch.randint(4, 48, (16, 6), generator=torch.Generator().manual_seed(7))
        return DataLoader(ids, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(torch.randint(4, 48, (4, 6), generator=torch.Generator().manual_seed(8)), batch_size=4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _llama() -> nn.Module:
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **special, num_key_value_heads=1, attention_dropout=0.1)
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    )


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=32, pad_token_id=1, num_labels=2)
    return transformers.RobertaForSequenceClassification(config)


def _deberta() -> nn.Module:
    relative = dict(relative_attention=True, max_relative_positions=8, pos_att_type=["p2c", "c2p"], share_att_key=True)
    config = transformers.DebertaV2Config(**SIZES, **relative, max_position_embeddings=32, num_labels=2, pad_token_id=0)
    return transformers.DebertaV2ForSequenceClassification(config)


MODELS = {"llama": _llama, "gpt2": _gpt2, "roberta": _roberta, "deberta": _deberta}


def quantized(module: nn.Module) -> list[str]:
    return [path for path, m in module.named_modules() if backend_of(m) is not None]


def codes(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in quantized(module):
        layer = module.get_submodule(path)
        found |= {f"{path}/{k}": v.clone() for k, v in backend_of(layer).state(layer).items()}
    return found


def fit(folder: Path, module: Any, strategy: Any, *extra: Any, path: Any = None, data: Any = None, **options: Any) -> Any:
    """Fit four epochs, sanity validation on; return the Trainer."""
    torch.manual_seed(11)
    run_options = {"max_epochs": 4, "enable_checkpointing": True, "num_sanity_val_steps": 2}
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, filename="{step}")
    run = trainer(folder, callback(strategy, **options), *extra, checkpoints, **run_options)
    try:
        run.fit(module, *([] if data is None else [data]), ckpt_path=path)
    except SystemExit:
        assert any(isinstance(e, Interrupt) for e in extra)
    return run


# ---- training and resuming


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("llama", "nf4"), ("llama", "int8"), *(pytest.param(k, "nf4", marks=pytest.mark.slow) for k in MODELS if k != "llama")],
)
def test_an_interrupted_run_is_the_uninterrupted_one(kind, scheme, tmp_path):
    strategy = ALL_LINEAR
    whole = Language(kind)
    fit(tmp_path / "whole", whole, strategy, quantization=scheme)
    assert quantized(whole)
    fresh = lp.quantize(Language(kind).net, scheme)
    assert same({k.removeprefix("net."): v for k, v in codes(whole).items()}, codes(fresh))  # training never touches a code
    moved = [v for k, v in adapter_state(whole).items() if k.endswith("lora_B")]
    assert moved
    assert all(v.abs().max() > 0 for v in moved)
    fit(tmp_path / "part", Language(kind), strategy, Interrupt(9), quantization=scheme)
    resumed = Language(kind)
    fit(tmp_path / "rest", resumed, strategy, path=tmp_path / "part" / "step=8.ckpt", quantization=scheme)
    assert same(adapter_state(whole), adapter_state(resumed))
    assert same(codes(whole), codes(resumed))
    file = torch.load(tmp_path / "part" / "step=8.ckpt", weights_only=True)
    assert all("peft" in key.split(".") for key in file["state_dict"])


@pytest.mark.parametrize("make", [Plain, InConfigureModel, InSetup])
@pytest.mark.parametrize("backend", ["bitsandbytes", pytest.param("torch", marks=pytest.mark.slow)])
def test_modules_built_early_or_late_train_and_resume(make, backend, tmp_path):
    asked = {"scheme": "nf4", "backend": backend}
    whole = make()
    fit(tmp_path / "whole", whole, LORA, quantization=asked, data=loader())
    assert quantized(whole) == ["net.0", "net.3"]
    fit(tmp_path / "part", make(), LORA, Interrupt(9), quantization=asked, data=loader())
    resumed = make()
    fit(tmp_path / "rest", resumed, LORA, path=tmp_path / "part" / "step=8.ckpt", quantization=asked, data=loader())
    assert same(adapter_state(whole), adapter_state(resumed))


def test_every_stage_quantizes_once(tmp_path):
    module = Plain()
    run = fit(tmp_path, module, LORA, quantization="nf4", data=loader())
    before, first = codes(module), module.net[0]
    run.test(module, loader(shuffle=False))
    for again in ("second", "third"):
        fit(tmp_path / again, module, LORA, quantization="nf4", data=loader())
    other = trainer(tmp_path, callback(LORA, quantization="nf4"))
    other.validate(module)
    assert module.net[0] is first
    assert same(codes(module), before)


def test_an_adapter_goes_on_from_the_dense_base_to_the_quantized_one_and_back(tmp_path):
    dense, low = Language(), Language()
    fit(tmp_path / "dense", dense, ALL_LINEAR)
    fit(tmp_path / "low", low, ALL_LINEAR, quantization="nf4")
    ids = next(iter(dense.val_dataloader()))
    for trained, source in ((dense, "dense"), (low, "low")):
        path = tmp_path / source / "step=16.ckpt"
        onto_low, onto_dense = lp.quantize(Language().net), Language().net
        for base in (onto_low, onto_dense):
            handle = lp.load_adapter(base, path)
            assert same(handle.state_dict(), lp.handles(trained)["default"].state_dict())
        a, b = onto_low.eval()(ids).logits, onto_dense.eval()(ids).logits
        assert (a - b).norm() / b.norm() < 0.35  # the same function up to the rounding of the base
    assert codes(low)


def test_the_checkpoint_comes_back_into_the_users_class(tmp_path):
    module = Language()
    fit(tmp_path, module, ALL_LINEAR, quantization={"scheme": "nf4", "skip": ["net.model.layers.0.mlp"]})
    assert len(quantized(module)) == 11
    loaded = lp.load_from_checkpoint(Language, tmp_path / "step=16.ckpt")
    assert same(codes(module), codes(loaded))
    assert same(adapter_state(module), adapter_state(loaded))
    ids = next(iter(module.val_dataloader()))
    assert torch.equal(module.eval().net(ids).logits, loaded.eval().net(ids).logits)


def test_layers_that_bitsandbytes_quantized_survive_sanity_validation(tmp_path):
    """S1: without care, the first eval forward repacks them on some CPUs, and the adapters never move."""
    import bitsandbytes

    class Theirs(Language):
        def __init__(self) -> None:
            super().__init__()
            for path, layer in list(self.net.named_modules()):
                if type(layer) is nn.Linear and path != "lm_head":
                    new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
                    new.load_state_dict(layer.state_dict())
                    self.net.set_submodule(path, new.to("cpu"))

    module = Theirs()
    before = codes(module)
    fit(tmp_path, module, ALL_LINEAR)
    assert all(v.abs().max() > 0 for k, v in adapter_state(module).items() if k.endswith("lora_B"))
    assert same(codes(module), before)


def test_extra_modules_stay_dense_and_train(tmp_path):
    module = Plain()
    strategy = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0"]}}
    before = module.net[3].weight.detach().clone()
    fit(tmp_path, module, strategy, extra_modules=["net.3"], quantization="nf4", data=loader())
    assert quantized(module) == ["net.0"]
    assert not torch.equal(module.net[3].weight, before)
    loaded = lp.load_from_checkpoint(Plain, tmp_path / "step=16.ckpt")
    assert quantized(loaded) == ["net.0"]
    assert torch.equal(loaded.net[3].weight, module.net[3].weight)


@pytest.mark.parametrize("into", ["requantize", "dense"])
def test_merge_on_end_says_what_becomes_of_the_codes(into, tmp_path):
    module = Plain()
    strategy = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0", "3"]}}
    fit(tmp_path, module, strategy, quantization="nf4", merge_on_end=into, data=loader())
    assert lp.handles(module)["default"].merged
    assert bool(quantized(module)) == (into == "requantize")
    adapted = lp.load_from_checkpoint(Plain, tmp_path / "step=16.ckpt")
    x = torch.randn(4, 32)
    error = (module.eval()(x) - adapted.eval()(x)).norm() / adapted(x).norm()
    assert error < (0.5 if into == "requantize" else 1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("backend", ["bitsandbytes", "torch"])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_the_codes_survive_a_cast(precision, backend, scheme, tmp_path):
    module = Plain()
    fresh = lp.quantize(Plain().net, scheme, backend=backend)
    run = trainer(tmp_path, callback(LORA, quantization={"scheme": scheme, "backend": backend}), precision=precision)
    run.fit(module, loader())
    ours, theirs = codes(module.net), codes(fresh)
    integers = [k for k, v in theirs.items() if not v.is_floating_point()]
    assert integers
    assert all(torch.equal(ours[k], theirs[k]) for k in integers if "quant_state" not in k)
    assert all(v.dtype == torch.float32 for k, v in adapter_state(module).items() if "lora" in k)


# ---- refusals


def test_an_optimizer_that_exists_is_refused(tmp_path):
    module = EarlyOptimizer()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ConflictError, match="an optimizer .AdamW. holds parameters of Sequential already"):
        fit(tmp_path, module, LORA, quantization="nf4", data=loader())
    assert quantized(module) == []
    assert same(dict(module.state_dict()), before)


def test_an_adapter_that_is_there_is_refused(tmp_path):
    module = Plain()
    callback(LORA).apply(module)
    with pytest.raises(ConflictError, match="the base is dense. Quantize before injecting"):
        callback(LORA, quantization="nf4").apply(module)
    assert quantized(module) == []


def test_another_storage_is_refused():
    module = Plain()
    lp.quantize(module.net, "nf4")
    with pytest.raises(ConflictError, match="quantized already as .*nf4.* asks for .*fp4"):
        callback(LORA, quantization="fp4").apply(module)
    callback(LORA, quantization="nf4").apply(module)  # the same one is used as it is
    assert quantized(module) == ["net.0", "net.3"]


def test_a_wrong_target_is_found_while_the_weights_are_there():
    module = Plain()
    wrong = {"class_path": "LoRA", "init_args": {"targets": ["nothing"]}}
    with pytest.raises(TargetError, match="nothing"):
        callback(wrong, quantization="nf4").apply(module)
    assert quantized(module) == []


def test_a_method_that_trains_base_weights_is_refused():
    module = Plain()
    with pytest.raises(UnsupportedLayerError, match="Full trains '0.weight' itself"):
        callback("full", quantization="nf4").apply(module)
    assert quantized(module) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "nf5"}, "Did you mean 'nf4'"),
        ({"quantization": {"scheme": "nf4", "blocksize": 64}}, "Did you mean 'block_size'"),
        ({"quantization": "nf4", "checkpoint": "full"}, "checkpoint='full' with quantization"),
        ({"merge_on_end": "requantise"}, "none of false, true, 'requantize', 'dense'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        callback(LORA, **options)


def test_a_full_checkpoint_of_a_quantized_base_is_refused():
    module = Plain()
    lp.quantize(module.net)
    with pytest.raises(ConfigError, match="checkpoint='full' with a quantized base"):
        callback(LORA, checkpoint="full").apply(module)
    assert lp.handles(module) == {}


def test_a_merge_that_would_fail_after_training_is_refused_before(tmp_path):
    with pytest.raises(ConfigError, match="merge_on_end='requantize' .*or 'dense'"):
        fit(tmp_path, Plain(), LORA, quantization="nf4", merge_on_end=True, data=loader())


def test_a_precision_that_would_cast_the_codes_is_refused(tmp_path):
    run = trainer(tmp_path, callback(LORA, quantization={"scheme": "nf4", "storage_dtype": "float32"}), precision="bf16-true")
    with pytest.raises(ConfigError, match="would cast the codes of '0', which lie in float32"):
        run.fit(Plain(), loader())


def test_a_dense_checkpoint_from_before_peft_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.fit(Plain(), loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(CompatibilityError, match="holds dense weights, and 'net.0' is quantized"):
        fit(tmp_path / "low", Plain(), LORA, quantization="nf4", data=loader(), path=tmp_path / "dense.ckpt")


# ---- LoftQ


def test_an_adapter_loads_only_on_a_base_that_was_prepared_the_same_way(tmp_path):
    asked = {"scheme": "nf4", "loftq": {"rank": 2, "iterations": 3}}
    module = Plain()
    fit(tmp_path, module, LORA, quantization=asked, data=loader())
    assert preparation_of(module.net)
    path = tmp_path / "step=16.ckpt"
    for base in (Plain().net, lp.quantize(Plain().net)):
        with pytest.raises(CompatibilityError, match="with the preparation .*'iterations': 3.* has no preparation"):
            lp.load_adapter(base, path)
    with pytest.raises(CompatibilityError, match="'iterations': 3.*'iterations': 2"):
        lp.load_adapter(lp.quantize(Plain().net, loftq={"rank": 2, "iterations": 2}), path)
    handle = lp.load_adapter(lp.quantize(Plain().net, asked), path)
    assert same(handle.state_dict(), lp.handles(module)["default"].state_dict())
    handle.remove()
    loaded = lp.load_from_checkpoint(Plain, path)
    assert preparation_of(loaded.net) == preparation_of(module.net)
    resumed = Plain()
    fit(tmp_path / "more", resumed, LORA, quantization=asked, data=loader(), path=path)
    with pytest.raises(CompatibilityError, match="preparation"):
        fit(tmp_path / "more", Plain(), LORA, quantization="nf4", data=loader(), path=path)


def test_one_iteration_is_no_preparation(tmp_path):
    module = Plain()
    fit(tmp_path, module, LORA, quantization={"loftq": {"rank": 2}}, data=loader())
    lp.load_adapter(Plain().net, tmp_path / "step=16.ckpt")


# ---- PEFTLightningModule


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    _llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    return tiny.loader([tiny.ragged([8, 5 + i], generator=generator) for i in range(4)])


def test_a_base_by_name_is_quantized_while_it_is_read(folder, tmp_path):
    module = lp.PEFTLightningModule(ALL_LINEAR, folder, quantization="nf4", callback={"export": str(tmp_path / "out")})
    run = tiny.trainer(num_sanity_val_steps=2, max_epochs=2)
    run.fit(module, _batches(), _batches())
    assert len(quantized(module)) == 14
    assert lp.quantization_report(module.base) is not None
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    again = lp.PEFTLightningModule.load_from_checkpoint(path)
    assert same(codes(module), codes(again))
    assert same(adapter_state(module), adapter_state(again))
    run.validate(module, _batches())


def test_a_given_model_is_quantized_too(tmp_path):
    module = lp.PEFTLightningModule(ALL_LINEAR, _llama(), quantization={"scheme": "int8"})
    assert len(quantized(module)) == 14
    tiny.trainer(num_sanity_val_steps=2).fit(module, _batches(), _batches())
    assert lp.PEFTLightningModule(ALL_LINEAR, _llama(), quantization=lp.Quantization()).hparams["quantization"]["scheme"] == "nf4"


def test_a_new_head_is_not_quantized(tmp_path):
    torch.manual_seed(0)
    transformers.BertForMaskedLM(tiny.bert()).save_pretrained(tmp_path)  # without a pooler
    tiny.tokenizer().save_pretrained(tmp_path)
    module = lp.PEFTLightningModule("lora", str(tmp_path), task="sequence_classification", labels=["a", "b"], quantization="nf4")
    generator = torch.Generator().manual_seed(0)
    rows = [{**tiny.ragged([8, 5 + i], generator=generator), "labels": torch.tensor([i % 2, 1])} for i in range(4)]
    tiny.trainer(num_sanity_val_steps=2).fit(module, tiny.loader(rows), tiny.loader(rows))
    assert len(quantized(module)) == 12
    assert not any("pooler" in path or "classifier" in path for path in quantized(module))
    assert module.base.bert.pooler.dense.weight.requires_grad


def test_an_exported_adapter_is_served_on_the_base_it_was_trained_on(folder, tmp_path):
    module = lp.PEFTLightningModule(ALL_LINEAR, folder, quantization="nf4", callback={"export": str(tmp_path / "out")})
    tiny.trainer(max_epochs=1).fit(module, _batches())
    adapter = tmp_path / "out" / "last"
    assert generate_text(adapter, ["w1 w2"], raw=True, max_new_tokens=2)
    merged = merge_adapter(adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert quantized(plain) == []


def test_a_quantized_folder_trains(folder, tmp_path):
    model = lp.quantize(transformers.AutoModelForCausalLM.from_pretrained(folder))
    lp.save_quantized(model, tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    module = lp.PEFTLightningModule(ALL_LINEAR, str(tmp_path / "small"))
    tiny.trainer(num_sanity_val_steps=2).fit(module, _batches(), _batches())
    assert codes(module.base).keys() == codes(model).keys()
    assert same(codes(module.base), codes(model))
    with pytest.raises(PEFTError, match="quantized already"):
        lp.PEFTLightningModule(ALL_LINEAR, str(tmp_path / "small"), quantization="nf4").configure_model()


def test_a_deep_copy_trains_on_its_own(tmp_path):
    module = Plain()
    callback(LORA, quantization="nf4").apply(module)
    twin = copy.deepcopy(module)
    before = adapter_state(twin)
    fit(tmp_path, module, LORA, quantization="nf4", data=loader())
    assert same(adapter_state(twin), before)
