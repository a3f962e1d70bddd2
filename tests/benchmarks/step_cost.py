"""What one training step costs beside the least that it can cost: time and peak memory of ours, HF peft and full fine-tuning.

    python tests/benchmarks/step_cost.py                                   # all rows, SmolLM2-135M, 4 x 256 tokens
    python tests/benchmarks/step_cost.py --rows lora-bf16 dora --steps 9 --out cost

Everything is a ratio to the limit of the same run: the frozen base, forward and backward down to the embeddings. Time: each
contender lives in a process of its own and they step in turn (A B C A B C ...), one at a time, so that whatever else the machine
does hits all alike. Memory: each contender runs alone in a fresh process.

Peak memory is the highest RssAnon above its value after the imports, read by this process from ``/proc`` every 2 ms, from before
the model is loaded to the end of the third step. ``ru_maxrss`` would be exact, but it counts the pages of shared libraries and of
model files too, and what the imports took. It is stored next to the samples, as ``peak_rss``, to show that they miss nothing.

The allocator of the C library decides much of it, so each contender is measured twice. ``memory``: with the allocator as it is,
which is what a user pays. A freed tensor below 32 MiB stays in one of two heaps (forward and backward run in two threads), and what
one thread frees the other does not get. ``live``: with ``mmap_threshold=65536`` a freed tensor goes back to the system at once, so
that RssAnon is what the program holds. Time is measured with ``mmap_max=0`` and a high ``trim_threshold``: all freed memory stays,
so that no step pays for page faults, which cost a varying time on a virtual machine. ``MALLOC_*`` variables are taken out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets` and `tests`, wherever the script is started

from tests.benchmarks.contenders import Contender, Side  # noqa: E402

ALLOCATORS = {"memory": "", "live": "glibc.malloc.mmap_threshold=65536"}
FOR_TIME = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
WARM_UP = 2  # steps before the first that counts: kernels, optimizer states, memory
MEMORY_STEPS = 3  # the states of the optimizer exist from the second step on
SAMPLE = 0.002  # seconds between two readings of RssAnon
SAME_LOSS = 0.02  # by which the first losses of ours and HF may differ; bf16 rounds at 0.004


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        title: What is compared.
        options: Fields of the contenders that are adapted.
        hf: Time and memory of HF peft by the limit, as the issue states them; None where it does not.
        target: The most that ours may take.
        sides: Who takes part.
        absolute: Seconds instead of ratios, and no limit.
    """

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    hf: tuple[float | None, float | None] = (None, None)
    target: tuple[float | None, float | None] = (None, None)
    sides: tuple[Side, ...] = ("limit", "ours", "hf")
    absolute: bool = False

    def contender(self, side: Side, shape: Mapping[str, Any]) -> Contender:
        """Return who runs for ``side``; limit and full have nothing but the dtype in common with the adapted ones."""
        options = self.options if side in ("ours", "hf") else {k: v for k, v in self.options.items() if k == "dtype"}
        contender = Contender(side=side, **{**shape, **options})
        return contender if side == "ours" else replace(contender, chunked=False)


ALL: tuple[Side, ...] = ("limit", "ours", "hf", "full")
ROWS = {
    "lora-fp32": Row("LoRA, fp32", {}, (1.26, 1.45), (1.08, 1.18), ALL),
    "lora-bf16": Row("LoRA, bf16", {"dtype": "bfloat16"}, (1.31, 1.43), (1.08, 1.12), ALL),
    "dropout": Row("LoRA, dropout 0.05, fp32", {"dropout": 0.05}, (1.9, 1.81), (1.12, 1.15)),
    "dora": Row("DoRA, fp32", {"dora": True}, (1.57, 2.00), (1.15, 1.15)),
    "qlora": Row("QLoRA against bf16", {"dtype": "bfloat16", "quantized": True}, (1.59, 1.38), (1.30, 1.00)),
    "loss": Row("LoRA with our loss, fp32", {"chunked": True}, (None, 1.45), (None, 0.95)),
    "injection": Row("injection into 7 B, 224 layers", {"base": ""}, (0.28, None), (0.15, None), ("ours", "hf"), absolute=True),
}


class ContenderError(RuntimeError):
    """A contender ended without an answer."""


