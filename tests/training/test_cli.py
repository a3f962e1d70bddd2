"""The command line: a whole life of an adapter, and every mistake as one line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lightning_peft as lp
from lightning_peft.checkpoint import read_adapter
from lightning_peft.training.cli import PEFTCLI, main
from tests.training.data.conftest import SPECIALS, _byte_bpe

PROMPT = "Message: {text} Answer:"


@pytest.fixture(autouse=True, scope="module")
def _no_arguments() -> Iterator[None]:
    """pytest's own arguments are not ours: LightningCLI looks at sys.argv even when it is given arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-peft"])
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    raw = _byte_bpe()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=SPECIALS.index("<s>"), eos_token_id=SPECIALS.index("</s>"), pad_token_id=SPECIALS.index("<pad>"),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with (folder / "sms.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"call number {i} now", "spam" if i % 2 else "ham"] for i in range(24))
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "max_steps": 2, "default_root_dir": str(folder), "accelerator": "cpu", "devices": 1,
                    "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
                },
                "model": {
                    "base": str(base), "task": "causal_lm", "labels": ["ham", "spam"], "lr": 1e-3,
                    "strategy": {"class_path": "LoRA", "init_args": {"rank": 2}},
                },
                "data": {
                    "data_path": str(folder / "sms.csv"), "prompt": PROMPT, "completion": " {label}",
                    "test_fraction": 0.2, "batch_size": 4,
                },
            }
        )
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def adapter(config: Path) -> Path:
    main(["fit", "--config", str(config)])
    return config.parent / "lightning_logs" / "version_0" / "adapter" / "last"


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in captured.err
    return captured.err


def test_fit_then_test_predict_inspect_generate_merge(
    adapter: Path, config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(adapter)])
    assert "LoRA(rank=2)" in capsys.readouterr().out
    main(["generate", str(adapter), "call number 3 now", "--max-new-tokens", "3"])
    written = capsys.readouterr().out

    merged = tmp_path / "merged"
    main(["merge", str(adapter), str(merged)])
    plain = AutoModelForCausalLM.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(base)
    handle = lp.load_adapter(model, adapter)
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    assert not torch.equal(plain.lm_head.weight, torch.zeros(()))
    assert handle.usage["prompt"] == PROMPT

    # generate() puts the text into the prompt that the adapter was trained with.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    prompt = tokenizer(PROMPT.format(text="call number 3 now"), return_tensors="pt")
    out = model.eval().generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    expected = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written.rstrip("\n").endswith(expected.strip())


# ModelCheckpoint says so whenever a checkpoint is tested from a run of its own.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_test_command_reads_a_checkpoint(adapter: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((adapter.parent.parent / "checkpoints").glob("*.ckpt"))
    main(["test", "--config", str(config), "--ckpt_path", str(checkpoint)])
    assert "test_accuracy" in capsys.readouterr().out


