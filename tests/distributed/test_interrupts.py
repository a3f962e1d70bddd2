"""Two processes that are interrupted in the middle of an epoch, killed or by an error, end where the uninterrupted run does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.distributed import cases, ranks
from tests.distributed.test_cells import adapter, furthest

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("distributed")]
METHODS = ("LoRA", "QLoRA", "AdaLoRA", "PrefixTuning", "VeRA")
FAST = {("LoRA", "fsdp2"), ("AdaLoRA", "ddp")}


@pytest.mark.parametrize(
    ("method", "kind"),
    [pytest.param(m, k, marks=() if (m, k) in FAST else pytest.mark.slow) for m in METHODS for k in ("ddp", "fsdp2")],
)
def test_an_interrupted_run_resumes_exactly(method: str, kind: str, tmp_path: Path) -> None:
    draw = random.Random(f"{method} {kind}")
    step, how = draw.randrange(3, cases.STEPS - 2), draw.choice(["kill", "error"])
    ranks.run(cases.fit_text, kind, method, tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(ranks.RankError, match="died with -9|RuntimeError: pulled the plug"):
        ranks.run(cases.fit_text, kind, method, broken, interrupt=(step, how))
    newest = max(broken.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert newest.stem == f"step={step}"  # every completed step was saved
    ranks.run(cases.fit_text, kind, method, broken, start=newest)
    assert furthest(adapter(tmp_path / "whole"), adapter(broken)) == 0.0
