from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoint import load_adapter, read_adapter
from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError, FormatError, MergeError
from tests.training.toys import InConfigureModel, Plain, adapter_state, base_state, callback, loader, network, same, trainer

# What Lightning says about a file that was written with a ModelCheckpoint, or into another folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
KEYS = {f"net.{i}.peft.default.lora_{m}" for i in (0, 3) for m in "AB"}


def fitted(folder: Path, *callbacks: Any, module: Any = None, **options: Any) -> tuple[pl.Trainer, Any, Path]:
    """Fit one epoch with a ModelCheckpoint; return the trainer, the module and the file."""
    module = Plain() if module is None else module
    keep = ModelCheckpoint(folder / "checkpoints", **options.pop("keep", {}))
    run = trainer(folder, *(callbacks or (callback(),)), keep, enable_checkpointing=True, **options)
    run.fit(module, loader())
    return run, module, Path(keep.best_model_path)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def edited(path: Path, change: Any) -> Path:
    checkpoint = read(path)
    change(checkpoint)
    torch.save(checkpoint, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


# ---------------------------------------------------------------------- what is saved


def test_checkpoint_holds_the_adapter_only(tmp_path: Path) -> None:
    run, module, path = fitted(tmp_path)
    checkpoint = read(path)
    assert set(checkpoint["state_dict"]) == KEYS
    assert same(checkpoint["state_dict"], adapter_state(module))
    assert checkpoint["peft"]["adapters"]["default"]["root"] == "net"
    assert set(module.state_dict()) > KEYS  # the user's own state_dict() stays whole
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(KEYS)
    run.save_checkpoint(tmp_path / "after.ckpt")  # after fit too
    assert set(read(tmp_path / "after.ckpt")["state_dict"]) == KEYS


def test_weights_only_checkpoint_holds_the_adapter_only(tmp_path: Path) -> None:
    """S3: save_weights_only skips every on_save_checkpoint."""
    _, module, path = fitted(tmp_path, keep={"save_weights_only": True})
    checkpoint = read(path)
    assert set(checkpoint["state_dict"]) == KEYS
    assert set(read_adapter(path).state) == {"0.lora_A", "0.lora_B", "3.lora_A", "3.lora_B"}
    fresh = Plain()
    trainer(tmp_path, callback()).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert same(adapter_state(fresh), adapter_state(module))


def test_checkpoint_is_small(tmp_path: Path) -> None:
    class Wide(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(32, 2048), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2048, 2048), nn.Linear(2048, 2))

    strategy = {"class_path": "LoRA", "init_args": {"rank": 16, "targets": ["0", "3"]}}
    run, module, path = fitted(tmp_path, callback(strategy), module=Wide())

    def size(value: Any) -> int:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.tell()

    needed = size([adapter_state(module), run.optimizers[0].state_dict(), run.fit_loop.state_dict()])
    assert path.stat().st_size <= 1.05 * needed + 64 * 1024
    assert path.stat().st_size > size(adapter_state(module)) * 2.5  # two moments of Adam


