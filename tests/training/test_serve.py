"""What an adapter file says about its use is believed only as far as it makes sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, FormatError, PEFTError
from lightning_peft.training import serve
from lightning_peft.training.serve import MOST_ROWS, generate_text, open_adapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)


def saved(folder: Path, **usage: Any) -> Path:
    handle = lp.inject(Net(), lp.LoRA(rank=2, targets=["up"]))
    handle.usage = usage
    return lp.save_adapter(handle, folder)


NONSENSE: dict[str, dict[str, Any]] = {
    "task": {"task": "rm -rf"},
    "task that is a list": {"task": ["causal_lm"]},
    "base that is a list": {"base": ["a"]},
    "labels that are a number": {"labels": 10**12},
    "labels that are numbers": {"labels": [1, 2]},
    "tokenizer": {"tokenizer": {"a": 1}},
    "special tokens": {"special_tokens": "abc"},
    "a vocabulary of special tokens": {"special_tokens": ["<a>"] * (MOST_ROWS + 1)},
    "prompt": {"prompt": 3},
    "revision": {"revision": 3},
}


@pytest.mark.parametrize("usage", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_before_a_model_is_loaded(
    usage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*args: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(serve, "load_model", load_model)
    saved(tmp_path, **{"base": "some/base", **usage})
    with pytest.raises(FormatError, match="its usage has|trained for the task"):
        open_adapter(tmp_path)
    with pytest.raises(FormatError):
        generate_text(tmp_path, ["a"])


@pytest.mark.parametrize(
    "usage", [{"dtype": "int8"}, {"quantization": {"scheme": "int2"}}, {"quantization": "a"}, {"base": "a" * 10**6}]
)
def test_options_of_the_base_are_checked_where_the_base_is(usage: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, **{"base": str(tmp_path / "nowhere"), **usage})
    with pytest.raises(PEFTError):
        open_adapter(tmp_path)


def test_no_base(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match="does not say which base"):
        open_adapter(tmp_path)
