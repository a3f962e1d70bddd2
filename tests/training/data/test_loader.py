"""Order, shards, state; with a real Trainer: mid-epoch resume."""

from __future__ import annotations

import io
import random

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_peft.errors import CompatibilityError, ConfigError, DataError
from lightning_peft.training.data import EpochSampler, PEFTDataModule

# Each run here saves into a folder of its own, which ModelCheckpoint remarks on when it resumes.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

PROMPT = {"prompt": "Classify: {text}\nAnswer:", "completion": "label"}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Recorder(pl.LightningModule):
    """A model of one number that writes down its batches."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tokenizer
        self.seen = []
        self.epochs = []

    def training_step(self, batch):
        self.seen.append(batch["input_ids"].tolist())
        self.epochs.append(self.current_epoch)
        return self.weight * 1.0

    def validation_step(self, batch):
        self.log("val_loss", torch.zeros(()), batch_size=1)

    def test_step(self, batch):
        self.seen.append(batch)

    def predict_step(self, batch):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _module(data_path, tokenizer, **options):
    return PEFTDataModule(**{"val_fraction": 0.0, "batch_size": 4, **PROMPT, **options}, data_path=data_path, tokenizer=tokenizer)


def _sampler(rows=23, **options):
    return EpochSampler([(7 * i) % 11 + 1 for i in range(rows)], **{"batch_size": 4, "shuffle": True, "seed": 0, **options})


def _rows(keys):
    return [row for key in keys for row in key.indices[: len(key.indices) - key.filler]]


# ---- order and shards


def test_every_epoch_has_its_own_order_and_all_rows():
    sampler = _sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(_rows(sampler.keys()))
        assert sorted(orders[-1]) == list(range(23))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != _rows(_sampler(seed=1).keys())
    assert _rows(_sampler(shuffle=False).keys()) == list(range(23))


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"length_grouped": True}])
@pytest.mark.parametrize("rows", [1, 2, 12, 23, 24, 25])
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_are_disjoint_cover_everything_and_are_equally_long(rows, world_size, options):
    shards = [_sampler(rows, rank=rank, world_size=world_size, **options).keys() for rank in range(world_size)]
    assert sorted(row for keys in shards for row in _rows(keys)) == list(range(rows))
    assert len({tuple(len(key.indices) for key in keys) for keys in shards}) == 1
    assert len({len(_sampler(rows, rank=rank, world_size=world_size, **options)) for rank in range(world_size)}) == 1
    assert len(shards[0]) == len(_sampler(rows, world_size=world_size, **options))


def test_a_step_of_all_ranks_is_a_step_of_one_with_a_larger_batch():
    shards = [_sampler(24, rank=rank, world_size=2).keys() for rank in range(2)]
    one = _sampler(24, batch_size=8).keys()
    for step, key in enumerate(one):
        assert sorted(key.indices) == sorted(shards[0][step].indices + shards[1][step].indices)


def test_filler_rows_have_no_label(sms, make_tokenizer, monkeypatch):
    dm = PEFTDataModule(
        test_path=sms, tokenizer=make_tokenizer(), labels=["ham", "spam"], label_column="label", batch_size=3, **PROMPT
    )
    dm.setup("test")
    labelled, ids = 0, []
    for rank in range(3):
        dm.trainer = type("Fake", (), {"distributed_sampler_kwargs": {"rank": rank, "num_replicas": 3}})()
        for batch in dm.test_dataloader():
            labelled += int((batch["labels"] != -100).sum())
            ids += [i for i in batch["example_ids"].tolist() if i >= 0]
            assert ((batch["answer_labels"] == -100) == (batch["example_ids"] == -1)).all()
    assert sorted(ids) == list(range(40))
    assert labelled == dm.reports["test"].labelled


def test_length_grouping_saves_padding_and_stays_deterministic():
    def padding(**options):
        sampler = _sampler(400, **options)
        return sum(
            max(sampler.lengths[i] for i in key.indices) * len(key.indices) - sum(sampler.lengths[i] for i in key.indices)
            for key in iter(sampler.keys())
        )

    assert padding(length_grouped=True) < 0.3 * padding()
    assert _sampler(length_grouped=True).keys() == _sampler(length_grouped=True).keys()
    first, second = _sampler(length_grouped=True), _sampler(length_grouped=True)
    second.set_epoch(1)
    assert first.keys() != second.keys()


# ---- state


def test_a_resumed_pass_gives_the_rest(sms, make_tokenizer):
    dm = _module(sms, make_tokenizer())
    dm.setup("fit")
    whole = dm.train_dataloader()
    whole.set_epoch(2)
    batches = [batch["input_ids"].tolist() for batch in whole]
    part = dm.train_dataloader()
    part.set_epoch(2)
    iterator = iter(part)
    head = [next(iterator)["input_ids"].tolist() for _ in range(3)]
    state = part.state_dict()
    rest = dm.train_dataloader()
    rest.load_state_dict(state)
    assert rest.state_dict() == state
    rest.set_epoch(2)
    assert len(rest) == 10
    assert head + [batch["input_ids"].tolist() for batch in rest] == batches
    assert len(list(rest)) == 10  # the pass after it is a whole one
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


def test_another_epoch_than_the_saved_one_starts_at_its_beginning(sms, make_tokenizer):
    dm = _module(sms, make_tokenizer())
    dm.setup("fit")
    loader = dm.train_dataloader()
    next(iter(loader))
    again = dm.train_dataloader()
    again.load_state_dict(loader.state_dict())
    again.set_epoch(1)
    assert len(list(again)) == 10


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"seed": 1}, {"length_grouped": True}, {"prompt": "{text}:"}])
def test_a_position_in_other_data_is_refused(sms, make_tokenizer, options):
    old, new = _module(sms, make_tokenizer()), _module(sms, make_tokenizer(), **options)
    old.setup("fit")
    new.setup("fit")
    loader = old.train_dataloader()
    next(iter(loader))
    name = "content" if "prompt" in options else next(iter(options))
    with pytest.raises(CompatibilityError, match=f"batch 1 of epoch 0.*{name}"):
        new.train_dataloader().load_state_dict(loader.state_dict())
    list(loader)
    new.train_dataloader().load_state_dict(loader.state_dict())  # at an epoch's end nothing depends on it


def test_the_global_generators_are_neither_read_nor_moved(sms, make_tokenizer):
    dm = _module(sms, make_tokenizer())
    torch.manual_seed(1)
    random.seed(1)
    before, python = torch.get_rng_state(), random.getstate()
    dm.setup("fit")
    first = [batch["input_ids"].tolist() for batch in dm.train_dataloader()]
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    torch.manual_seed(2)
    assert [batch["input_ids"].tolist() for batch in dm.train_dataloader()] == first


# ---- with a Trainer


def _fit(data_path, tokenizer, folder, *, ckpt_path=None, trainer_options=None, every=3, **options):
    model = Recorder()
    checkpoint = ModelCheckpoint(dirpath=folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(max_epochs=2, callbacks=[checkpoint], limit_val_batches=0, **QUIET, **(trainer_options or {}))
    trainer.fit(model, datamodule=_module(data_path, tokenizer, **options), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("step", [3, 6, 9, 12, 15, 18])
@pytest.mark.parametrize("options", [{}, {"length_grouped": True}], ids=["plain", "grouped"])
def test_resume_within_an_epoch_is_exact(sms, make_tokenizer, tmp_path, step, options):
    tok = make_tokenizer()
    whole = _fit(sms, tok, tmp_path / "a", **options)
    assert len(whole.seen) == 20
    assert whole.seen[:10] != whole.seen[10:]
    torch.manual_seed(99)
    rest = _fit(sms, tok, tmp_path / "b", ckpt_path=str(tmp_path / "a" / f"step={step}.ckpt"), **options)
    assert rest.seen == whole.seen[step:]
    assert rest.epochs == whole.epochs[step:]
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("step", [5, 10, 15])
def test_resume_at_an_epochs_end_and_in_steps(sms, make_tokenizer, tmp_path, step):
    tok = make_tokenizer()
    steps = {"trainer_options": {"max_steps": 18}, "every": 5}
    whole = _fit(sms, tok, tmp_path / "a", **steps)
    rest = _fit(sms, tok, tmp_path / "b", ckpt_path=str(tmp_path / "a" / f"step={step}.ckpt"), **steps)
    assert (rest.seen, rest.epochs) == (whole.seen[step:], whole.epochs[step:])


def test_resume_with_a_limited_epoch(sms, make_tokenizer, tmp_path):
    tok = make_tokenizer()
    limited = {"trainer_options": {"limit_train_batches": 7}}
    whole = _fit(sms, tok, tmp_path / "a", **limited)
    for step in (3, 6, 9, 12):
        path = tmp_path / "a" / f"step={step}.ckpt"
        rest = _fit(sms, tok, tmp_path / f"b{step}", ckpt_path=str(path), **limited)
        assert rest.seen == whole.seen[step:]


def test_resume_from_a_checkpoint_of_the_validation(sms, make_tokenizer, tmp_path):
    tok = make_tokenizer()

    def fit(folder, ckpt_path=None):
        model = Recorder()
        callbacks = [ModelCheckpoint(dirpath=tmp_path / folder, save_top_k=-1, monitor="val_loss", filename="{step}")]
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, val_check_interval=3, **QUIET)
        trainer.fit(model, datamodule=_module(sms, tok, val_fraction=0.1), ckpt_path=ckpt_path)
        return model

    whole = fit("a")
    for path in sorted((tmp_path / "a").iterdir()):
        step = int(path.stem.split("=")[1])
        assert fit(f"b{step}", str(path)).seen == whole.seen[step:]


def test_masked_lm_resumes_with_the_same_masks(bert_tokenizer, jsonl, tmp_path):
    path = jsonl([{"text": f"cat dog run sun play {'the ' * (i + 1)}"} for i in range(24)])
    options = {"task": "masked_lm", "prompt": None, "completion": None}
    whole = _fit(path, bert_tokenizer, tmp_path / "a", every=4, **options)
    rest = _fit(path, bert_tokenizer, tmp_path / "b", every=4, ckpt_path=str(tmp_path / "a" / "step=8.ckpt"), **options)
    assert rest.seen == whole.seen[8:]


@pytest.mark.slow
def test_resume_with_workers(sms, make_tokenizer, tmp_path):
    tok = make_tokenizer()
    whole = _fit(sms, tok, tmp_path / "a", num_workers=2)
    assert whole.seen == _fit(sms, tok, tmp_path / "c").seen
    rest = _fit(sms, tok, tmp_path / "b", ckpt_path=str(tmp_path / "a" / "step=12.ckpt"), num_workers=2)
    assert rest.seen == whole.seen[12:]


def test_overfit_batches_are_the_same_in_every_epoch(sms, make_tokenizer, tmp_path):
    seen = _fit(sms, make_tokenizer(), tmp_path / "a", trainer_options={"overfit_batches": 2}, val_fraction=0.25).seen
    assert seen[:2] == seen[2:]


def test_all_stages_and_each_of_them_twice(sms, make_tokenizer):
    dm = _module(sms, None, val_fraction=0.2, test_fraction=0.2, predict_texts=["hello", "win"])
    model, trainer = Recorder(make_tokenizer()), pl.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    for _ in range(2):
        trainer.fit(model, datamodule=dm)
        trainer.validate(model, datamodule=dm, verbose=False)
        model.seen = []
        trainer.test(model, datamodule=dm, verbose=False)
        assert sum(len(batch["labels"]) for batch in model.seen) == 8
        predicted = trainer.predict(model, datamodule=dm)
        assert predicted[0]["example_ids"].tolist() == [0, 1]


def test_setup_keeps_what_it_made_until_the_tokenizer_changes(sms, make_tokenizer):
    dm = _module(sms, None)
    first = make_tokenizer()
    dm.trainer = pl.Trainer(enable_checkpointing=False, **QUIET)
    dm.trainer.strategy._lightning_module = Recorder(first)
    dm.setup("fit")
    made = dm.dataset("train")
    dm.setup("fit")
    assert dm.dataset("train") is made
    dm.trainer.strategy._lightning_module = Recorder(make_tokenizer(adds_bos=True))
    dm.setup("fit")
    assert dm.dataset("train") is not made


def test_missing_data_and_tokenizer(sms, make_tokenizer):
    with pytest.raises(ConfigError, match="no tokenizer.*'tokenizer'"):
        _module(sms, None).setup("fit")
    for stage, argument in {"fit": "data_path", "validate": "val_path", "test": "test_path"}.items():
        with pytest.raises(DataError, match=f"no data to {stage}: give {argument}"):
            _module(None if stage == "fit" else sms, make_tokenizer()).setup(stage)
    with pytest.raises(DataError, match="predict_texts or predict_path"):
        _module(sms, make_tokenizer()).setup("predict")
    with pytest.raises(DataError, match=r"blank are \[1\]"):
        _module(sms, make_tokenizer(), predict_texts=["a", " "]).setup("predict")


def test_checkpoint_of_the_settings_loads_with_weights_only(sms, make_tokenizer, tmp_path):
    _fit(sms, make_tokenizer(), tmp_path / "a", labels=["ham", "spam"])
    path = tmp_path / "a" / "step=3.ckpt"
    saved = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert saved["labels"] == ["ham", "spam"]
    assert "tokenizer" not in saved
    again = PEFTDataModule.load_from_checkpoint(path, tokenizer=make_tokenizer())
    again.setup("fit")
    assert len(again.dataset("train")) == 40


def test_settings_do_not_collide_with_the_modules_in_a_logger(sms, make_tokenizer, tmp_path):
    class Named(Recorder):
        def __init__(self, tokenizer, seed):
            super().__init__(tokenizer)
            self.save_hyperparameters(ignore=["tokenizer"])

    options = {**QUIET, "logger": CSVLogger(tmp_path), "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=1, limit_val_batches=0, **options)
    trainer.fit(Named(make_tokenizer(), seed=7), datamodule=_module(sms, None, seed=1))
    assert trainer.global_step == 1


# ---- manners


def test_help_and_config_of_the_command_line(sms, capsys, tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call, not ours

    def run(*args):
        return LightningCLI(
            Recorder, PEFTDataModule, args=list(args), run=False, save_config_callback=None, seed_everything_default=0
        )

    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    for option in ("--data.data_path", "--data.truncation {error,drop,left,right}", "--data.few_shot"):
        assert option in text
    assert "longest sequence in tokens" in text
    with pytest.raises(SystemExit):
        run("--data.truncation", "middle")
    assert "middle" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--data.data_path", sms, "--data.labels", "[ham, spam]", "--data.tokenizer", "folder", "--print_config")
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    data = run("--config", str(tmp_path / "config.yaml")).datamodule
    assert data.rows.data_path == sms
    assert data.spec.labels == ("ham", "spam")


def test_the_bar_is_seen_on_a_terminal_only(sms, make_tokenizer, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    _module(sms, make_tokenizer()).setup("fit")
    assert "Tokenizing train" in terminal.getvalue()
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    quiet = _module(sms, make_tokenizer())
    quiet.trainer = pl.Trainer(enable_checkpointing=False, **QUIET)
    quiet.setup("fit")
    assert "Tokenizing train" not in terminal.getvalue()
    assert "Tokenizing" not in capsys.readouterr().err


def test_report_is_logged(sms, make_tokenizer, caplog):
    with caplog.at_level("INFO"):
        _module(sms, make_tokenizer(), val_fraction=0.25).setup("fit")
    assert "train 30, val 10 rows; 0 exact duplicates removed" in caplog.text
    assert "0 cut, 0 dropped (truncation=error)" in caplog.text


def test_evaluation_grouped_by_length_sees_every_row_once_and_saves_padding() -> None:
    lengths = [3, 9, 1, 7, 5, 8, 2]
    sampler = EpochSampler(lengths, batch_size=2, shuffle=False, seed=0, length_grouped=True)
    batches = [[lengths[i] for i in key.indices] for key in EpochSampler.keys(sampler)]
    assert batches == [[9, 8], [7, 5], [3, 2], [1]]