def test_predict_prints_one_json_value_per_row(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", "--config", str(config), "--data.predict_texts=[call, now]", "--trainer.logger=false"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert all(isinstance(row, str) for row in rows)


def test_a_checkpoint_brings_its_special_tokens(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--model.special_tokens=[<a>, <b>]"]
    main(["fit", "--config", str(config), *run])
    capsys.readouterr()
    checkpoint = next((tmp_path / "checkpoints").glob("*.ckpt"))  # no tokenizer lies beside it
    answers = []
    for adapter in (checkpoint, tmp_path / "adapter" / "last"):
        main(["generate", str(adapter), "call <b>", "--max-new-tokens", "4"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    main(["merge", str(checkpoint), str(tmp_path / "merged")])
    size = len(PreTrainedTokenizerFast.from_pretrained(base))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().num_embeddings == size + 2


def test_short_names_mean_the_same(config: Path) -> None:
    def strategy(*extra: str) -> lp.PEFTStrategy:
        return PEFTCLI(["--config", str(config), "--trainer.logger", "false", *extra], run=False).model.strategy

    assert strategy() == lp.LoRA(rank=2)
    assert strategy("--model.strategy", "lora") == lp.LoRA()
    assert strategy("--model.strategy", "LoRA", "--model.strategy.rank", "3") == lp.LoRA(rank=3)


@pytest.mark.parametrize(
    "spelled",
    [
        ["lora", "bitfit"],
        [{"class_path": "LoRA", "init_args": {"rank": 3}}, "bitfit"],
        {"class_path": "Compose", "init_args": {"parts": [{"class_path": "LoRA", "init_args": {"rank": 3}}, "bitfit"]}},
        {
            "class_path": "Compose",
            "init_args": {
                "parts": [{"class_path": "Gated", "init_args": {"part": {"class_path": "LoRA"}}}, {"class_path": "BitFit"}]
            },
        },
    ],
    ids=["names", "list", "compose", "nested"],
)
def test_compositions_are_spelled_in_yaml(spelled: Any, config: Path, tmp_path: Path) -> None:
    changed = yaml.safe_load(config.read_text())
    changed["model"]["strategy"] = spelled
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
    assert PEFTCLI(["--config", str(tmp_path / "config.yaml")], run=False).model.strategy == lp.resolve(spelled)


def test_print_config_round_trips(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(printed), "--print_config"])
    assert capsys.readouterr().out == printed.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.strategy.init_args.rnk=3"], ["rnk"]),
        (["--model.strategy=lorra"], ["lorra", "lora"]),
        (["--model.strategy.init_args.rank=0"], ["rank=0", "at least 1"]),
        (["--model.lrate=3"], ["lrate"]),
        (["--data.data_path=nowhere.csv"], ["nowhere.csv"]),
        (["--data.prompt={txt} Answer:"], ["txt", "text"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--model.callback={exprt: false}"], ["exprt"]),
        (["--trainer.devices=0"], ["devices"]),
        (["--trainer.callbacks=[{class_path: lightning_peft.PEFTCallback, init_args: {strategy: lorra}}]"], ["lorra", "lora"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "fit", "--config", str(config), "--trainer.logger=false", *arguments)
    last = message.strip().splitlines()[-1]
    assert all(word in last for word in words), message
    assert len([line for line in message.splitlines() if line.startswith("lightning-peft: ")]) == 1


def test_unknown_command_and_method_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'inspect'" in fails(capsys, "inspekt")
    assert "'lora'" in fails(capsys, "methods", "lorra")


def test_missing_adapter_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "none") in fails(capsys, "generate", str(tmp_path / "none"), "text")


def test_what_generate_cannot_use_is_said(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --sample" in fails(capsys, "generate", str(adapter), "text", "--temperature", "0.5")
    assert "0 is not above 0" in fails(capsys, "generate", str(adapter), "text", "--sample", "--temperature", "0")
    assert "-1 is not above 0" in fails(capsys, "generate", str(adapter), "text", "--max-new-tokens=-1")
    main(["generate", str(adapter), "call", "--sample", "--temperature", "0.7", "--max-new-tokens", "2"])


def test_help_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("fit", "predict", "methods", "merge"))
    main(["methods"])
    table = capsys.readouterr().out
    assert all(info.name in table for info in lp.list_methods())
    main(["methods", "lora"])
    card = capsys.readouterr().out
    assert "2106.09685" in card
    assert "rank_stabilized = False" in card


def test_the_qlora_config_is_a_whole_job(base: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """configs/qlora.yaml as it stands, on a tiny base and a few rows."""
    qlora = Path(__file__).parents[2] / "configs" / "qlora.yaml"
    small = {"model.base": base, "data.data_path": config.parent / "sms.csv", "model.callback.export": tmp_path / "adapter"}
    small |= {"trainer.max_steps": 2, "trainer.default_root_dir": tmp_path, "data.val_fraction": 0.2, "data.batch_size": 4}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.logger": "false"}
    main(["fit", "--config", str(qlora), *(f"--{name}={value}" for name, value in small.items())])
    assert "14 layers in nf4 (blocks of 64, double quantization)" in capsys.readouterr().out
    usage = read_adapter(tmp_path / "adapter" / "last").manifest["usage"]
    assert usage["quantization"] == lp.Quantization().to_dict()
    main(["generate", str(tmp_path / "adapter" / "last"), "call number 3 now", "--max-new-tokens", "2"])
    main(["merge", str(tmp_path / "adapter" / "last"), str(tmp_path / "merged")])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_tfew_config_is_a_whole_job(base: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """configs/tfew.yaml as it stands, on a tiny base and a few rows: trained, validated, asked, merged."""
    tfew = Path(__file__).parents[2] / "configs" / "tfew.yaml"
    sms = config.parent / "sms.csv"
    small = {"model.base": base, "data.data_path": sms, "model.callback.export": tmp_path / "adapter"}
    small |= {"trainer.max_steps": 3, "trainer.default_root_dir": tmp_path, "data.few_shot": 4, "data.test_fraction": 0.2}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
    given = ["--config", str(tfew), *(f"--{name}={value}" for name, value in small.items())]
    main(["fit", *given])
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["beta2_decay"] == -0.8  # Adafactor
    log = next(tmp_path.rglob("config.resolved.yaml")).read_text()
    assert "Adafactor" in log
    manifest = read_adapter(tmp_path / "adapter" / "last").manifest
    assert manifest["strategy"]["class_path"].endswith("IA3")
    assert manifest["usage"]["task"] == "multiple_choice"
    capsys.readouterr()
    main(["validate", *given, f"--ckpt_path={checkpoint}", "--data.val_fraction=0.2", "--trainer.limit_val_batches=1.0"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("val_loss", "val_accuracy", "val_f1"))
    texts = ["--data.predict_texts=[call number 3 now, call number 4 now]", "--trainer.logger=false"]
    main(["predict", *given, f"--ckpt_path={checkpoint}", *texts])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == 2
    assert all(["no", "yes"][row["index"]] == row["choice"] and 0.5 <= row["score"] <= 1 for row in rows)
    assert "generates no text" in fails(capsys, "generate", str(tmp_path / "adapter" / "last"), "call")
    main(["merge", str(tmp_path / "adapter" / "last"), str(tmp_path / "merged")])
    main(["estimate", *given, "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batch_size"] == 2 * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.choice_losses={mcloss: 1}"], ["mcloss", "Did you mean 'mc_loss'"]),
        (["--model.choice_losses.length_norm=-1"], ["length_norm=-1"]),
        (["--data.choices=[a, b, c]"], ["3 choices", "2 labels"]),
        (["--data.choices=[a, a]"], ["row 0", "the same"]),
        (["--data.choices=[no, yes]"], ["[no, yes]", "quote the words"]),
        (["--data.choices=option", "--model.labels=null"], ["no column 'option'"]),
        (["--data.completion={label}"], ["may only name {choice}"]),
    ],
)
def test_a_mistake_in_choices_is_one_line(
    arguments: list[str], words: list[str], base: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tfew = Path(__file__).parents[2] / "configs" / "tfew.yaml"
    given = [
        "--config",
        str(tfew),
        f"--model.base={base}",
        f"--data.data_path={config.parent / 'sms.csv'}",
        "--trainer.logger=false",
    ]
    few = [] if "option" in arguments[0] else ["--data.few_shot=4"]
    message = fails(capsys, "fit", *given, *(few or ["--data.few_shot=null"]), *arguments)
    assert all(word in message.strip().splitlines()[-1] for word in words), message


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.quantization=nf5", ["Did you mean 'nf4'"]),
        ("--model.quantization={scheme: nf4, blocksize: 64}", ["Did you mean 'block_size'"]),
    ],
)
def test_a_mistake_in_quantization_is_one_line(
    argument: str, words: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, "fit", "--config", str(config), argument)
    assert all(word in error for word in words)
