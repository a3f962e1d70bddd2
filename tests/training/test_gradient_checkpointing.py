"""Gradient checkpointing from callback and module: the same training, while ``fit`` runs, and only then."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, TargetError
from lightning_peft.surgery.recompute import GradientCheckpointing, recomputed_blocks
from lightning_peft.training.cli import PEFTCLI
from tests.training import tiny
from tests.training.language import LORA, Language, Watch, batches, in_a_process_of_its_own
from tests.training.toys import Plain, adapter_state, callback, loader, same, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
BLOCKS = ["net.model.layers.0", "net.model.layers.1"]
LAST = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": {"include": "all-linear", "layers": [1]}}}


def fit(
    folder: Path,
    checkpointing: Any = False,
    *extra: Any,
    strategy: Any = LORA,
    module: Any = None,
    path: Any = None,
    **options: Any,
) -> tuple[Any, Watch]:
    torch.manual_seed(11)
    watch = Watch()
    module = Language() if module is None else module
    peft = callback(strategy, gradient_checkpointing=checkpointing)
    trainer(folder, peft, watch, *extra, **options).fit(module, batches(), ckpt_path=path)
    return module, watch


def forwards(module: torch.nn.Module) -> list[str]:
    return [path for path, m in module.named_modules() if "forward" in vars(m) and "peft" not in m._modules]


@pytest.mark.parametrize(
    ("option", "runs"),
    [(True, (2, 2)), ({"every": 2}, (2, 1)), ({"offload": True}, (2, 2)), ({"reentrant": True}, (2, 2))],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same(option: Any, runs: tuple[int, int], precision: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 2, "max_epochs": 2}
    plain, once = fit(tmp_path, **options)
    module, watch = fit(tmp_path, option, **options)
    assert once.runs["train"] == {"0": 8, "1": 8}
    assert watch.runs["train"] == {"0": 8 * runs[0], "1": 8 * runs[1]}
    assert watch.runs["val"] == once.runs["val"]
    assert set(watch.runs["val"].values()) == {3}  # sanity validation, two epochs: nothing is recomputed there
    assert watch.blocks["train"] == BLOCKS[: sum(runs) - 2]
    assert same(adapter_state(plain), adapter_state(module))


def test_an_adapter_moves_when_checkpointing_is_reentrant(tmp_path: Path) -> None:
    """Frozen inputs cut torch's own re-entrant graph: every gradient would be zero, without a word."""
    start, _ = fit(tmp_path, limit_train_batches=0)
    module, _ = fit(tmp_path, {"reentrant": True})
    before = adapter_state(start)
    assert all(not torch.equal(before[k], v) for k, v in adapter_state(module).items())


@pytest.mark.parametrize("option", [False, True, {"reentrant": True}], ids=str)
def test_no_backward_below_the_first_adapted_block(option: Any, tmp_path: Path) -> None:
    _, watch = fit(tmp_path, option, strategy=LAST)
    assert watch.wanted == {"embed_tokens": False, "0": False, "1": True}
    assert watch.runs["train"] == {"0": 4, "1": 8 if option else 4}


def test_nothing_is_left_after_fit_and_a_second_fit_works(tmp_path: Path) -> None:
    module, watch = fit(tmp_path, True)
    assert not recomputed_blocks(module)
    assert not forwards(module)
    assert not module.net.training
    _, watch = fit(tmp_path, True, module=module)
    assert watch.runs["train"] == {"0": 8, "1": 8}
    assert not forwards(module)
    _, watch = fit(tmp_path, module=module)
    assert watch.runs["train"] == {"0": 4, "1": 4}


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("a mistake of the user's")

    module = Language()
    with pytest.raises(RuntimeError, match="user's"):
        fit(tmp_path, True, Fails(), module=module)
    assert not forwards(module)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run has a folder of its own
@pytest.mark.parametrize("holds", ["adapter", "full"])
def test_resume_is_exact(holds: Any, tmp_path: Path) -> None:
    def run(folder: str, epochs: int, path: Any = None, checkpointing: Any = True) -> Any:
        torch.manual_seed(11)
        module = Language()
        keep = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")
        peft = callback(LORA, gradient_checkpointing=checkpointing, checkpoint=holds)
        options = {"max_epochs": epochs, "enable_checkpointing": True}
        trainer(tmp_path, peft, keep, **options).fit(module, batches(), ckpt_path=path)
        return adapter_state(module)

    whole = run("whole", 3)
    run("part", 2)
    assert same(whole, run("rest", 3, tmp_path / "part" / "epoch=1.ckpt"))
    assert same(whole, run("other", 3, tmp_path / "part" / "epoch=1.ckpt", checkpointing=False))  # the file knows nothing of it


