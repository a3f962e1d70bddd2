"""``lightning-peft estimate``: the bill of a config before it runs, methods compared, the largest batch that fits."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft.cost import CostReport, estimate, size
from lightning_peft.errors import ConfigError, DependencyError
from lightning_peft.loading.base import AUTO_CLASSES, BaseSource
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.training.data import PEFTDataModule

# Lightning's name of a strategy -> how parameters are spread.
_SHARDING = {"ddp": "ddp", "fsdp": "fsdp", "modelparallel": "fsdp", "model_parallel": "fsdp"}
_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "loss_buffers")
_WIDTH = 40  # characters of the longest bar


def estimate_config(arguments: Sequence[str], **options: Any) -> CostReport:
    """Return the estimate of the run that ``lightning-peft fit`` would make of the same arguments.

    Args:
        arguments: ``--config FILE`` and overrides, as of ``fit``.
        **options: Arguments of :func:`lightning_peft.estimate` that take the place of the config's.

    Raises:
        ConfigError: The config is wrong, or its base is no model of transformers.
    """
    model, strategy, settings = _read(arguments)
    chosen = options.pop("strategy", None)
    return estimate(model, strategy if chosen is None else chosen, **{**settings, **options})


def compare_config(arguments: Sequence[str], names: Sequence[str], **options: Any) -> list[CostReport]:
    """Return one estimate per method, the config's own first; other methods have their default options.

    Raises:
        ConfigError: As :func:`estimate_config`.
        PEFTError: A method cannot be installed on this model.
    """
    model, strategy, settings = _read(arguments)
    others = [name for name in names if name != strategy.info.name]
    own = estimate(model, strategy, **{**settings, **options})
    # A base that the config leaves dense is stored as each method asks for it.
    settings["quantization"] = settings["quantization"] or "auto"
    return [own, *(estimate(model, name, **{**settings, **options}) for name in others)]


def _read(arguments: Sequence[str]) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return the model of a config on meta, its strategy, and what else of it decides about the cost."""
    from lightning_peft.training.cli import ConfigOnly

    cli = ConfigOnly(arguments)
    module, data, trainer = cli.model, cli.datamodule, cli.config.trainer
    if module.source is None:
        raise ConfigError(
            "the base of this config is no name, folder or GGUF file. Use lp.estimate(model, strategy, ...) in Python."
        )
    model = meta_model(module.source, module.task.name, module.labels if module.task.needs_labels else None)
    devices = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1
    strategy = str(trainer.strategy).lower()
    spread = next((kind for name, kind in _SHARDING.items() if strategy.startswith(name)), "ddp")
    heads = [site.path for site in anatomy_of(model).roles.get("head", ())] if module.task.needs_labels else []
    extras = [path.removeprefix("base.") for path in module.extra_modules] if module.extra_modules != "auto" else heads
    settings = {
        "batch_size": data.batch_size * _rows_each(data),
        "sequence_length": data.max_length if module.task.reads_text else None,
        "padded": not data.packing,
        "precision": trainer.precision or "32-true",
        "quantization": module.peft.quantization,
        "gradient_checkpointing": module.peft.gradient_checkpointing,
        "optimizer": module.optimizer or "adamw",
        "adapter_dtype": module.peft.adapter_dtype,
        "anatomy": module.peft.anatomy,
        "extra_modules": extras,
        "devices": devices * (trainer.num_nodes or 1),
        "sharding": spread if devices * (trainer.num_nodes or 1) > 1 else "none",
        "device": {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}.get(str(trainer.accelerator), "auto"),
    }
    return model, module.strategy, settings


def _rows_each(data: PEFTDataModule) -> int:
    """Return how many sequences an example makes: one for each of its answer choices.

    Raises:
        ConfigError: The data tell, and they are not read here.
    """
    if not data.spec.has_choices:
        return 1
    found = len((None if data.spec.choices_column else data.spec.choices or data.spec.labels) or ())
    if not found:
        raise ConfigError(
            "the config does not tell how many answer choices an example has. Give data.choices or model.labels, or use "
            "lp.estimate(model, strategy, batch_size=examples x choices)."
        )
    return found


def meta_model(source: BaseSource, task: str, labels: Sequence[str] | None = None) -> nn.Module:
    """Return the model that :func:`lightning_peft.loading.base.load_model` would load, on meta: only its configuration is read.

    Raises:
        ConfigError: There is no such model, or it has no head for this task.
        DependencyError: A package is missing.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DependencyError("a model given by its name needs transformers: pip install 'transformers>=5,<6'") from error
    where, kwargs = source.arguments()
    if labels is not None:
        kwargs |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    try:
        config = transformers.AutoConfig.from_pretrained(where, **kwargs)
        if getattr(config, "quantization_config", None) is not None and source.gguf is None:
            raise ConfigError(
                f"base={source.name!r} is stored quantized. Name the dense base, and how it is stored as quantization."
            )
        dtype = (config.dtype or torch.float32) if source.dtype == "auto" else getattr(torch, source.dtype)
        attention = {} if source.attn_implementation is None else {"attn_implementation": source.attn_implementation}
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, AUTO_CLASSES[task]).from_config(config, dtype=dtype, **attention)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot read the configuration of base={source.name!r} for task {task}: {' '.join(str(error).split())}"
        ) from error
    return model


def comparison(reports: Sequence[CostReport]) -> Table:
    """Return methods beside each other, each with a bar as long as its peak."""
    table = Table(title=f"{reports[0].model}: {_size_of(reports[0])}", title_justify="left")
    for column in ("method", "trainable", "weights", "trained state", "activations", "peak", "step", ""):
        table.add_column(column, justify="left" if column in ("method", "") else "right", no_wrap=column == "")
    highest = max(r.peak for r in reports)
    for r in reports:
        bar = "█" * max(1, round(_WIDTH * r.peak / highest))
        state = r.adapter + r.gradients + r.optimizer
        work = f"{r.step_flops / reports[0].step_flops:.2f} ×"
        table.add_row(
            r.method,
            f"{r.trainable:,}",
            size(r.weights),
            size(state),
            size(r.activations + r.loss_buffers),
            size(r.peak),
            work,
            bar,
        )
    return table


def text(table: Table) -> str:
    """Return a table as text."""
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue().rstrip()


def chart(reports: Sequence[CostReport], path: str | Path) -> Path:
    """Write a bar chart of memory by method, its parts stacked; the suffix says which kind of file (png, svg, pdf).

    Raises:
        ConfigError: matplotlib knows no such kind of file.
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("--chart needs matplotlib: pip install 'lightning-peft[charts]'") from error
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(reports)), layout="constrained")
    axes = figure.subplots()
    names = [r.method for r in reports]
    left = [0.0] * len(reports)
    for part in _PARTS:
        widths = [getattr(r, part) / 2**30 for r in reports]
        axes.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([r.peak / 2**30 for r in reports], names, "k|", markersize=18, label="peak")
    axes.invert_yaxis()
    axes.set_xlabel("GiB on one device" if reports[0].device.devices == 1 else "GiB of the whole model; peak on one device")
    axes.set_title(f"{reports[0].model}: {_size_of(reports[0])}")
    axes.legend(fontsize="small")
    file = Path(path)
    try:
        figure.savefig(file)
    except ValueError as error:
        raise ConfigError(f"--chart {file}: {error}") from error
    return file


def _size_of(report: CostReport) -> str:
    length = "" if report.sequence_length is None else f" × {report.sequence_length} tokens"
    return f"{report.batch_size} rows{length}"
