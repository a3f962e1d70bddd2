"""Where the time of a training step goes: ours beside the limit, operation by operation, in milliseconds of CPU per step.

python tests/benchmarks/profile_step.py lora-fp32
python tests/benchmarks/profile_step.py dora --against hf --tokens 2x128 --steps 5
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets` and `tests`, wherever the script is started

import torch  # noqa: E402

from tests.benchmarks.contenders import Contender, prepare  # noqa: E402
from tests.benchmarks.step_cost import ALL, ROWS, WARM_UP  # noqa: E402


def times(contender: Contender, steps: int) -> tuple[Counter[str], Counter[str]]:
    """Return milliseconds and calls per step, by operation; the time of an operation without that of those it calls."""
    step = prepare(contender)()
    for _ in range(WARM_UP):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.key_averages():
        spent[event.key] += event.self_cpu_time_total / 1000 / steps
        calls[event.key] += event.count / steps
    return spent, calls


def table(names: Sequence[str], found: Sequence[tuple[Counter[str], Counter[str]]], rows: int = 30) -> str:
    """Return the operations whose times differ most, and the sums."""
    (mine, my_calls), (theirs, their_calls) = found
    lines = [f"{'operation':<48}{names[0] + ' ms':>12}{names[1] + ' ms':>12}{'more ms':>12}   calls"]
    order = sorted(set(mine) | set(theirs), key=lambda op: -abs(mine[op] - theirs[op]))
    for op in order[:rows]:
        calls = f"{my_calls[op]:.0f} / {their_calls[op]:.0f}"
        lines.append(f"{op[:47]:<48}{mine[op]:12.1f}{theirs[op]:12.1f}{mine[op] - theirs[op]:+12.1f}   {calls}")
    a, b = mine.total(), theirs.total()
    lines.append(f"{'sum of all operations':<48}{a:12.1f}{b:12.1f}{a - b:+12.1f}   ratio {a / b:.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile a row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[name for name, row in ROWS.items() if not row.absolute])
    parser.add_argument("--side", choices=ALL, default="ours")
    parser.add_argument("--against", choices=ALL, default="limit")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", default="4x256", help="batch x length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", help="folder of a causal language model; default: SmolLM2-135M of examples/assets.py")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.base is None:
        from examples.assets import smollm2

        chosen.base = str(smollm2())
    batch, length = map(int, chosen.tokens.split("x"))
    shape: dict[str, Any] = {"base": chosen.base, "batch": batch, "length": length, "threads": chosen.threads}
    sides = (chosen.side, chosen.against)
    print(table(sides, [times(ROWS[chosen.row].contender(side, shape), chosen.steps) for side in sides]))


if __name__ == "__main__":
    main()
