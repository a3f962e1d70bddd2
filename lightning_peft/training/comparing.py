"""``lightning-peft compare``: several strategies on one task, with equal seeds and steps, each run in a process of its own."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft.errors import ConfigError, UnknownMethodError, did_you_mean
from lightning_peft.files import replacing
from lightning_peft.strategies.registry import get_method, list_methods, resolve
from lightning_peft.surgery.inject import NAME
from lightning_peft.surgery.walk import base_entries
from lightning_peft.training.comparison import Comparison, Measured, Run
from lightning_peft.training.estimating import meta_model
from lightning_peft.training.peak import PeakMemory, forget_highest

_STRATEGY, _RATE = "model.strategy", "model.lr"
# What every run imports. Forked from a process that has it already, a run starts in a second instead of ten. Not this package: that
# process may find another copy of it than this one.
_PRELOAD = ["lightning.pytorch.cli", "torch._dynamo", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The section ``compare`` of a config; the rest of it is what ``fit`` reads.

    Args:
        strategies: What to compare, by name. Each has options that take the place of the config's: ``strategy``, ``lr`` or any other of
            ``model``, and with dots any of the whole config (``data.max_length``). Without ``strategy`` it is the method of its name;
            the config's own strategy and learning rate where that is its method. Without ``lr`` it is the one that the method suggests.
        seeds: Of the run and of the data: splits, choice of rows, order.
        metric: Which of the validation metrics ranks, such as ``f1``; None is the first there is of accuracy, exact match, loss.
        baseline: The strategy that the others have to beat, if it is among them.
        out: Folder of the results, one file per strategy and seed. What lies there is not run again unless its settings differ.
    """

    strategies: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metric: str | None = None
    baseline: str = "head"
    out: str = "runs/compare"


@dataclass(frozen=True)
class Planned:
    """What will run: options, and the settings of each run as a config of ``fit``."""

    options: CompareOptions
    runs: list[Run]


def compare(arguments: Sequence[str], names: Sequence[str] = ()) -> Comparison:
    """Train strategies one after the other with every seed, measure each, and return them side by side.

    A run that fails is noted with its error, and the others go on; the next call tries it again.

    Args:
        arguments: ``--config FILE`` and overrides, as of ``fit``; the config may have a section ``compare`` (:class:`CompareOptions`).
        names: Which of the section's strategies to run, and methods by their registry names; none means all of the section.

    Raises:
        ConfigError: The config is wrong, names nothing to compare or has no validation data. Nothing has run then.
        UnknownMethodError: A name is neither in the section nor a method.
    """
    planned = plan(arguments, names)
    folder, total = Path(planned.options.out), len(planned.runs)
    done: list[Run] = []
    for number, run in enumerate(planned.runs, 1):
        file = folder / f"{run.name}-{run.seed}.json"
        found = _read(file)
        if found is None or found.error or found.settings != run.settings:
            started = time.perf_counter()
            found = _run_alone(run, file)
            word = f"failed: {found.error}" if found.error else "done"
            _say(f"[{number}/{total}] {run.name}, seed {run.seed}: {word} ({time.perf_counter() - started:.0f} s)")
        done.append(found)
    return Comparison(done, metric=planned.options.metric, baseline=planned.options.baseline)


# ---------------------------------------------------------------------- what to run


def plan(arguments: Sequence[str], names: Sequence[str] = ()) -> Planned:
    """Return every run of a comparison, checked as far as that can be done without loading the base.

    Raises:
        ConfigError: As :func:`compare`.
        UnknownMethodError: As :func:`compare`.
    """
    from lightning_peft.training.cli import CompareConfig

    cli = CompareConfig(arguments)
    options: CompareOptions = cli.config_init.compare
    chosen = list(dict.fromkeys(names or options.strategies))
    if not chosen:
        raise ConfigError(
            "nothing to compare: name methods (--methods lora,bitfit,full), or write them under compare.strategies."
        )
    if not options.seeds or len(set(options.seeds)) != len(options.seeds):
        raise ConfigError(f"compare.seeds={options.seeds}, but each run needs a seed of its own, and there is at least one.")
    base = json.loads(cli.parser.dump(cli.config, format="json", skip_unset=False, skip_validation=True))
    for key in ("compare", "config"):
        base.pop(key, None)
    _check_task(cli, base)
    runs: dict[str, dict[str, Any]] = {}
    for name in chosen:
        runs[name] = settings = _settings(base, name, options)
        cli.parser.parse_object(copy.deepcopy(settings))  # an option that does not exist ends here
    return Planned(options, [Run(name, seed, _seeded(runs[name], seed)) for seed in options.seeds for name in chosen])