class Process:
    """A contender in a process of its own, which computes only between a command and its answer.

    Args:
        contender: What it builds.
        tunables: Its setting of the C library's memory allocator.
    """

    def __init__(self, contender: Contender, tunables: str) -> None:
        self.contender = contender
        self.pipe, theirs = Pipe()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment |= {"GLIBC_TUNABLES": tunables, "OMP_NUM_THREADS": str(contender.threads)}
        command = [sys.executable, str(Path(__file__).with_name("contenders.py")), str(theirs.fileno()), contender.dumps()]
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdout=self.errors, stderr=self.errors
        )
        theirs.close()

    def answer(self) -> dict[str, float]:
        """Wait for the answer to the last command; the first comes by itself, after the imports."""
        try:
            answer: dict[str, float] = self.pipe.recv()
        except EOFError:
            code = self.process.wait()
            self.errors.seek(0)
            raise ContenderError(f"{self.contender} ended with {code}:\n{self.errors.read()[-3000:]}") from None
        return answer

    def ask(self, command: str) -> dict[str, float]:
        """Let it build, or step once, while this process waits and does nothing."""
        self.pipe.send(command)
        return self.answer()

    def peak(self, command: str) -> int:
        """Let it build, or step once, and return the highest RssAnon seen meanwhile, in bytes."""
        self.pipe.send(command)
        highest = self.memory("RssAnon")
        while not self.pipe.poll(SAMPLE):
            highest = max(highest, self.memory("RssAnon"))
        self.answer()
        return highest

    def memory(self, name: str) -> int:
        """Return one of the kernel's figures about the process, in bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return 1024 * int(line.split()[1])
        raise ContenderError(f"{self.contender}: process {self.process.pid} is gone, or its kernel does not count {name}")

    def close(self) -> None:
        self.pipe.close()  # it ends at the end of the pipe
        self.process.wait()
        self.errors.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Peaks = dict[str, dict[str, int]]


def peak_memory(contender: Contender) -> Peaks:
    """Return the peaks of a contender alone in fresh processes, by allocator, in bytes above what the imports took.

    Returns:
        For ``memory`` and ``live``: ``peak`` of anonymous memory, sampled; ``peak_rss`` of all memory, by the kernel, above all
        memory after the imports; ``imports``, the anonymous memory after these.
    """
    found: Peaks = {}
    for name, tunables in ALLOCATORS.items():
        with Process(contender, tunables) as process:
            process.answer()
            anonymous, everything = process.memory("RssAnon"), process.memory("VmRSS")
            peak = max(process.peak(command) for command in ["build", *["step"] * MEMORY_STEPS])
            all_of_it = process.memory("VmHWM") - everything
            found[name] = {"peak": peak - anonymous, "peak_rss": all_of_it, "imports": anonymous}
    return found


def in_turn(contenders: Mapping[Side, Contender], steps: int) -> dict[Side, dict[str, list[float]]]:
    """Return seconds of wall and CPU, and the value, of every step; ``steps`` alternations after the warm-up.

    All start at once and import together; from the first ``build`` on, one computes at a time.
    """
    with ExitStack() as stack:
        processes = {side: stack.enter_context(Process(c, FOR_TIME)) for side, c in contenders.items()}
        for process in processes.values():
            process.answer()
        for process in processes.values():
            process.ask("build")
        rounds = [{side: process.ask("step") for side, process in processes.items()} for _ in range(WARM_UP + steps)]
    found: dict[Side, dict[str, list[float]]] = {}
    for side in contenders:
        found[side] = {key: [each[side][key] for each in rounds[WARM_UP:]] for key in ("wall", "cpu")}
        found[side]["value"] = [each[side]["value"] for each in rounds]
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the middle half of the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def compare(row: Row, shape: Mapping[str, Any], steps: int, peaks: dict[Contender, Peaks]) -> dict[str, Any]:
    """Measure one row.

    Args:
        row: What to compare.
        shape: Base, batch, length and threads of all contenders.
        steps: Alternations.
        peaks: Peaks that are known already; new ones are added.

    Returns:
        Plain values: raw figures by contender, and ``ratios``: ``wall`` and ``cpu`` as ratio of medians with the middle half of
        the ratios of each alternation, ``memory`` and ``live`` as ratios. Without a limit the medians themselves, in seconds.
    """
    contenders = {side: row.contender(side, shape) for side in row.sides}
    for contender in contenders.values():
        if not row.absolute and contender not in peaks:
            peaks[contender] = peak_memory(contender)
    found: dict[str, Any] = {side: dict(figures) for side, figures in in_turn(contenders, steps).items()}
    first = [found[side]["value"][0] for side in ("ours", "hf") if side in found]
    if abs(first[0] - first[-1]) > SAME_LOSS * abs(first[-1]):
        raise ContenderError(f"{row.title}: ours and HF start from the values {first}; they do not compute the same thing")
    ratios: dict[str, Any] = {}
    for side in row.sides:
        by = None if row.absolute else found["limit"]
        ratios[side] = {clock: _ratio(found[side][clock], by and by[clock]) for clock in ("wall", "cpu")}
        if not row.absolute:
            found[side].update(peaks[contenders[side]])
            least = peaks[contenders["limit"]]
            ratios[side] |= {name: figures["peak"] / least[name]["peak"] for name, figures in peaks[contenders[side]].items()}
    return {"title": row.title, "contenders": found, "ratios": ratios}


def _ratio(values: list[float], by: list[float] | None) -> tuple[float, float, float]:
    if by is None:
        return spread(values)
    _, low, high = spread([a / b for a, b in zip(values, by, strict=True)])
    return statistics.median(values) / statistics.median(by), low, high


def lines(row: Row, result: Mapping[str, Any]) -> str:
    """Return the figures of one row as text, each with what the issue asks for."""
    ratios, found = result["ratios"], result["contenders"]
    unit = " s" if row.absolute else ""
    out = [f"{row.title}"]
    for clock, name in (("wall", "time"), ("cpu", "CPU time")):
        parts = [] if row.absolute else [f"limit {statistics.median(found['limit'][clock]):.3f} s"]
        for side in (s for s in row.sides if s != "limit"):
            middle, low, high = ratios[side][clock]
            said = _said(row, side, 0, middle) if clock == "wall" else ""
            parts.append(f"{side} {middle:.3f}{unit} [{low:.3f}, {high:.3f}]{said}")
        out.append(f"  {name:<9} {'   '.join(parts)}")
    for name in () if row.absolute else ALLOCATORS:
        parts = [f"limit {found['limit'][name]['peak'] / 1e9:.3f} GB"]
        for side in (s for s in row.sides if s != "limit"):
            value = ratios[side][name]
            parts.append(f"{side} {value:.3f}{_said(row, side, 1, value) if name == 'memory' else ''}")
        out.append(f"  {name:<9} {'   '.join(parts)}")
    return "\n".join(out)


def _said(row: Row, side: Side, which: int, value: float) -> str:
    if side == "hf" and row.hf[which] is not None:
        return f" (issue: {row.hf[which]})"
    target = row.target[which] if side == "ours" else None
    return "" if target is None else f" ({'ok' if value <= target else 'MISSED'}: at most {target})"


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the ratios as bars by row and contender; the limit is the line at 1, a target a short black line."""
    from matplotlib.figure import Figure

    names = [name for name in results if not ROWS[name].absolute]
    figure = Figure(figsize=(2 + 1.6 * max(len(names), 2), 8), layout="constrained")
    colours = {"ours": "tab:blue", "hf": "tab:orange", "full": "tab:gray"}
    for which, (axes, label) in enumerate(zip(figure.subplots(2, 1), ("step time", "peak memory"), strict=True)):
        for i, name in enumerate(names):
            ratios = results[name]["ratios"]
            for j, (side, colour) in enumerate((s, c) for s, c in colours.items() if s in ratios):
                height, *around = ratios[side]["wall"] if which == 0 else (ratios[side]["memory"],)
                x = i + 0.26 * (j - 1)
                error = [[max(height - around[0], 0)], [max(around[1] - height, 0)]] if around else None
                axes.bar(x, height, 0.24, color=colour, yerr=error, capsize=3, label=side if i == 0 else None)
                axes.annotate(f"{height:.2f}", (x, 0.04), ha="center", fontsize=9, color="white")
                target = ROWS[name].target[which] if side == "ours" else None
                if target is not None:
                    axes.hlines(target, x - 0.13, x + 0.13, colors="black", label="target of ours" if i == 0 else None)
        axes.axhline(1.0, color="tab:green", label="limit")
        axes.set_xticks(range(len(names)), [ROWS[name].title.replace(", ", ",\n", 1) for name in names], fontsize=8)
        axes.set_ylabel(f"{label} / limit")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "lightning-peft")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "versions": {name: version(name) for name in packages},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write ``<out>.json`` and, of rows with a limit, ``<out>.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=7, help="alternations that count, at least 2")
    parser.add_argument("--tokens", default="4x256", help="batch x length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", help="folder of a causal language model; default: SmolLM2-135M of examples/assets.py")
    parser.add_argument("--out", type=Path, default=Path("step_cost"), help="path of the results, without suffix")
    chosen = parser.parse_args(arguments)
    batch, length = map(int, chosen.tokens.split("x"))
    base = chosen.base
    if base is None:
        from examples.assets import smollm2

        base = str(smollm2())
    shape = {"base": base, "batch": batch, "length": length, "threads": chosen.threads}
    peaks: dict[Contender, Peaks] = {}
    results: dict[str, Any] = {}
    for name in chosen.rows:
        results[name] = compare(ROWS[name], shape, chosen.steps, peaks)
        print(lines(ROWS[name], results[name]), flush=True)
        about = {"base": base, "tokens": [batch, length], "machine": machine(chosen.threads)}
        chosen.out.with_suffix(".json").write_text(json.dumps({**about, "rows": results}, indent=1))
    if any(not ROWS[name].absolute for name in results):
        draw(results, chosen.out.with_suffix(".png"))
    print(f"results in {chosen.out.with_suffix('.json')}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
