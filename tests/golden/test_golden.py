"""Adapter files of every released version load for ever, and give the numbers that they gave then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from tests.golden.make import Tiny, given_input

VERSIONS = sorted(p.parent for p in Path(__file__).parent.glob("*/adapter.json"))


def test_this_version_has_one() -> None:
    assert lp.__version__ in [folder.name for folder in VERSIONS]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_loads_and_gives_the_same_output(folder: Path) -> None:
    expected = torch.tensor(json.loads((folder / "expected.json").read_text()), dtype=torch.float64)
    model = Tiny()
    plain = model(given_input().float())
    lp.load_adapter(model, folder)
    out = model(given_input().float())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    assert (plain - out).abs().max() > 0.1  # the adapter matters