def test_blocks_recompute_before_anything_is_wrapped_or_optimized(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Late(Language):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = self.network()

        def configure_optimizers(self) -> Any:
            seen.append(recomputed_blocks(self))
            return super().configure_optimizers()

    _, watch = fit(tmp_path, True, module=Late())
    assert seen == [BLOCKS]
    assert watch.runs["train"] == {"0": 8, "1": 8}


def test_two_callbacks_on_one_base(tmp_path: Path) -> None:
    module = Language()
    peft = [
        callback(
            {"class_path": "LoRA", "init_args": {"rank": 2, "targets": [f"{part}_proj"]}}, name=part, gradient_checkpointing=True
        )
        for part in ("q", "v")
    ]
    watch = Watch()
    trainer(tmp_path, *peft, watch).fit(module, batches())
    assert watch.runs["train"] == {"0": 8, "1": 8}
    assert not forwards(module)


def test_base_dropout_off_does_not_switch_it_off(tmp_path: Path) -> None:
    """The blocks are in eval mode then, and transformers would recompute none."""
    module, watch = Language(), Watch()
    trainer(tmp_path, callback(LORA, gradient_checkpointing=True, base_dropout=False), watch).fit(module, batches())
    assert watch.runs["train"] == {"0": 8, "1": 8}


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = callback(LORA, gradient_checkpointing=True, verbose=True)
    trainer(tmp_path, peft).fit(Language(), batches())
    expected = "gradient checkpointing: 2 modules run again in the backward pass, 'model.layers.0' to 'model.layers.1'."
    assert expected in capsys.readouterr().out


# ---------------------------------------------------------------- bad input


def test_a_model_without_blocks_is_refused_and_left_alone(tmp_path: Path) -> None:
    module = Plain()
    keys = list(module.state_dict())
    with pytest.raises(TargetError, match="no blocks are known of Sequential"):
        trainer(tmp_path, callback(gradient_checkpointing=True)).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert not forwards(module)
    assert all(p.requires_grad for p in module.parameters())


def test_blocks_are_named_as_the_user_sees_them(tmp_path: Path) -> None:
    for blocks in (["net.0"], ["0"]):
        torch.manual_seed(1)
        module, watch = Plain(), Watch()
        trainer(tmp_path, callback(gradient_checkpointing={"blocks": blocks}), watch).fit(module, loader())
        assert watch.blocks["train"] == ["net.0"]


def test_the_models_own_switch_is_not_doubled(tmp_path: Path) -> None:
    module = Language()
    module.net.activation_checkpointing_enable()
    with pytest.raises(ConflictError, match="gradient_checkpointing_disable"):
        fit(tmp_path, True, module=module)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="no option 'evry'.*'every'"):
        lp.PEFTCallback("lora", gradient_checkpointing={"evry": 2})
    with pytest.raises(ConfigError, match="every=0"):
        lp.PEFTLightningModule("lora", "nowhere", gradient_checkpointing={"every": 0})


# ---------------------------------------------------------------- PEFTLightningModule and the command lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny.llama(attention_dropout=0.1)).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def ragged_batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    return tiny.loader([tiny.ragged([8, 5 + i], generator=generator) for i in range(4)])


@pytest.mark.parametrize("option", [True, {"every": 2}], ids=str)
def test_module(option: Any, folder: str, tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, option):
        torch.manual_seed(1)
        module, watch = lp.PEFTLightningModule(LORA, folder, gradient_checkpointing=checkpointing), Watch()
        keep = ModelCheckpoint(tmp_path / str(checkpointing), filename="last")
        tiny.trainer(callbacks=[watch, keep], enable_checkpointing=True).fit(module, ragged_batches())
        states.append(adapter_state(module))
        assert not forwards(module)
    assert same(*states)
    assert watch.runs["train"] == {"0": 8, "1": 8 if option is True else 4}
    assert watch.wanted["embed_tokens"] is False
    again = lp.PEFTLightningModule.load_from_checkpoint(tmp_path / str(option) / "last.ckpt")
    assert again.peft.gradient_checkpointing == GradientCheckpointing.parse(option)
    assert again.hparams["gradient_checkpointing"] == option


def test_module_with_a_callback_of_its_trainer(folder: str) -> None:
    module, watch = lp.PEFTLightningModule(LORA, folder, gradient_checkpointing=True), Watch()
    tiny.trainer(callbacks=[callback(LORA), watch]).fit(module, ragged_batches())
    assert watch.runs["train"] == {"0": 8, "1": 8}


def test_value_of_python_is_plain_in_checkpoints(folder: str) -> None:
    option = GradientCheckpointing(every=2, blocks=("layers",))
    module = lp.PEFTLightningModule(LORA, folder, gradient_checkpointing=option)  # type: ignore[arg-type]
    assert module.hparams["gradient_checkpointing"] == option.to_dict()
    assert copy.deepcopy(module).peft.gradient_checkpointing == option


def test_yaml_of_our_command_line(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    config = tmp_path / "config.yaml"

    def module(option: Any) -> Any:
        model = {"base": folder, "strategy": "lora", "gradient_checkpointing": option}
        config.write_text(
            yaml.safe_dump({"model": model, "data": {"data_path": "x.csv", "prompt": "{text}", "completion": "{label}"}})
        )
        return PEFTCLI(["--config", str(config), "--trainer.logger=false"], run=False).model

    for option in (True, False, {"every": 2, "offload": True, "blocks": ["layers"]}):
        model = module(option)
        assert model.peft.gradient_checkpointing == GradientCheckpointing.parse(option)
        assert model.hparams["gradient_checkpointing"] == option
    with pytest.raises(ConfigError, match="no option 'evry'"):
        module({"evry": 2})


def test_yaml_of_a_foreign_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    init = {"strategy": LORA, "gradient_checkpointing": {"every": 2}, "verbose": False, "export": False}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    entry = {"class_path": "lightning_peft.PEFTCallback", "init_args": init}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {**quiet, "accelerator": "cpu", "max_epochs": 1, "callbacks": [entry]}}))
    cli = LightningCLI(Language, args=["--config", str(config)], run=False, save_config_callback=None, seed_everything_default=1)
    watch = Watch()
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, batches())
    assert watch.runs["train"] == {"0": 8, "1": 4}


# ---------------------------------------------------------------- several processes


@pytest.mark.dist
def test_two_processes(tmp_path: Path) -> None:
    assert "two processes agree" in in_a_process_of_its_own("tests.training.checkpointing_processes", tmp_path)
