"""AdaMix on two processes: the same draws on both, with a seed and without, and the training of one process with whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases, ranks
from tests.distributed.test_cells import adapter, furthest

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("distributed")]


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("ddp", False),
        ("fsdp2", True),
        *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (("ddp", True), ("fsdp2", False))),
    ],
)
def test_two_processes_learn_what_one_does(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    options = {"callback": {"verbose": False, "gradient_checkpointing": checkpointing}}
    ranks.run(cases.fit, "single", "AdaMix", tmp_path / "one", ranks=1)
    ranks.run(cases.fit, kind, "AdaMix", tmp_path / "two", **options)
    assert furthest(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 1e-5
    ranks.run(cases.fit, kind, "AdaMix", tmp_path / "again", start=tmp_path / "two" / "step=8.ckpt", **options)
    assert furthest(adapter(tmp_path / "two"), adapter(tmp_path / "again")) == 0.0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_without_a_seed_draw_the_same(kind: str, tmp_path: Path) -> None:
    one, other = ranks.run(cases.draws_unseeded, kind, tmp_path)
    assert one == other
    assert len(set(map(tuple, one["draws"]))) > 1


@pytest.mark.parametrize("fit", [cases.fit_foreign_mixture, cases.fit_whole_mixture])
def test_any_module_under_ddp(fit: Any, tmp_path: Path) -> None:
    one, other = ranks.run(fit, "ddp", tmp_path / "two")
    (alone,) = ranks.run(fit, "single", tmp_path / "one", ranks=1)
    assert one == other
    assert max(abs(a - b) for a, b in zip(one, alone, strict=True)) < 1e-5