class WithHead(Plain):
    """A head beside the adapted root, with state, and a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
        self.teacher = nn.Sequential(nn.Linear(32, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        return self.head(self.net(x))


def test_what_trains_outside_the_root_is_saved_and_a_frozen_teacher_is_not(tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path, callback(module="net"), module=WithHead())
    statistics = {f"head.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(read(path)["state_dict"]) == KEYS | {"head.0.weight", "head.0.bias", "count"} | statistics
    fresh = WithHead()
    trainer(tmp_path, callback(module="net")).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert torch.equal(fresh.head[0].weight, module.head[0].weight)
    assert torch.equal(fresh.head[1].running_mean, module.head[1].running_mean)


def test_full_checkpoint_holds_the_base_too(tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path, callback(checkpoint="full"))
    assert set(read(path)["state_dict"]) == set(module.state_dict())
    fresh = Plain()
    nn.init.normal_(fresh.net[0].weight)
    nn.init.normal_(fresh.net[3].weight)
    fresh.load_state_dict(base_state(fresh))
    again = Plain()
    trainer(tmp_path, callback(checkpoint="full")).test(again, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert same(adapter_state(again), adapter_state(module))


def test_part_of_the_base_missing_is_an_error(tmp_path: Path) -> None:
    """Lenient about a base that is elsewhere, not about a file that holds half of one."""
    _, _, path = fitted(tmp_path, callback(checkpoint="full"))
    damaged = edited(path, lambda c: c["state_dict"].pop("net.0.weight"))
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.0\.weight"):
        trainer(tmp_path, callback(checkpoint="full")).test(Plain(), loader(), ckpt_path=damaged)


# ---------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("cls", [Plain, InConfigureModel])
def test_best_is_the_same_in_the_old_and_in_a_fresh_trainer(cls: type[Plain], tmp_path: Path) -> None:
    run, module, path = fitted(tmp_path, module=cls())
    (old,) = run.test(module, loader(shuffle=False), ckpt_path="best", verbose=False)
    (new,) = trainer(tmp_path, callback()).test(cls(), loader(shuffle=False), ckpt_path=path, verbose=False)
    (untrained,) = trainer(tmp_path).test(cls(), loader(shuffle=False), verbose=False)
    assert old == new != untrained


def test_missing_adapter_key_is_an_error(tmp_path: Path) -> None:
    """S9: strict_loading=False would resume from random adapters."""
    _, _, path = fitted(tmp_path)

    def rename(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0.peft.default.lora_C"] = checkpoint["state_dict"].pop("net.0.peft.default.lora_A")

    with pytest.raises(CompatibilityError, match=r"lacks 1 of 4 tensors.*net\.0\.peft\.default\.lora_A"):
        trainer(tmp_path, callback()).fit(Plain(), loader(), ckpt_path=edited(path, rename))


def test_state_without_adapter_keys_is_refused_by_the_module_too(tmp_path: Path) -> None:
    """Weight averaging and others load on their own; the hook on the module judges there."""
    seen: list[type] = []

    class LoadsItself(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.load_state_dict(adapter_state(pl_module))  # no base: fine
            for wrong in ({}, {k: v for k, v in adapter_state(pl_module).items() if "lora_A" in k}):
                with pytest.raises(CompatibilityError, match="keep its random values"):
                    pl_module.load_state_dict(wrong)
                seen.append(dict)

    trainer(tmp_path, callback(), LoadsItself()).fit(Plain(), loader())
    assert len(seen) == 2


def test_other_rank_is_refused_before_anything_changes(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    module = Plain()
    other = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["0", "3"]}})
    other.apply(module)
    before = adapter_state(module)
    with pytest.raises(CompatibilityError, match=r"shape \(2, 32\), the module expects \(1, 32\)"):
        trainer(tmp_path, other).fit(module, loader(), ckpt_path=path)
    assert same(before, adapter_state(module))


def test_other_weights_of_the_same_architecture_are_refused(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    module = Plain()
    nn.init.normal_(module.net[0].weight)
    nn.init.normal_(module.net[3].weight)
    with pytest.raises(CompatibilityError, match="another base model"):
        trainer(tmp_path, callback()).fit(module, loader(), ckpt_path=path)


def test_other_name_and_foreign_adapter_are_named(tmp_path: Path) -> None:
    second = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["3"]}}, name="second")
    _, _, path = fitted(tmp_path, callback(), second)
    with pytest.raises(CompatibilityError, match=r"no adapter 'third', but 'default', 'second'"):
        trainer(tmp_path, callback(name="third")).test(Plain(), loader(), ckpt_path=path)
    with pytest.raises(CompatibilityError, match="also holds 'net.3.peft.second.lora_A'"):
        trainer(tmp_path, callback()).test(Plain(), loader(), ckpt_path=path)


def test_checkpoint_without_adapter_keys_is_an_error(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)

    def strip(checkpoint: dict[str, Any]) -> None:
        del checkpoint["peft"]
        checkpoint["state_dict"] = {"net.0.weight": torch.zeros(16, 32)}

    with pytest.raises(CompatibilityError, match="holds no adapter, and it is no full checkpoint"):
        trainer(tmp_path, callback()).fit(Plain(), loader(), ckpt_path=edited(path, strip))


@pytest.mark.parametrize("cls", [Plain, InConfigureModel])
def test_full_checkpoint_from_before_peft_becomes_the_base(cls: type[Plain], tmp_path: Path, capsys: Any) -> None:
    keep = ModelCheckpoint(tmp_path / "plain")
    plain = cls(lr=0.1)
    trainer(tmp_path, keep, enable_checkpointing=True, max_epochs=3).fit(plain, loader())
    module = cls()
    run = trainer(tmp_path, callback(verbose=True), max_epochs=1)
    run.fit(module, loader(), ckpt_path=keep.best_model_path)
    assert "made before PEFT" in capsys.readouterr().out
    assert same(base_state(module), plain.state_dict())
    assert run.global_step == 4
    assert all(v.abs().max() > 0 for v in adapter_state(module).values())
    with lp.handles(module)["default"].disabled():
        module.eval(), plain.eval()
        x = torch.randn(2, 32)
        assert torch.equal(module(x), plain(x))


def test_full_checkpoint_from_before_peft_with_claimed_parameters(tmp_path: Path) -> None:
    """BitFit notes the base's values when it is installed: they have to be those of the checkpoint."""
    keep = ModelCheckpoint(tmp_path / "plain")
    plain = Plain(lr=0.1)
    trainer(tmp_path, keep, enable_checkpointing=True, max_epochs=3).fit(plain, loader())
    module = Plain()
    trainer(tmp_path, callback("bitfit")).fit(module, loader(), ckpt_path=keep.best_model_path)
    assert not torch.equal(module.net[0].bias, plain.net[0].bias)
    assert torch.equal(module.net[0].weight, plain.net[0].weight)
    with lp.handles(module)["default"].disabled():
        assert torch.equal(module.net[0].bias, plain.net[0].bias)