def _check_task(cli: Any, base: dict[str, Any]) -> None:
    """Refuse what would make every run fail: a base that is not there, no validation data, several devices."""
    devices = base["trainer"]["devices"]
    if devices not in ("auto", 1, "1", [0], -1, "-1"):
        raise ConfigError(f"compare: trainer.devices={devices!r}, but each run is one process on one device. Use devices: 1.")
    base["trainer"]["devices"] = 1
    if "val" not in cli.datamodule.rows.splits:
        raise ConfigError("compare measures on validation data, and there is none: give data.val_path or data.val_fraction.")
    module = cli.model
    if module.source is not None:
        meta_model(module.source, module.task.name, cli.datamodule.labels if module.task.needs_labels else None)


def _settings(base: Mapping[str, Any], name: str, options: CompareOptions) -> dict[str, Any]:
    """Return the config of one strategy."""
    given = options.strategies.get(name)
    if not NAME.fullmatch(name):
        raise ConfigError(f"compare.strategies: name {name!r}, but only letters, digits, '_' and '-' can be part of file names.")
    if not isinstance(given, Mapping | None):
        raise ConfigError(
            f"compare.strategies.{name}={given!r}, but it is a mapping of options, such as {{lr: 0.001}} or "
            "{strategy: {class_path: LoRA, init_args: {rank: 4}}}, or empty for the method of that name."
        )
    changes = {key if "." in key else f"model.{key}": value for key, value in (given or {}).items()}
    settings = copy.deepcopy(dict(base))
    own = resolve(settings["model"]["strategy"])
    if _STRATEGY not in changes and own.info.name != name:
        changes[_STRATEGY] = _method(name, options)
    if _STRATEGY in changes:
        changes.setdefault(_RATE, "auto")
    spec = changes.pop(_STRATEGY, settings["model"]["strategy"])
    settings["model"]["strategy"] = resolve(spec).to_dict(defaults=True)
    for key, value in changes.items():
        _put(settings, key, value)
    settings["model"]["strategy"] = resolve(settings["model"]["strategy"]).to_dict(
        defaults=True
    )  # options of it may be among them
    return settings


def _method(name: str, options: CompareOptions) -> str:
    try:
        return get_method(name).name
    except UnknownMethodError:
        hint = did_you_mean(name, [*options.strategies, *(info.name for info in list_methods())])
        raise UnknownMethodError(
            f"compare: '{name}' is no method, and compare.strategies has no strategy of this name.{hint}"
        ) from None


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set an option by its dotted name."""
    *path, last = key.split(".")
    place: Any = settings
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise ConfigError(f"compare.strategies: '{key}' is no option of the config.")
    place[last] = copy.deepcopy(value)


def _seeded(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**settings, "seed_everything": seed, "data": {**settings["data"], "seed": seed}}


# ---------------------------------------------------------------------- one run


def _run_alone(run: Run, file: Path) -> Run:
    """Make one run in a process of its own, write its file, and return it with what was measured, or with its error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    log = file.with_suffix(".log")
    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix=".run-", dir=file.parent) as scratch:
        process = context.Process(target=_child, args=(run, file, log, Path(scratch)))
        process.start()
        try:
            process.join()
        finally:
            if process.is_alive():  # Ctrl-C
                process.terminate()
                process.join()
    found = _read(file)
    if found is None:
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit status {process.exitcode}"
        memory = " (out of memory?)" if process.exitcode == -9 else ""
        found = Run(run.name, run.seed, run.settings, error=f"the process ended with {how}{memory}; see {log}")
        _write(found, file)
    return found


