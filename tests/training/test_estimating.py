"""``lightning-peft estimate``, and the peak that the callback prints beside the estimate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_peft as lp
from lightning_peft.errors import DependencyError
from lightning_peft.training import estimating, peak
from lightning_peft.training.cli import main
from tests.cost.test_flops import llama


@pytest.fixture
def config(tmp_path: Path) -> str:
    llama(attn_implementation="sdpa").save_pretrained(tmp_path / "base")
    written = {
        "trainer": {"accelerator": "cpu", "precision": "bf16-true"},
        "model": {
            "base": str(tmp_path / "base"),
            "strategy": {"class_path": "LoRA", "init_args": {"rank": 2, "targets": "all-linear"}},
            "gradient_checkpointing": {"every": 2},
        },
        "data": {"data_path": "none.jsonl", "prompt": "{text}", "completion": "{answer}", "batch_size": 3, "max_length": 16},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    return str(tmp_path / "config.yaml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["estimate", *arguments])
    return capsys.readouterr().out


def test_the_config_of_fit_is_read(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--config", config, "--json"))
    lora = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": "all-linear"}}
    options: dict[str, Any] = dict(precision="bf16-true", gradient_checkpointing={"every": 2}, padded=True, device="cpu")
    assert found == json.loads(
        json.dumps(lp.estimate(llama(attn_implementation="sdpa"), lora, batch_size=3, sequence_length=16, **options).to_dict())
    )
    other = json.loads(run(capsys, "--config", config, "--json", "--data.batch_size=6"))
    assert other["batch_size"] == 6
    assert "KV cache" in run(capsys, "--config", config)


def test_fit_and_compare(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--config", config, "--fit", "1MiB", "--json"))
    assert found["batch_size"] > 3
    assert found["peak"] <= 2**20
    svg = tmp_path / "chart.svg"
    shown = run(capsys, "--config", config, "--compare", "lora,full,vera", "--chart", str(svg))
    assert [name in shown for name in ("lora", "full", "vera", "█")] == [True] * 4
    assert "<svg" in svg.read_text()


def test_mistakes_are_one_line(config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_PEFT_TRACEBACK", raising=False)
    for arguments, message in (
        (("--fit", "1KiB"), "batch_size=1"),
        (("--compare", "lorra"), "unknown method"),
        (("--chart", "x.abc"), "abc"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["estimate", "--config", config, *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_chart_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match="pip install"):
        estimating.chart([lp.estimate(llama(), "lora", sequence_length=4)], tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_callback_prints_the_peak_beside_the_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch as pl

    monkeypatch.setattr(peak, "SMALL", 0)
    module = lp.PEFTLightningModule({"class_path": "LoRA", "init_args": {"rank": 2}}, llama(), lr_scheduler=None)
    rows = [{"input_ids": torch.randint(1, 50, (8,)), "labels": torch.randint(1, 50, (8,))} for _ in range(4)]
    quiet: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    line = next(line for line in capsys.readouterr().out.splitlines() if "peak memory of fit" in line)
    expected = lp.estimate(llama(), {"class_path": "LoRA", "init_args": {"rank": 2}}, batch_size=2, sequence_length=8).peak
    assert f"estimated {lp.cost.size(expected)} for 2 × 8 tokens" in line


def test_small_models_and_other_devices_are_not_watched() -> None:
    assert peak.watch(llama()) is None
    assert peak.watch(torch.nn.Linear(2, 2, device="meta")) is None