def test_without_the_callback_an_adapter_checkpoint_is_an_error(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(tmp_path).test(Plain(), loader(), ckpt_path=path)


# ---------------------------------------------------------------------- load_from_checkpoint


@pytest.mark.parametrize("cls", [Plain, InConfigureModel])
@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_load_from_checkpoint(cls: type[Plain], mode: str, tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path, callback(checkpoint=mode), module=cls(lr=0.02))
    loaded = lp.load_from_checkpoint(cls, path)
    assert type(loaded) is cls
    assert loaded.hparams["lr"] == 0.02
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))
    x = torch.randn(2, 32)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    trainer(tmp_path, callback(checkpoint=mode)).fit(loaded.train(), loader())  # and on with it
    assert lp.load_from_checkpoint(cls, path, lr=0.5).hparams["lr"] == 0.5


def test_load_from_checkpoint_with_two_adapters_and_trained_head(tmp_path: Path) -> None:
    second = callback({"class_path": "BitFit", "init_args": {"targets": ["3"]}}, name="second", module="net")
    _, module, path = fitted(tmp_path, callback(module="net"), second, module=WithHead())
    loaded = lp.load_from_checkpoint(WithHead, path)
    trained = {k: v for k, v in module.state_dict().items() if not k.startswith("teacher")}
    assert same(trained, {k: v for k, v in loaded.state_dict().items() if k in trained})
    with lp.handles(loaded)["second"].disabled():
        assert torch.equal(loaded.net[3].bias, network()[3].bias)


