"""Masks and gates on two processes: every rank has the same, and a sharded base is not calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import mask_cases, ranks
from tests.distributed.test_cells import adapter

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("distributed")]


@pytest.mark.parametrize("method", ["fish", "diff", "random"])
def test_ranks_agree(method: str, tmp_path: Path) -> None:
    one, other = ranks.run(mask_cases.fit, "ddp", method, tmp_path)
    assert one["state"] == other["state"]
    if method == "fish":
        assert one["examples"] == other["examples"] == 4  # half of the samples each
        assert one["state"]["shared-mask.indices"] == mask_cases.whole().tolist()


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_sharded_base_takes_a_calibration_or_a_checkpoint_and_is_refused_without(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError, match=r"ConflictError: adapter 'default' starts from data.*\(FSDP\)"):
        ranks.run(mask_cases.fit, kind, "fish", tmp_path / "refused")
    given = {"shared-mask.indices": mask_cases.whole()}
    seen = ranks.run(mask_cases.fit, kind, "fish", tmp_path / "given", given=given)
    assert [rank["examples"] for rank in seen] == [0, 0]
    trained = adapter(tmp_path / "given")
    assert torch.equal(trained["shared-mask.indices"].long(), given["shared-mask.indices"].long())
    assert trained["shared-mask.values"].abs().min() > 0
    seen = ranks.run(mask_cases.fit, kind, "fish", tmp_path / "again", start=tmp_path / "given" / "end.ckpt")
    assert [rank["examples"] for rank in seen] == [0, 0]
    assert all(torch.equal(value, trained[key]) for key, value in adapter(tmp_path / "again").items())
