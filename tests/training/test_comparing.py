"""``lightning-peft compare``: real runs in processes of their own, results that are kept, and what is read out of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_peft as lp
from lightning_peft.errors import ConfigError, DataError, DependencyError, UnknownMethodError
from lightning_peft.training import comparing
from lightning_peft.training.cli import main
from lightning_peft.training.comparison import Comparison, Measured, Run
from tests.examples.test_scripts import tiny_bert, tiny_llama


@pytest.fixture(autouse=True, scope="module")
def _no_arguments() -> Iterator[None]:
    """LightningCLI looks at sys.argv even when it is given arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-peft"])
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_bert(folder / "bert")
    with (folder / "rows.csv").open("w", newline="") as file:
        texts = [(f"call {'now ' * (n % 7)}{'!' * n}", "late") if n % 2 else (f"a prize {'. ' * n}", "soon") for n in range(40)]
        csv.writer(file).writerows([("text", "label"), *texts])
    written = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "num_sanity_val_steps": 0, "enable_checkpointing": False},
        "model": {
            "base": str(folder / "bert"),
            "task": "sequence_classification",
            "labels": ["late", "soon"],
            "strategy": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "lr": 1e-3,
        },
        "data": {"data_path": str(folder / "rows.csv"), "val_fraction": 0.25, "batch_size": 4},
        "compare": {
            "seeds": [0, 1],
            "metric": "f1",
            "out": str(folder / "out"),
            "strategies": {
                "head": None,
                "wide": {"strategy": {"class_path": "LoRA", "init_args": {"rank": 4}}, "lr": 2e-3, "trainer.max_steps": 1},
                "visual_prompt_tuning": {},  # no method for texts
            },
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def first(config: Path) -> Comparison:
    """All runs of the config, made once."""
    return comparing.compare(["--config", str(config)])


def test_every_run_is_measured_and_a_failure_loses_nothing(first: Comparison, config: Path) -> None:
    assert [(run.name, run.seed) for run in first.runs[:4]] == [
        ("head", 0), ("wide", 0), ("visual_prompt_tuning", 0), ("head", 1),
    ]  # fmt: skip
    assert "PortError" in first.errors["visual_prompt_tuning"]
    assert {name: sorted(runs) for name, runs in first.done.items()} == {
        "head": [0, 1],
        "wide": [0, 1],
        "visual_prompt_tuning": [],
    }
    head, wide = first.done["head"][0], first.done["wide"][1]
    assert (head.trained, head.lr, head.steps) == (16 * 2 + 2, 1e-3, 2)  # the classifier, at the rate that `head` suggests
    # rank 4 on query and value of two blocks, and the classifier; options of the strategy's own
    assert (wide.trained, wide.lr, wide.steps) == (2 * 2 * 4 * (16 + 16) + 34, 2e-3, 1)
    assert set(head.quality) == set(head.disabled) == {"loss", "accuracy", "f1"}
    assert head.base == wide.base > 1000
    assert min(wide.step_seconds, wide.seconds, wide.peak) > 0
    assert wide.adapter_bytes > head.adapter_bytes > 34 * 4
    assert wide.quality["loss"] != first.done["wide"][0].quality["loss"]  # the seed is that of the data too
    # A run can be made again by hand.
    assert first.runs[0].settings["seed_everything"] == first.runs[0].settings["data"]["seed"] == 0
    assert "Traceback" in (config.parent / "out" / "visual_prompt_tuning-0.log").read_text()


def test_what_is_there_is_not_run_again(first: Comparison, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake(run: Run, file: Path) -> Run:
        ran.append(f"{run.name}-{run.seed}")
        return dataclasses.replace(run, measured=first.done["head"][0])

    monkeypatch.setattr(comparing, "_run_alone", fake)
    again = comparing.compare(["--config", str(config)], ["head", "wide"])
    assert ran == []
    assert again.done == {name: first.done[name] for name in ("head", "wide")}
    comparing.compare(["--config", str(config)])
    assert ran == ["visual_prompt_tuning-0", "visual_prompt_tuning-1"]  # what has failed is tried again
    ran.clear()
    comparing.compare(["--config", str(config), "--trainer.max_steps=3"], ["head", "wide"])
    assert ran == ["head-0", "head-1"]  # `wide` sets its own
    ran.clear()
    comparing.compare(["--config", str(config), "--compare.seeds=[1, 2]"], ["head"])
    assert ran == ["head-2"]
    ran.clear()
    file = config.parent / "out" / "head-1.json"
    whole = file.read_text()
    file.write_text('{"name": "head"')
    comparing.compare(["--config", str(config)], ["head"])
    assert ran == ["head-1"]
    file.write_text(whole)


def test_a_method_by_name_is_the_configs_own_or_the_methods_defaults(config: Path) -> None:
    runs = comparing.plan(["--config", str(config), "--compare.seeds=[5]"], ["lora", "bitfit", "wide"]).runs
    settings = {run.name: run.settings["model"] for run in runs}
    assert lp.resolve(settings["lora"]["strategy"]) == lp.LoRA(rank=2)
    assert settings["lora"]["lr"] == 1e-3
    assert lp.resolve(settings["bitfit"]["strategy"]) == lp.BitFit()
    assert settings["bitfit"]["lr"] == "auto"
    assert lp.resolve(settings["wide"]["strategy"]) == lp.LoRA(rank=4)
    assert [run.settings["seed_everything"] for run in runs] == [5, 5, 5]


@pytest.mark.parametrize(("name", "base"), [("compare_tweets", tiny_bert), ("compare_sms", tiny_llama)])
def test_the_sweeps_are_whole_and_compare_with_a_head_alone(name: str, base: Callable[[Path], Path], tmp_path: Path) -> None:
    """Parsed as they stand, on a tiny base; nothing runs."""
    file = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    written = yaml.safe_load(file.read_text())
    rows = [("text", "label"), *((f"call {n}", label) for n in range(8) for label in written["model"]["labels"])]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    tiny = {
        "model.base": base(tmp_path / "base"),
        "data.data_path": tmp_path / "rows.csv",
        "data.few_shot": 2,
        "data.val_fraction": 0.2,
    }
    planned = comparing.plan(["--config", str(file), *(f"--{option}={value}" for option, value in tiny.items())])
    assert planned.options.seeds == [0, 1, 2]
    assert planned.options.baseline == planned.runs[0].name == "head"
    assert len({run.settings["trainer"]["max_steps"] for run in planned.runs}) == 1
    assert [run.name for run in planned.runs[: len(planned.runs) // 3]] == list(written["compare"]["strategies"])
    if name == "compare_tweets":
        ours = {info.name for info in lp.list_methods() if info.cls.__module__.startswith("lightning_peft.")}
        assert ours - set(written["compare"]["strategies"]) == {"visual_prompt_tuning"}  # for images


def section(config: Path, folder: Path, **strategies: Any) -> list[str]:
    """Return the arguments for the config with other strategies."""
    written = yaml.safe_load(config.read_text())
    written["compare"] |= {"strategies": strategies, "out": str(folder / "out")}
    (folder / "other.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    return ["--config", str(folder / "other.yaml")]


def test_an_option_of_a_strategy_can_be_one_of_many_fields(config: Path, tmp_path: Path) -> None:
    arguments = section(
        config, tmp_path, deep={"strategy": "lora", "model.strategy.init_args.rank": 3}, both={"strategy": ["lora", "bitfit"]}
    )
    deep, both = comparing.plan([*arguments, "--compare.seeds=[0]"]).runs
    assert lp.resolve(deep.settings["model"]["strategy"]) == lp.LoRA(rank=3)
    assert lp.resolve(both.settings["model"]["strategy"]) == lp.resolve(["lora", "bitfit"])


@pytest.mark.parametrize(
    ("strategies", "more", "error", "match"),
    [
        ({"head": None, "lroa": None}, [], UnknownMethodError, "'lroa' is no method.*'lora'"),
        ({"head": None, "mine": {"strategy": "lroa"}}, [], UnknownMethodError, "unknown method 'lroa'"),
        ({"mine": {"strategy": {"class_path": "LoRA", "init_args": {"rnk": 3}}}}, [], ConfigError, "'rnk'.*'rank'"),
        ({"lora": "big"}, [], ConfigError, r"compare.strategies.lora='big'.*mapping"),
        ({"lo/ra": {"strategy": "lora"}}, [], ConfigError, "'lo/ra'.*file names"),
        ({"head": {"trainer.max_steps.x": 3}}, [], ConfigError, "trainer.max_steps.x.*no option"),
        ({}, [], ConfigError, "nothing to compare.*--methods"),
        ({"head": None}, ["--compare.seeds=[1, 1]"], ConfigError, r"seeds=\[1, 1\]"),
        ({"head": None}, ["--compare.seeds=[]"], ConfigError, r"seeds=\[\]"),
        ({"head": None}, ["--data.val_fraction=0"], ConfigError, "data.val_fraction"),
        ({"head": None}, ["--data.data_path=none.csv"], DataError, "none.csv"),
        ({"head": None}, ["--model.base=./nowhere"], ConfigError, "nowhere"),
        ({"head": None}, ["--trainer.devices=2"], ConfigError, "devices"),
    ],
)
def test_a_mistake_ends_before_anything_runs(
    strategies: dict[str, Any],
    more: list[str],
    error: type[Exception],
    match: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "_run_alone", None)
    with pytest.raises(error, match=match):
        comparing.compare([*section(config, tmp_path, **strategies), *more])


def test_an_unknown_option_ends_before_anything_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "_run_alone", None)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *section(config, tmp_path, head=None, lora={"lrate": 1e-3})])
    assert stopped.value.code == 2
    assert "lrate" in capsys.readouterr().err


def dies(run: Run, file: Path, log: Path, scratch: Path) -> None:
    """In place of a run: the process is killed, as by the system when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_child", dies)
    run = comparing._run_alone(Run("lora", 0, {}), tmp_path / "lora-0.json")
    assert "signal 9 (out of memory?)" in run.error
    assert comparing._read(tmp_path / "lora-0.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["lora-0.json"]  # and no folder that the run was to write into


# ---------------------------------------------------------------------- what is read out of the runs


def measured(quality: float, disabled: float = 0.5, **more: Any) -> Measured:
    one = {"lr": 1e-3, "trained": 100, "base": 10_000, "steps": 60, "step_seconds": 0.2, "seconds": 13.0}
    figures = {"peak": 2**20, "adapter_bytes": 2048, **one, **more}
    scores = ({"accuracy": value, "loss": 1 - value} for value in (quality, disabled))
    return Measured(quality=next(scores), disabled=next(scores), **figures)


RUNS = [
    Run("head", 0, {}, measured(0.50)),
    Run("good", 0, {}, measured(0.70, trained=200)),
    Run("mixed", 0, {}, measured(0.90)),
    Run("left", 0, {}, measured(0.60, 0.60)),
    Run("broken", 0, {}, error="ValueError: no | way"),
    Run("head", 1, {}, measured(0.54)),
    Run("good", 1, {}, measured(0.72, 0.53, trained=200)),
    Run("mixed", 1, {}, measured(0.53)),
    Run("left", 1, {}, measured(0.62, 0.60)),
    Run("broken", 1, {}, error="ValueError: later"),
]


def test_who_beats_the_baseline() -> None:
    found = Comparison(RUNS, metric=None, baseline="head")
    assert found.metric == "accuracy"
    assert (found.quality("good").value, found.quality("good").error) == pytest.approx((0.71, 0.01))
    assert found.gains("good") == pytest.approx([0.20, 0.18])
    assert [found.beats(name) for name in ("good", "mixed", "left")] == [True, False, True]  # every seed counts, not the mean
    assert [found.needs_adapter(name) for name in ("good", "left")] == [True, False]
    assert found.verdict() == [
        "better than head with every seed, by accuracy: good, left",
        "not better than head: mixed",
        "with the adapter disabled the gain is gone: good; not gone: left",
        "failed: broken (ValueError: no | way)",
    ]
    by_loss = Comparison(RUNS, metric="loss", baseline="head")  # less is better
    assert by_loss.gains("good") == pytest.approx([0.20, 0.18])


def test_a_comparison_without_its_baseline_or_with_one_seed() -> None:
    found = Comparison([run for run in RUNS if run.name != "head" and run.seed == 0], metric="accuracy", baseline="head")
    assert found.verdict() == ["failed: broken (ValueError: no | way)"]
    assert "gain over head" not in found.columns()
    assert str(found.quality("good")) == "0.700"
    assert all(len(row) in (2, len(found.columns())) for row in found.rows())
    nothing = Comparison([run for run in RUNS if run.name == "broken"], metric="accuracy", baseline="head")
    assert nothing.rows() == [["broken", "failed: ValueError: no | way"]]
    with pytest.raises(ConfigError, match="no run has ended well"):
        nothing.chart("x.svg")
    with pytest.raises(ConfigError, match="metric='acuracy'.*accuracy"):
        Comparison(RUNS, metric="acuracy", baseline="head")


def test_table_markdown_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Comparison(RUNS, metric=None, baseline="head")
    good = dict(zip(found.columns(), found.rows()[1], strict=True))
    assert good == {
        "strategy": "good", "trainable": "200", "share": "2.000%", "lr": "1e-03", "accuracy": "0.710 ± 0.010",
        "gain over head": "+0.190 ± 0.010 ✓", "disabled": "0.515 ± 0.015", "step": "200 ms", "peak memory": "1.00 MiB",
        "adapter": "2.00 KiB",
    }  # fmt: skip
    assert found.table().row_count == 5
    lines = found.markdown().splitlines()
    assert lines[0] == "60 steps, 2 seeds"
    assert {line.count("|") - line.count(r"\|") for line in lines[2:9]} == {len(found.columns()) + 1}
    assert r"failed: ValueError: no \| way" in lines[8]
    assert lines[-4:] == [f"- {line}" for line in found.verdict()]
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["strategies"]["good"]["quality"]["accuracy"] == pytest.approx({"value": 0.71, "error": 0.01})
    assert saved["strategies"]["broken"] == {"error": "ValueError: no | way"}
    assert [Run.from_dict(run) for run in saved["runs"]] == RUNS
    svg = found.chart(tmp_path / "chart.svg").read_text()
    assert "<svg" in svg
    with pytest.raises(ConfigError, match="abc"):
        found.chart(tmp_path / "chart.abc")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match="pip install"):
        found.chart(tmp_path / "chart.svg")


def test_a_strategy_that_failed_with_one_seed_keeps_the_others() -> None:
    found = Comparison([*RUNS[:2], Run("good", 1, {}, error="OSError: disk")], metric=None, baseline="head")
    assert found.rows()[1][-1] == "2.00 KiB (1 of 2 runs)"
    assert found.to_dict()["strategies"]["good"]["error"] == "OSError: disk"
    assert "failed: good (OSError: disk)" in found.verdict()


def test_the_command_prints_what_is_asked(
    first: Comparison, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "_run_alone", lambda run, file: dataclasses.replace(run, error="ValueError: again"))
    arguments = ["compare", "--config", str(config)]
    main([*arguments, "--methods", "head,wide", "--chart", str(tmp_path / "chart.svg")])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("head", "wide", "gain over head", "chart.svg"))
    main([*arguments, "--markdown"])
    printed = capsys.readouterr()
    assert "| visual_prompt_tuning | failed: ValueError: again |" in printed.out
    assert "[3/6] visual_prompt_tuning, seed 0: failed" in printed.err
    main([*arguments, "--methods", "head", "--json"])
    assert list(json.loads(capsys.readouterr().out)["strategies"]) == ["head"]