def test_load_from_checkpoint_refuses_other_base_and_files_without_adapter(tmp_path: Path) -> None:
    class Other(Plain):
        def __init__(self, lr: float = 0.01) -> None:
            super().__init__(lr)
            nn.init.normal_(self.net[0].weight)
            nn.init.normal_(self.net[3].weight)

    _, _, path = fitted(tmp_path)
    with pytest.raises(CompatibilityError, match="another base model"):
        lp.load_from_checkpoint(Other, path)
    plain = edited(path, lambda c: c.pop("peft"))
    with pytest.raises(FormatError, match="holds no adapter"):
        lp.load_from_checkpoint(Plain, plain)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match="truncated"):
        lp.load_from_checkpoint(Plain, path)


# ---------------------------------------------------------------------- init_from


@pytest.mark.parametrize("source", ["folder", "ckpt"])
@pytest.mark.parametrize("cls", [Plain, InConfigureModel])
def test_init_from_starts_afresh_from_an_adapter(source: str, cls: type[Plain], tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path, callback(export=True))
    start = tmp_path / "adapter" / "last" if source == "folder" else path
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(state=adapter_state(pl_module), step=trainer.global_step, optimizer=len(trainer.optimizers[0].state))

    fresh = cls()
    trainer(tmp_path, callback(init_from=start), Look()).fit(fresh, loader())
    assert same(seen["state"], adapter_state(module))
    assert (seen["step"], seen["optimizer"]) == (0, 0)
    assert not same(adapter_state(fresh), adapter_state(module))


def test_init_from_brings_extra_modules(tmp_path: Path) -> None:
    peft = {"module": "net", "extra_modules": ["head"]}
    _, module, _ = fitted(tmp_path, callback(export=True, **peft), module=WithHead())
    fresh = WithHead()
    callback(init_from=tmp_path / "adapter" / "last", **peft).apply(fresh)
    assert torch.equal(fresh.head[0].weight, module.head[0].weight)
    assert torch.equal(fresh.head[1].running_mean, module.head[1].running_mean)


def test_init_from_is_checked_before_anything_changes(tmp_path: Path) -> None:
    fitted(tmp_path, callback(export=True))
    folder = tmp_path / "adapter" / "last"
    other = Plain()
    nn.init.normal_(other.net[0].weight)
    nn.init.normal_(other.net[3].weight)
    with pytest.raises(CompatibilityError, match="another base model"):
        callback(init_from=folder).apply(other)
    assert adapter_state(other) == {}
    rank1 = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["0", "3"]}}, init_from=folder)
    module = Plain()
    with pytest.warns(UserWarning, match="was trained as LoRA"), pytest.raises(CompatibilityError, match="shape"):
        rank1.apply(module)
    assert adapter_state(module) == {}
    with pytest.raises(FormatError, match="not an adapter folder"):
        callback(init_from=tmp_path).apply(module)


# ---------------------------------------------------------------------- exports and merge


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_adapter_folders_lie_ready(tmp_path: Path, capsys: Any) -> None:
    module = WithHead()
    module.tokenizer = Tokenizer()
    keep = {"monitor": "epoch", "mode": "min"}  # best is the first epoch, not the last
    peft = callback(export=True, verbose=True, module="net")
    _, module, best = fitted(tmp_path, peft, module=module, keep=keep, max_epochs=3)
    folder = tmp_path / "adapter"
    assert f"{folder / 'last'}, {folder / 'best'}" in capsys.readouterr().out
    last, top = read_adapter(folder / "last"), read_adapter(folder / "best")
    assert same(dict(last.state), lp.handles(module)["default"].state_dict())
    assert same(dict(top.state), dict(read_adapter(best).state))
    assert torch.equal(last.extra_state["head.0.weight"], module.head[0].weight)
    assert "head.1.running_mean" in top.extra_state
    assert not same(dict(top.state), dict(last.state))
    for one in ("last", "best"):
        assert (folder / one / "tokenizer.json").is_file()
    again = WithHead()
    load_adapter(again, folder / "last")
    x = torch.randn(4, 32)
    assert torch.equal(again.eval()(x), module.eval()(x))
    net = network()
    with pytest.warns(UserWarning, match="no place"):
        load_adapter(net, folder / "last")  # the root alone takes the adapter as well
    assert torch.equal(net.eval()(x), module.net.eval()(x))


