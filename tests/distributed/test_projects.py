"""Whole projects on two processes: foreign modules, configs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

import lightning_peft as lp
from examples.assets import smollm2
from lightning_peft.checkpoint import read_adapter
from lightning_peft.errors import ConfigError
from tests.benchmarks import sharded_save
from tests.distributed import cases, ranks
from tests.distributed.test_cells import adapter, furthest
from tests.training.test_cli import base, config  # noqa: F401 - fixtures

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("distributed")]
CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_foreign_module_only_adds_the_callback(tmp_path: Path) -> None:
    ranks.run(cases.fit_foreign, "ddp", "plain", tmp_path / "ddp")
    expected = adapter(tmp_path / "ddp")
    for kind, how in (("fsdp1", "plain"), ("fsdp2", "lp.shard"), ("fsdp2", "by hand")):
        folder = tmp_path / f"{kind}-{how}"
        seen = ranks.run(cases.fit_foreign, kind, how, folder)
        assert furthest(expected, adapter(folder)) < 1e-5
        # The two blocks and the rest are units, whoever says so.
        assert [rank["units"] for rank in seen] == [3 if kind == "fsdp2" else 2] * 2


def test_sharding_before_the_adapter_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError, match=r"ConflictError.*Call callback.apply\(self\) in configure_model"):
        ranks.run(cases.fit_foreign, "fsdp2", "forgotten", tmp_path)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_merging_at_the_end_is_refused_before_training(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError, match="weights that lie in pieces cannot be merged"):
        ranks.run(cases.fit_foreign, kind, "plain", tmp_path, merge_on_end=True)


@pytest.mark.slow
def test_fsdp1_takes_the_dtype_of_the_base(tmp_path: Path) -> None:
    assert ranks.run(cases.fit_wide, "fsdp1", tmp_path, "bfloat16", None) == [{"torch.bfloat16"}] * 2
    assert ranks.run(cases.fit_wide, "fsdp2", tmp_path, "bfloat16", None) == [{"torch.float32"}] * 2
    with pytest.raises(ranks.RankError, match="storage_dtype='float32'"):
        ranks.run(cases.fit_wide, "fsdp1", tmp_path, "float32", {"scheme": "nf4"})
    for scheme in ("nf4", "fp4", "int8"):
        assert ranks.run(cases.fit_wide, "fsdp2", tmp_path, "bfloat16", {"scheme": scheme}) == [{"torch.float32"}] * 2


def test_what_needs_whole_weights_is_refused_on_a_sharded_model(tmp_path: Path) -> None:
    errors = ranks.run(cases.handle_errors, tmp_path)[0]
    assert errors.keys() == {"merge", "remove", "disabled", "save", "inject", "shard"}
    assert all(message.startswith("ConflictError") for message in errors.values())
    assert not (tmp_path / "by-hand").exists()


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    class DeepSpeedStrategy:
        """Stands in for Lightning's, which is told by its name."""

    class Trainer:
        callbacks: list[object]
        strategy = DeepSpeedStrategy()

    peft, trainer = lp.PEFTCallback("lora", verbose=False), Trainer()
    trainer.callbacks = [peft]
    model = cases.Foreign(peft, "plain")
    model.net = cases.base()
    with pytest.raises(ConfigError, match="DeepSpeedStrategy.*Use DDP, FSDP2"):
        peft.setup(trainer, model, "fit")
    assert not lp.handles(model)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_configs_are_whole_jobs(name: str, base: Path, config: Path, tmp_path: Path) -> None:  # noqa: F811
    small = {"model.base": base, "data.data_path": config.parent / "sms.csv", "model.callback.export": tmp_path / "adapter"}
    small |= {"trainer.max_steps": 2, "trainer.default_root_dir": tmp_path, "data.val_fraction": 0.2, "data.batch_size": 2}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.logger": "false"}
    ranks.run(cases.command_line, "fit", "--config", str(CONFIGS / f"{name}.yaml"), *(f"--{k}={v}" for k, v in small.items()))
    assert read_adapter(tmp_path / "adapter" / "last").manifest["methods"] == {"lora": 1}


def test_saving_does_not_gather_the_frozen_base(tmp_path: Path) -> None:
    small = LlamaConfig(vocab_size=8000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
    weights = 4 * (2 * 8000 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 256))
    for kind in ("fsdp1", "fsdp2"):
        figures, _ = ranks.run(sharded_save.measure, kind, "adapter", tmp_path, small)
        assert figures["sent"] < weights / 4
        assert figures["file"] < weights / 4
    assert ranks.run(sharded_save.measure, "fsdp2", "full", tmp_path, small)[0]["sent"] > weights / 4  # it can tell


@pytest.mark.parametrize("kind", cases.GROUPS)
def test_every_rank_starts_from_the_adapter_of_rank_zero(kind: str, tmp_path: Path) -> None:
    (own, start), (other, same) = ranks.run(cases.start_unseeded, kind, tmp_path)
    assert own != other  # each has drawn its own
    assert start == same == own


def test_a_rank_without_labels_validates_with_the_others(tmp_path: Path) -> None:
    (alone,) = ranks.run(cases.validate_few, "single", tmp_path, ranks=1)
    for found in ranks.run(cases.validate_few, "ddp", tmp_path):
        assert found == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_smollm2_trains_alike_under_every_strategy(tmp_path: Path) -> None:
    folder = str(smollm2())
    ranks.run(cases.fit_smollm2, "single", folder, tmp_path / "single", ranks=1, timeout=300)
    for kind in cases.GROUPS:
        ranks.run(cases.fit_smollm2, kind, folder, tmp_path / kind, timeout=300)
        assert furthest(adapter(tmp_path / "single"), adapter(tmp_path / kind)) < 1e-5, kind