def _child(run: Run, file: Path, log: Path, scratch: Path) -> None:
    sys.argv = sys.argv[:1]  # LightningCLI warns when both are there
    with log.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    try:
        found = Run(run.name, run.seed, run.settings, measured=measure(run.settings, scratch))
    except Exception as error:
        traceback.print_exc()
        found = Run(run.name, run.seed, run.settings, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    _write(found, file)


def measure(settings: Mapping[str, Any], scratch: Path) -> Measured:
    """Train by a config and measure: quality with and without the adapter, size, time, memory.

    Args:
        settings: A config of ``fit``.
        scratch: Folder for what the run writes.
    """
    from lightning_peft.training.cli import PEFTCLI

    trained = copy.deepcopy(dict(settings))
    trained["trainer"] |= {"logger": False, "enable_progress_bar": False, "default_root_dir": str(scratch)}
    trained["model"]["callback"] = {**(trained["model"].get("callback") or {}), "export": str(scratch / "adapter")}
    config = scratch / "config.json"
    config.write_text(json.dumps(trained))
    cli = PEFTCLI(["--config", str(config)], run=False)
    trainer, module, data, meter = cli.trainer, cli.model, cli.datamodule, Meter()
    trainer.callbacks.append(meter)  # type: ignore[attr-defined]
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    quality = _quality(trainer.validate(module, data, verbose=False))
    with module.handle.disabled():
        disabled = _quality(trainer.validate(module, data, verbose=False))
    return Measured(
        quality=quality,
        disabled=disabled,
        lr=meter.lr,
        trained=meter.trained,
        base=meter.base,
        steps=trainer.global_step,
        step_seconds=statistics.median(meter.steps),
        seconds=seconds,
        peak=meter.peak,
        adapter_bytes=sum(f.stat().st_size for f in (scratch / "adapter").rglob("last/adapter.safetensors")),
    )


class Meter(pl.Callback):
    """Notes what trains, how long optimizer steps take, and the most memory that training held.

    Attributes:
        lr: The learning rate, without what single tensors have of their own.
        trained: Entries that train.
        base: Entries of the base; quantized ones by what they stand for.
        steps: Seconds of each optimizer step with all of its batches, the loading of data aside.
        peak: Bytes that lay in memory at the worst moment of training, beside libraries and data.
    """

    def __init__(self) -> None:
        self.lr, self.trained, self.base, self.peak = 0.0, 0, 0, 0
        self.steps: list[float] = []
        self._memory: PeakMemory | None = None
        self._step, self._spent, self._began = 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Count, and begin to watch the memory."""
        root = pl_module.handle.root
        self.lr = max(_plain_rate(group) for o in trainer.optimizers for group in o.param_groups)
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.base = base_entries(root)
        forget_highest()  # loading the base takes more than training a small part of it
        held = {id(t): t.nbytes for t in (*pl_module.parameters(), *pl_module.buffers())}
        self._memory, self._step = PeakMemory(pl_module.device, sum(held.values())), trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to count the time."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time of a step when it is complete."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._spent += time.perf_counter() - self._began
        if trainer.global_step != self._step:
            self.steps.append(self._spent)
            self._step, self._spent = trainer.global_step, 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note the most memory."""
        assert self._memory is not None
        self.peak = self._memory.most()


def _plain_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate that a parameter group has without the factor of its own; 0 if all of it is its own."""
    options = dict(group.get("peft_options", ()))
    rate: float = group.get("initial_lr", group["lr"])
    return 0.0 if "lr" in options else rate / (options.get("lr_scale") or 1.0)


def _quality(logged: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name.removeprefix("val_"): float(value) for metrics in logged for name, value in metrics.items()}


# ---------------------------------------------------------------------- result files


def _read(file: Path) -> Run | None:
    """Return the run that a file holds; None if there is none, or one of another version of this package."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return Run.from_dict(json.loads(file.read_text()))
    return None


def _write(run: Run, file: Path) -> None:
    with replacing(file) as stream:
        stream.write(json.dumps(run.to_dict(), indent=1).encode())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
