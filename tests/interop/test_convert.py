"""Conversions: to LoRA, from checkpoints, out of a LightningModule, on the command line; what inspect --for says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, FormatError, MergeError
from lightning_peft.interop import load_hf, push, save_hf, suitability
from lightning_peft.training.cli import main
from tests.backbones import BACKBONES, run
from tests.interop.peers import (
    Case,
    assert_same_tensors,
    close,
    config_of,
    fresh,
    hf_load,
    hf_model,
    hf_save,
    logits,
    shake,
    tensors_of,
)

TARGETS = ["q_proj", "down_proj"]
AS_LORA: dict[str, tuple[lp.PEFTStrategy, int | None]] = {
    "lora": (lp.LoRA(rank=3, alpha=4.0, targets=TARGETS, rank_per_target={"q_proj": 2}), 3),
    "vera": (lp.VeRA(rank=4, targets=TARGETS), 4),
    "loha": (lp.LoHa(rank=2, targets=TARGETS), 4),
    "hra": (lp.HRA(rank=4, targets=TARGETS), 4),
    "mora": (lp.MoRA(rank=1, targets=TARGETS), None),
    "lokr": (lp.LoKr(rank=2, targets=TARGETS), None),
    "dora": (lp.DoRA(rank=2, targets=TARGETS), None),
    "oft": (lp.OFT(block_size=4, targets=TARGETS), None),
    "two loras": (lp.Compose(parts=(lp.LoRA(rank=2, targets=TARGETS), lp.LoRA(rank=1, targets=["q_proj"]))), 3),
}


@pytest.mark.parametrize(("strategy", "rank"), AS_LORA.values(), ids=AS_LORA)
def test_as_lora(strategy: lp.PEFTStrategy, rank: int | None, tmp_path: Path) -> None:
    model = fresh("llama")
    handle = lp.inject(model, strategy)
    shake(handle.trainable_parameters())
    model.eval()
    expected = logits(model, "llama")
    export = save_hf(handle, tmp_path / "exact", as_lora=True)
    assert export.peft_type == "LORA"
    assert max(export.errors.values()) < 1e-6
    if rank is not None:
        assert config_of(tmp_path / "exact")["r"] == rank
    close(logits(hf_load("llama", tmp_path / "exact"), "llama"), expected)
    cut = save_hf(handle, tmp_path / "cut", as_lora=1)
    assert config_of(tmp_path / "cut")["r"] == 1
    # Eckart and Young: what the SVD leaves out is the norm of the other singular values.
    entry = handle.entries[-1]
    if hasattr(entry.adapter, "delta") and not isinstance(strategy, (lp.DoRA, lp.Compose)):
        values = torch.linalg.svdvals(entry.adapter.delta().detach().double())  # type: ignore[operator]
        assert cut.errors[entry.path] == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-4)


def test_as_lora_of_fused_parts_and_embeddings(tmp_path: Path) -> None:
    model = fresh("gpt2")
    handle = lp.inject(model, lp.DoRA(rank=2))
    shake(handle.trainable_parameters())
    expected = logits(model, "gpt2")
    save_hf(handle, tmp_path / "parts", as_lora=True)
    close(logits(hf_load("gpt2", tmp_path / "parts"), "gpt2"), expected)
    handle.remove()
    handle = lp.inject(model, lp.DoRA(rank=2, targets=["wte"]))
    shake(handle.trainable_parameters())
    expected = logits(model, "gpt2")
    save_hf(handle, tmp_path / "embedding", as_lora=True)
    close(logits(hf_load("gpt2", tmp_path / "embedding"), "gpt2"), expected)


def test_as_lora_of_what_changes_no_weights(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no change of weights"):
        save_hf(lp.inject(fresh("llama"), lp.PromptTuning(num_virtual_tokens=2)), tmp_path / "prompt", as_lora=True)
    both = lp.inject(fresh("llama"), [lp.LoRA(rank=2), lp.HoulsbyAdapter()])
    with pytest.raises(MergeError, match="has a Bottleneck.*no change of weights"):
        save_hf(both, tmp_path / "both", as_lora=True)
    assert not list(tmp_path.iterdir())
    handle = lp.inject(fresh("llama"), lp.IA3())
    shake(handle.trainable_parameters())
    with pytest.raises(MergeError, match="changes the bias too"):
        save_hf(handle, tmp_path / "ia3", as_lora=True)
    with pytest.raises(ConfigError, match="as_lora=-1"):
        save_hf(lp.inject(fresh("llama"), lp.LoRA(rank=2)), tmp_path / "lora", as_lora=-1)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = BACKBONES["llama"].fresh()


def test_the_lightning_module_leaves_no_trace(tmp_path: Path) -> None:
    module, bare = Module(), fresh("llama")
    for target, folder in ((module, "module"), (bare, "bare")):
        handle = lp.inject(target, lp.LoRA(rank=2, targets=["q_proj"]))
        handle.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in handle.state_dict().items()})
        shake(handle.trainable_parameters())
        save_hf(handle, tmp_path / folder)
        expected = logits(target.model if isinstance(target, Module) else target, "llama")
    assert_same_tensors(tmp_path / "module", tmp_path / "bare")
    assert config_of(tmp_path / "module") == config_of(tmp_path / "bare")
    other = Module()
    handle = load_hf(other, tmp_path / "module")
    assert handle.root is other.model
    close(logits(other.model, "llama"), expected)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_root_can_be_named(tmp_path: Path) -> None:
    module = Plain()
    handle = lp.inject(module, lp.LoRA(rank=2, targets=["net.0"]))
    save_hf(handle, tmp_path / "found")
    assert all(key.startswith("base_model.model.0.") for key in tensors_of(tmp_path / "found"))
    save_hf(handle, tmp_path / "named", root="")
    assert all(key.startswith("base_model.model.net.0.") for key in tensors_of(tmp_path / "named"))
    with pytest.raises(ConfigError, match="is no module"):
        save_hf(handle, tmp_path / "wrong", root="ne")
    with pytest.raises(ConfigError, match="lies outside"):
        save_hf(handle, tmp_path / "wrong", root="net.2")


def test_a_trained_head_goes_along(tmp_path: Path) -> None:
    model = fresh("bert")
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["query"]))
    shake([*handle.trainable_parameters(), *model.classifier.parameters()])  # type: ignore[operator,union-attr]
    expected = logits(model, "bert")
    save_hf(handle, tmp_path, modules_to_save=["classifier"])
    assert config_of(tmp_path)["modules_to_save"] == ["classifier"]
    assert config_of(tmp_path)["task_type"] == "SEQ_CLS"
    close(logits(hf_load("bert", tmp_path), "bert"), expected)


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def base(tmp_path: Path) -> Path:
    fresh("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return tmp_path / "base"


def native(base: Path, folder: Path, strategy: lp.PEFTStrategy) -> tuple[Path, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    handle = lp.inject(model, strategy)
    shake(s.tensor() for s in handle.slots if s.trainable)
    handle.usage = {"base": str(base), "task": "causal_lm"}
    return lp.save_adapter(handle, folder), logits(model, "llama")


CONVERTED = {
    "lora": lp.LoRA(rank=2, targets=TARGETS),
    "pissa": lp.LoRA(rank=2, targets=TARGETS, init="pissa"),
    "dora": lp.DoRA(rank=2, targets=TARGETS),
    "prefix": lp.PrefixTuning(num_virtual_tokens=3),
    "tokens": lp.TokenRows(ids=(1, 3)),
    "norms": lp.LNTuning(),
    "vera": lp.VeRA(rank=4, targets=TARGETS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", CONVERTED.values(), ids=CONVERTED)
def test_convert_there_and_back(
    strategy: lp.PEFTStrategy, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    adapter, expected = native(base, tmp_path / "adapter", strategy)
    main(["convert", str(adapter), str(tmp_path / "hf"), "--to", "hf"])
    assert "type: " in capsys.readouterr().out
    assert config_of(tmp_path / "hf")["base_model_name_or_path"] == str(base)
    close(logits(hf_load("llama", tmp_path / "hf"), "llama"), expected)
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "native"])
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    lp.load_adapter(model, tmp_path / "back")
    model.eval()
    close(logits(model, "llama"), expected)


def test_the_config_of_the_base_is_enough_for_a_lora(base: Path, tmp_path: Path) -> None:
    adapter, expected = native(base, tmp_path / "adapter", lp.LoRA(rank=2, targets=TARGETS))
    (base / "model.safetensors").unlink()
    main(["convert", str(adapter), str(tmp_path / "hf"), "--to", "hf"])
    close(logits(hf_load("llama", tmp_path / "hf"), "llama"), expected)


def test_convert_a_checkpoint(tmp_path: Path, base: Path) -> None:
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    class Learner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = AutoModelForCausalLM.from_pretrained(base)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Learner()
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[lp.PEFTCallback(lp.LoRA(rank=2, targets=["q_proj"]))],
    )  # fmt: skip
    trainer.fit(module, DataLoader(BACKBONES["llama"].batch()["input_ids"], batch_size=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = logits(module.net.eval(), "llama")
    main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "hf"), "--to", "hf", "--base", str(base)])
    close(logits(hf_load("llama", tmp_path / "hf"), "llama"), expected)
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors_of(tmp_path / "hf"))


def test_the_trained_head_of_an_adapter_goes_along(tmp_path: Path) -> None:
    model = fresh("bert")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["query"]))
    head = {f"classifier.{name}": p for name, p in model.classifier.named_parameters()}  # type: ignore[union-attr,operator]
    shake([*handle.trainable_parameters(), *head.values()])
    expected = logits(model, "bert")
    handle.usage = {"base": str(tmp_path / "base"), "task": "sequence_classification"}
    lp.save_adapter(handle, tmp_path / "adapter", extra_state=head)
    main(["convert", str(tmp_path / "adapter"), str(tmp_path / "hf"), "--to", "hf"])
    assert config_of(tmp_path / "hf")["modules_to_save"] == ["classifier"]
    close(logits(hf_load("bert", tmp_path / "hf"), "bert"), expected)


def test_a_prompt_without_a_head(tmp_path: Path) -> None:
    body = fresh("llama").model
    handle = lp.inject(body, lp.PromptTuning(num_virtual_tokens=3))  # type: ignore[arg-type]
    save_hf(handle, tmp_path)
    assert config_of(tmp_path)["task_type"] == "FEATURE_EXTRACTION"
    other = fresh("llama").model
    load_hf(other, tmp_path)  # type: ignore[arg-type]
    batch = BACKBONES["llama"].batch()
    close(run(other, batch), run(body, batch))  # type: ignore[arg-type]


def test_the_public_name() -> None:
    assert lp.interop.save_hf is save_hf


def test_convert_as_lora(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, expected = native(base, tmp_path / "adapter", lp.OFT(block_size=4, targets=TARGETS))
    main(["convert", str(adapter), str(tmp_path / "hf"), "--to", "hf", "--as-lora", "exact"])
    assert "relative error of the change: at most" in capsys.readouterr().out
    close(logits(hf_load("llama", tmp_path / "hf"), "llama"), expected)
    hf_save(
        hf_model(Case("llama", "IA3Config", {"feedforward_modules": ["down_proj"], "target_modules": ["down_proj"]})),
        tmp_path / "ia3",
    )
    main(["convert", str(tmp_path / "ia3"), str(tmp_path / "lora"), "--to", "hf", "--as-lora", "4", "--base", str(base)])
    assert config_of(tmp_path / "lora")["r"] == 4


def test_convert_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str]] = []
    there = hf_save(hf_model(Case("llama", "LoraConfig", {"r": 2, "target_modules": TARGETS})), tmp_path / "there")

    def download(name: str, *, revision: str, **options: Any) -> str:
        asked.append((name, revision))
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    main(["convert", "user/adapter", str(tmp_path / "here"), "--to", "native", "--revision", "v1", "--base", str(base)])
    assert asked == [("user/adapter", "v1")]
    assert json.loads((tmp_path / "here" / "adapter.json").read_text())["usage"]["base"] == str(base)
    there = tmp_path / "here"
    assert not suitability("user/adapter", "hf", "v2").blockers  # of our own format, as push() uploads it
    assert asked[-1] == ("user/adapter", "v2")


def test_convert_makes_the_head_that_is_saved(tmp_path: Path) -> None:
    import peft
    from transformers import BertForSequenceClassification

    plain = BACKBONES["bert"].fresh().bert.config  # type: ignore[union-attr]
    model = BertForSequenceClassification(plain)
    model.save_pretrained(tmp_path / "base")
    plain.num_labels = 5
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    with warnings.catch_warnings():  # peft asks for what transformers has renamed
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(BertForSequenceClassification(plain), config)
    hf_save(adapted, tmp_path / "there")
    main(["convert", str(tmp_path / "there"), str(tmp_path / "here"), "--to", "native", "--base", str(tmp_path / "base")])
    manifest = json.loads((tmp_path / "here" / "adapter.json").read_text())
    assert manifest["usage"]["labels"] == [f"LABEL_{i}" for i in range(5)]
    assert manifest["usage"]["base"] == str(tmp_path / "base")


WRONG: dict[str, tuple[list[str], str]] = {
    "nowhere": (["missing", "out", "--to", "hf"], "does not exist"),
    "no output": (["{adapter}", "--to", "hf"], "name a folder for the result"),
    "native of native": (["{adapter}", "out", "--to", "native"], "own format already"),
    "rank": (["{adapter}", "out", "--to", "hf", "--as-lora", "0"], "rank of at least 1"),
    "lora of the own format": (["{adapter}", "out", "--to", "native", "--as-lora", "4"], "belongs to --to hf"),
    "full": (["{adapter}", "{adapter}", "--to", "hf"], "is not empty"),
}


@pytest.mark.parametrize(("arguments", "match"), WRONG.values(), ids=WRONG)
def test_mistakes_are_one_line(
    arguments: list[str], match: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = native(base, tmp_path / "adapter", lp.LoRA(rank=2))
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *(a.format(adapter=adapter) for a in arguments)])
    assert stopped.value.code == 2
    assert match in capsys.readouterr().err


# ---------------------------------------------------------------------- the hub


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append(("create", (name, options)))

        def create_branch(self, name: str, **options: Any) -> None:
            calls.append(("branch", (name, options)))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", sorted(p.name for p in Path(options["folder_path"]).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    handle = lp.inject(fresh("llama"), lp.LoRA(rank=2))
    assert push(handle, "user/name", private=True) == "https://huggingface.co/user/name"
    assert calls == [("create", ("user/name", {"private": True, "exist_ok": True})), ("upload", files)]
    calls.clear()
    adapter, _ = native(base, tmp_path / "adapter", lp.LoRA(rank=2))
    main(["convert", str(adapter), "--to", "hf", "--push", "user/other"])
    assert calls[-1] == ("upload", files)
    push(adapter, "user/native", revision="v2")
    assert calls[-2][0] == "branch"
    with pytest.raises(FormatError, match="no adapter folder"):
        push(base, "user/base")
    with pytest.raises(ConfigError, match="as_lora"):
        push(adapter, "user/x", as_lora=True)

    def refuse(self: Any, name: str, **options: Any) -> None:
        raise RuntimeError("401 Unauthorized")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(FormatError, match="401"):
        push(handle, "user/name")


# ---------------------------------------------------------------------- inspect --for

VLLM: dict[str, tuple[lp.PEFTStrategy, str | None]] = {
    "lora": (lp.LoRA(rank=4), None),
    "rslora": (lp.LoRA(rank=4, rank_stabilized=True), None),
    "relora": (lp.ReLoRA(rank=4), None),
    "dora": (lp.DoRA(rank=4), "plain LoRA only, and this is DoRA"),
    "vera": (lp.VeRA(rank=4), "plain LoRA only.*--as-lora"),
    "mora": (lp.MoRA(rank=4), "plain LoRA only, and this is MoRA"),
    "prompt": (lp.PromptTuning(num_virtual_tokens=2), "merging is not possible"),
    "houlsby": (lp.HoulsbyAdapter(), "no type for HoulsbyAdapter"),
    "ssf": (lp.SSF(), "no type for SSF.*--as-lora"),
    "bias": (lp.LoRA(rank=4, bias="all"), "no trained biases"),
    "patterns": (lp.LoRA(rank=4, rank_per_target={"attention.value": 2}), "one rank and alpha"),
    "tokens": (lp.Compose(parts=(lp.LoRA(rank=4), lp.TokenRows(ids=(1,)))), "no trained token rows"),
    "norms": (lp.Compose(parts=(lp.LoRA(rank=4), lp.LNTuning())), "no modules_to_save"),
    "two": (lp.Compose(parts=(lp.LoRA(rank=4), lp.VeRA(rank=4))), "several methods"),
}


@pytest.mark.parametrize(("strategy", "blocker"), VLLM.values(), ids=VLLM)
def test_inspect_for_vllm(strategy: lp.PEFTStrategy, blocker: str | None, tmp_path: Path) -> None:
    import re

    handle = lp.inject(fresh("llama"), strategy)
    lp.save_adapter(handle, tmp_path / "native")
    verdict = suitability(tmp_path / "native", "vllm")
    assert bool(verdict.blockers) == (blocker is not None)
    if blocker is not None:
        assert re.search(blocker, verdict.text())
        if "type for" not in blocker and "several" not in blocker:
            assert bool(suitability(tmp_path / "native", "hf").blockers) == isinstance(strategy, lp.MoRA)
            save_hf(handle, tmp_path / "hf")
            assert suitability(tmp_path / "hf", "vllm").blockers


def test_inspect_tells_the_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = lp.inject(BACKBONES["llama"].fresh(), lp.LoRA(rank=12, init="pissa", targets=["q_proj"]))
    save_hf(handle, tmp_path / "hf")
    main(["inspect", str(tmp_path / "hf"), "--for", "vllm"])
    out = capsys.readouterr().out
    assert "for vLLM: loads" in out
    assert "--max-lora-rank 32" in out
    lp.save_adapter(handle, tmp_path / "native")
    main(["inspect", str(tmp_path / "native"), "--for", "vllm"])
    assert "--max-lora-rank 32" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "hf"), "--for", "hf"])
    assert "for Hugging Face peft: loads" in capsys.readouterr().out


def test_models_that_are_not_of_transformers(tmp_path: Path) -> None:
    import peft

    backbone = BACKBONES["conv_net"]
    model = backbone.fresh()
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["stem", "classifier"]))
    shake(handle.trainable_parameters())
    save_hf(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(backbone.fresh(), str(tmp_path)).eval()
    close(run(theirs, backbone.batch()), run(model.eval(), backbone.batch()))