def test_export_names_and_places(tmp_path: Path) -> None:
    fitted(tmp_path / "a", callback(export=True, name="mine"))
    assert (tmp_path / "a" / "adapter" / "mine" / "last" / "adapter.json").is_file()
    fitted(tmp_path / "b", callback(export=str(tmp_path / "elsewhere")))
    assert (tmp_path / "elsewhere" / "best" / "adapter.json").is_file()
    fitted(tmp_path / "c", callback(export=True), logger=True)
    assert (tmp_path / "c" / "lightning_logs" / "version_0" / "adapter" / "last" / "adapter.json").is_file()


def test_merge_on_end_comes_after_every_checkpoint(tmp_path: Path) -> None:
    class SavesLate(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "late.ckpt")

    start = network()
    _, module, path = fitted(tmp_path, callback(merge_on_end=True, export=True), SavesLate(), keep={"save_last": True})
    handle = lp.handles(module)["default"]
    assert handle.merged
    twin = Plain()
    load_adapter(twin.net, tmp_path / "adapter" / "last")
    for file in (path, path.with_name("last.ckpt"), tmp_path / "late.ckpt"):
        assert same(dict(read_adapter(file).state), lp.handles(twin)["default"].state_dict())
    x = torch.randn(4, 32)
    torch.testing.assert_close(module.eval()(x), twin.eval()(x))
    assert not torch.equal(module.net[0].weight, start[0].weight)
    run = trainer(tmp_path, callback())
    run.test(module, loader(shuffle=False), verbose=False)
    with pytest.raises(ConflictError, match="is merged"):
        run.fit(module, loader())
    with pytest.raises(MergeError, match="unmerge"):
        run.test(module, loader(shuffle=False), ckpt_path=path, verbose=False)


# ---------------------------------------------------------------------- averaging


def test_ema_saves_averages_of_the_adapter_and_resumes_exactly(tmp_path: Path) -> None:
    def fit(folder: Path, path: Any = None) -> Any:
        torch.manual_seed(5)
        module = Plain()
        keep = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        run = trainer(folder, callback(), EMAWeightAveraging(decay=0.5), keep, enable_checkpointing=True, max_epochs=4)
        run.fit(module, loader(), ckpt_path=path)
        return module

    whole = fit(tmp_path / "a")
    half = read(tmp_path / "a" / "epoch=1.ckpt")
    assert set(half["state_dict"]) == set(half["current_model_state"]) == KEYS
    assert not same(half["state_dict"], half["current_model_state"])
    resumed = fit(tmp_path / "b", tmp_path / "a" / "epoch=1.ckpt")
    assert same(adapter_state(whole), adapter_state(resumed))
    read_adapter(tmp_path / "a" / "epoch=1.ckpt")  # the manifest describes the averages, which are in the file


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_swa_keeps_no_full_model_in_the_checkpoint(tmp_path: Path) -> None:
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    _, _, path = fitted(tmp_path, callback(), swa, max_epochs=4, keep={"every_n_epochs": 1, "save_last": True})
    (state,) = (s for s in read(path.with_name("last.ckpt"))["callbacks"].values() if "average_model_state" in s)
    assert set(state["average_model_state"] or KEYS) == KEYS


def test_swa_and_batch_norm_of_the_base_are_refused(tmp_path: Path) -> None:
    class Norm(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    with pytest.raises(ConfigError, match="running statistics"):
        trainer(tmp_path, callback(), StochasticWeightAveraging(0.01)).fit(Norm(), loader())
