"""A method that another package brings: one file and an entry point, and all that ours can do, it can."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_peft as lp
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.strategies import registry
from lightning_peft.training.cli import main
from tests.training.test_callback_resume import assert_equal, fit
from tests.training.toys import LORA, Interrupt, Plain, network

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
SCALING = {"class_path": "InputScaling", "init_args": {"limit": 0.5, "targets": ["0", "3"]}}
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def package(site: Path) -> Path:
    """Write what pip would leave of a package with one file: the module, and metadata with an entry point."""
    site.mkdir()
    shutil.copy(EXAMPLE, site / "own_method.py")
    metadata = site / "own_method-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-method\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[lightning_peft.methods]\ninput_scaling = own_method:InputScaling\n")
    return site


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package is installed for the length of a test; the contract suite does not see it."""
    before = dict(registry._METHODS)
    site = package(tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    registry._load_entry_points.cache_clear()
    yield site
    sys.modules.pop("own_method", None)
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._load_entry_points.cache_clear()


def moved(model: torch.nn.Module, strategy: Any, name: str = "default") -> lp.Handle:
    """Install and give every tensor that trains another value."""
    handle = lp.inject(model, strategy, name)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    return handle


@pytest.mark.usefixtures("installed")
def test_it_is_a_method_like_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert "input_scaling" in [info.name for info in lp.list_methods()]
    main(["methods"])
    assert "Scales the input of every layer" in capsys.readouterr().out
    main(["methods", "input_scaling"])
    card = capsys.readouterr().out
    assert "limit = 1.0" in card
    assert "no factor leaves the range" in card
    assert lp.resolve("input_scaling") == lp.resolve({"class_path": "InputScaling"})
    with pytest.raises(ConfigError, match=r"limit=0.*above 0"):
        lp.resolve({"class_path": "InputScaling", "init_args": {"limit": 0.0}})
    with pytest.raises(ConfigError, match=r"'limti'.*'limit'"):
        lp.resolve({"class_path": "InputScaling", "init_args": {"limti": 1.0}})
    assert lp.estimate(network(), SCALING, inputs=X).trainable == 32 + 16


def test_another_process_finds_it_by_its_entry_point(installed: Path) -> None:
    path = os.pathsep.join([str(installed), str(EXAMPLE.parents[1])])
    command = [sys.executable, "-m", "lightning_peft", "methods", "input_scaling"]
    shown = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "input_scaling (InputScaling), family additive" in shown.stdout


@pytest.mark.usefixtures("installed")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("strategy", [SCALING, [SCALING, LORA]], ids=["alone", "composed"])
def test_it_trains_under_the_callback_and_resumes_exactly(strategy: Any, tmp_path: Path) -> None:
    whole, run = fit(tmp_path / "whole", Plain, strategy)
    fit(tmp_path / "part", Plain, strategy, Interrupt(9))
    resumed = fit(tmp_path / "again", Plain, strategy, path=tmp_path / "part" / "step=8.ckpt")
    assert_equal((whole, run), resumed)
    scales = [p for n, p in whole.net.named_parameters() if n.endswith("input_scale")]
    assert len(scales) == 2
    assert all(p.abs().max() > 0 for p in scales)
    fresh = lp.load_from_checkpoint(Plain, tmp_path / "whole" / "step=16.ckpt").eval()
    assert torch.equal(fresh(X), whole.eval()(X))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("strategy", [SCALING, [SCALING, LORA]], ids=["alone", "composed"])
def test_it_is_saved_loaded_merged_and_removed(strategy: Any, tmp_path: Path) -> None:
    model, plain = network().double().eval(), network().double().eval()
    x, before = X.double(), network().double().eval()(X.double())
    assert torch.equal(lp.inject(plain, strategy).root(x), before)  # the identity at the start
    lp.handles(plain)["default"].remove()
    handle = moved(model, strategy)
    after = model(x)
    assert (after - before).abs().max() > 1e-2
    lp.save_adapter(handle, tmp_path / "adapter")
    lp.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain(x), after)
    handle.merge()
    torch.testing.assert_close(model(x), after, rtol=0, atol=1e-10)
    handle.unmerge()
    handle.remove()
    assert torch.equal(model(x), before)


def test_without_the_package_its_files_say_what_is_missing(installed: Path, tmp_path: Path) -> None:
    lp.save_adapter(moved(network(), SCALING), tmp_path / "adapter")
    sys.path.remove(str(installed))
    registry._METHODS.pop("input_scaling")
    with pytest.raises(PEFTError, match="InputScaling"):
        lp.load_adapter(network(), tmp_path / "adapter")


@pytest.mark.usefixtures("installed")
def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = importlib.import_module("own_method").main()
    assert after < before / 20
    assert "40 parameters" in capsys.readouterr().out
