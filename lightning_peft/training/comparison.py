"""What a comparison found: means over seeds, who beats the baseline, as a table, Markdown, JSON and a picture."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_peft.cost import size
from lightning_peft.errors import ConfigError, DependencyError, did_you_mean

_FIRST = ("accuracy", "exact_match", "loss")  # which metric ranks where nobody says
_LOWER = frozenset({"loss", "perplexity"})  # of these less is better
_COLUMNS = ("strategy", "trainable", "share", "lr")
_COSTS = ("step", "peak memory", "adapter")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of one strategy with one seed.

    Args:
        quality: Validation metrics after training, by name.
        disabled: The same with the adapter disabled; a new task head keeps what it has learned.
        lr: Highest learning rate.
        trained: Entries that train, a new task head included.
        base: Entries of the base.
        steps: Optimizer steps.
        step_seconds: Median of an optimizer step.
        seconds: The whole of ``fit``.
        peak: Most bytes in training, beside libraries and data.
        adapter_bytes: Of the adapter file.
    """

    quality: dict[str, float]
    disabled: dict[str, float]
    lr: float
    trained: int
    base: int
    steps: int
    step_seconds: float
    seconds: float
    peak: int
    adapter_bytes: int


@dataclass(frozen=True)
class Run:
    """One strategy with one seed.

    Args:
        name: The strategy's name in the comparison.
        seed: Of run and data.
        settings: The config of ``fit`` that it was trained by.
        measured: What came out; None before it has run and if it failed.
        error: Why it failed; empty if it did not.
    """

    name: str
    seed: int
    settings: dict[str, Any]
    measured: Measured | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """Return the run that :meth:`to_dict` has written."""
        found = values["measured"]
        return cls(**{**values, "measured": None if found is None else Measured(**found)})


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its standard error, which one seed does not tell."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of at least one value."""
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


