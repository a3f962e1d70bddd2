"""A checkpoint of one strategy resumes under every other: the run ends where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.checkpoint import read_adapter
from tests.distributed import cases, ranks
from tests.distributed.test_cells import adapter, furthest

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("distributed")]
WRITERS = ("single", "ddp", "fsdp1", "fsdp1-pieces", "fsdp2", "fsdp2-pieces")
READERS = ("single", "ddp", "fsdp1", "fsdp2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of step 8 by every strategy, and of the whole run on one process."""
    folders = {}
    for writer in WRITERS:
        kind, _, pieces = writer.partition("-")
        folders[writer] = tmp_path_factory.mktemp(writer)
        steps = cases.STEPS if writer == "single" else 8
        ranks.run(cases.write, kind, folders[writer], steps, bool(pieces), ranks=1 if kind == "single" else 2)
    return folders


PAIRS = [(writer, reader) for writer in WRITERS for reader in READERS]


def fast(writer: str, reader: str) -> bool:
    return reader == "single" or (reader == "fsdp2" and writer != "fsdp2") or (writer, reader) == ("fsdp2-pieces", "fsdp1")


@pytest.mark.parametrize(("writer", "reader"), [p if fast(*p) else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS])
def test_any_strategy_resumes_what_any_other_has_written(
    writer: str, reader: str, written: dict[str, Path], tmp_path: Path
) -> None:
    start = written[writer] / "step=8.ckpt"
    assert start.is_dir() == writer.endswith("pieces")
    ranks.run(cases.resume, reader, "LoRA", tmp_path, start, ranks=1 if reader == "single" else 2)
    assert furthest(adapter(written["single"]), adapter(tmp_path)) < 1e-5


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_pieces_resume_exactly_where_they_were_written(kind: str, written: dict[str, Path], tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    ranks.run(cases.write, kind, whole, cases.STEPS, True)
    ranks.run(cases.resume, kind, "LoRA", again, whole / "step=8.ckpt")
    assert furthest(adapter(whole), adapter(again)) == 0.0


@pytest.mark.parametrize("writer", WRITERS)
def test_adapters_are_read_from_any_checkpoint(writer: str, written: dict[str, Path]) -> None:
    found = read_adapter(written[writer] / "step=8.ckpt")
    expected = read_adapter(written["single"] / "step=8.ckpt")
    assert furthest(dict(expected.state), dict(found.state)) < 1e-5
    assert found.manifest["base"] == expected.manifest["base"]
    assert all(type(tensor) is torch.Tensor for tensor in found.state.values())
    assert "adapter 'default'" in lp.inspect_adapter(written[writer] / "step=8.ckpt")
    model = lp.load_from_checkpoint(lp.PEFTLightningModule, written[writer] / "step=8.ckpt", base=cases.base())
    assert furthest(dict(found.state), model.handle.state_dict()) == 0.0