class Comparison:
    """Strategies side by side.

    Args:
        runs: All runs, in the order in which strategies are shown.
        metric: The metric that ranks; None is the first there is of accuracy, exact match, loss.
        baseline: The strategy that the others have to beat.

    Raises:
        ConfigError: No run has this metric.
    """

    def __init__(self, runs: Sequence[Run], *, metric: str | None, baseline: str) -> None:
        self.runs = list(runs)
        self.names = list(dict.fromkeys(run.name for run in runs))
        self.done = {name: {r.seed: r.measured for r in runs if r.name == name and r.measured is not None} for name in self.names}
        self.errors = {run.name: run.error for run in reversed(self.runs) if run.error}  # the first of each strategy
        known = list(dict.fromkeys(name for by_seed in self.done.values() for m in by_seed.values() for name in m.quality))
        self.metric = metric or next((name for name in _FIRST if name in known), "loss")
        if known and self.metric not in known:
            raise ConfigError(
                f"compare.metric={metric!r}, but what was measured is {', '.join(known)}.{did_you_mean(self.metric, known)}"
            )
        self.baseline = baseline

    # ---- what the numbers say

    def quality(self, name: str) -> Mean:
        """Return the metric of a strategy that has run."""
        return Mean.of([m.quality[self.metric] for m in self.done[name].values()])

    def disabled(self, name: str) -> Mean:
        """Return the metric with the strategy's adapter disabled."""
        return Mean.of([m.disabled[self.metric] for m in self.done[name].values()])

    def gains(self, name: str, *, disabled: bool = False) -> list[float]:
        """Return by how much a strategy is better than the baseline, for each seed that both have; positive is better."""
        sign, base = -1.0 if self.metric in _LOWER else 1.0, self.done.get(self.baseline, {})
        found = [
            (getattr(m, "disabled" if disabled else "quality"), base[seed]) for seed, m in self.done[name].items() if seed in base
        ]
        return [sign * (mine[self.metric] - theirs.quality[self.metric]) for mine, theirs in found]

    def beats(self, name: str) -> bool:
        """Whether a strategy is better than the baseline with every seed."""
        gains = self.gains(name)
        return bool(gains) and min(gains) > 0

    def needs_adapter(self, name: str) -> bool:
        """Whether its gain is gone once its adapter is disabled: it is not better with every seed then."""
        return min(self.gains(name, disabled=True)) <= 0

    def verdict(self) -> list[str]:
        """Return in words who beats the baseline, and whether that is due to the adapter."""
        others = [name for name in self.names if name != self.baseline and self.done[name]]
        lines = []
        if self.done.get(self.baseline):
            better = [name for name in others if self.beats(name)]
            kept = [name for name in better if not self.needs_adapter(name)]
            lines = [
                f"better than {self.baseline} with every seed, by {self.metric}: {_names(better)}",
                f"not better than {self.baseline}: {_names([n for n in others if n not in better])}",
                f"with the adapter disabled the gain is gone: {_names([n for n in better if n not in kept])}; not gone: {_names(kept)}",
            ]
        failed = [f"{name} ({error})" for name, error in self.errors.items()]
        return [*lines, *([f"failed: {'; '.join(failed)}"] if failed else [])]

    # ---- how they are shown

    def columns(self) -> list[str]:
        """Return the titles of the table."""
        compared = [f"gain over {self.baseline}"] if self.done.get(self.baseline) else []
        return [*_COLUMNS, self.metric, *compared, "disabled", *_COSTS]

    def rows(self) -> list[list[str]]:
        """Return the cells of the table; the last cell of a strategy that never ran is its error."""
        return [self._row(name) if self.done[name] else [name, f"failed: {self.errors[name]}"] for name in self.names]

    def _row(self, name: str) -> list[str]:
        found = list(self.done[name].values())
        first, gains = found[0], self.gains(name)
        cells = [name, f"{first.trained:,}", f"{first.trained / first.base:.3%}", f"{first.lr:.0e}", str(self.quality(name))]
        if self.done.get(self.baseline):
            gain = Mean.of(gains) if gains and name != self.baseline else None
            cells.append("" if gain is None else f"{'+' if gain.value >= 0 else ''}{gain}{' ✓' if self.beats(name) else ''}")
        step = statistics.fmean(m.step_seconds for m in found)
        peak = statistics.fmean(m.peak for m in found)
        missing = f" ({len(found)} of {sum(r.name == name for r in self.runs)} runs)" if name in self.errors else ""
        return [*cells, str(self.disabled(name)), f"{step * 1000:.0f} ms", size(peak), size(first.adapter_bytes) + missing]

    def table(self) -> Table:
        """Return the comparison as a table for :class:`rich.console.Console`."""
        table = Table(title=self._title(), title_justify="left")
        for column in self.columns():
            table.add_column(column, justify="left" if column == "strategy" else "right")
        for row in self.rows():
            table.add_row(*(row if len(row) > 2 else [row[0], "failed"]))
        return table

    def markdown(self) -> str:
        """Return the table and the verdict in Markdown."""
        columns = self.columns()
        lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
        for row in self.rows():
            cells = [*row, *[""] * (len(columns) - len(row))]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return "\n".join([f"{self._title()}", "", *lines, "", *(f"- {line}" for line in self.verdict())])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON: means with their standard errors, and every run."""
        return {
            "metric": self.metric,
            "baseline": self.baseline,
            "strategies": {name: self._summary(name) for name in self.names},
            "verdict": self.verdict(),
            "runs": [run.to_dict() for run in self.runs],
        }

    def _summary(self, name: str) -> dict[str, Any]:
        found = list(self.done[name].values())
        if not found:
            return {"error": self.errors[name]}
        one, gains = found[0], self.gains(name)

        def means(values: str) -> dict[str, Any]:
            return {key: dataclasses.asdict(Mean.of([getattr(m, values)[key] for m in found])) for key in getattr(one, values)}

        costs = {
            key: dataclasses.asdict(Mean.of([getattr(m, key) for m in found])) for key in ("step_seconds", "seconds", "peak")
        }
        return {
            "seeds": list(self.done[name]),
            "trained": one.trained,
            "share": one.trained / one.base,
            "lr": one.lr,
            "steps": one.steps,
            "adapter_bytes": one.adapter_bytes,
            "quality": means("quality"),
            "disabled": means("disabled"),
            "gains": gains,
            "beats": self.beats(name),
            **costs,
            **({"error": self.errors[name]} if name in self.errors else {}),
        }

    def _title(self) -> str:
        done = [m for by_seed in self.done.values() for m in by_seed.values()]
        steps = sorted({m.steps for m in done})
        seeds = len({run.seed for run in self.runs})
        return f"{' or '.join(map(str, steps)) or 'no'} steps, {seeds} {'seed' if seeds == 1 else 'seeds'}"

    def chart(self, path: str | Path) -> Path:
        """Write a picture of quality against trainable parameters; the suffix says which kind of file (png, svg, pdf).

        Raises:
            ConfigError: Nothing has run, or matplotlib knows no such kind of file.
            DependencyError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DependencyError("--chart needs matplotlib: pip install 'lightning-peft[charts]'") from error
        shown = sorted((name for name in self.names if self.done[name]), key=lambda name: self.quality(name).value)
        if not shown:
            raise ConfigError("--chart: no run has ended well, so there is nothing to show.")
        figure = Figure(figsize=(9, max(4.0, 1 + 0.24 * len(shown))), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(shown):
            count, found = next(iter(self.done[name].values())).trained, self.quality(name)
            shape = "s" if name == self.baseline else "o"
            axes.errorbar(count, found.value, found.error, fmt=f"{shape}C{place % 10}", markersize=5, capsize=2)
            # Names stand beside the picture in the order of quality, so that none covers another.
            axes.annotate(
                name,
                (count, found.value),
                xytext=(1.02, (place + 0.5) / len(shown)),
                textcoords="axes fraction",
                fontsize="small",
                verticalalignment="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": f"C{place % 10}", "relpos": (0, 0.5)},
            )
        if self.done.get(self.baseline):
            axes.axhline(self.quality(self.baseline).value, linestyle=":", color="0.4")
        axes.set_xscale("log")
        axes.set_xlabel("trainable parameters")
        axes.set_ylabel(f"{self.metric}, mean and standard error")
        axes.set_title(self._title())
        file = Path(path)
        try:
            figure.savefig(file)
        except ValueError as error:
            raise ConfigError(f"--chart {file}: {error}") from error
        return file


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
