"""The mechanics of prompts among image patches, written once for every method that has them.

The blocks of a body see the prompt beside the sequence; no position is added to it. Where it stands makes no difference to the others,
since attention looks at positions only where they were added before. Around the blocks the sequence keeps its length, so heads, poolers
and dense outputs need not know of it.

* Shallow: P enters before the first block and leaves after the last one, ``[x; P]``. Hidden states in between, where asked for, are
  longer.
* Deep: every block has a P of its own, which takes the place of what the block before made of its own, ``[P; x]``. So each of several
  methods on one body, deep or shallow, takes off what it put on, in whatever order they were installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import PortError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Tap
from lightning_peft.surgery.ports import PatchesPort, Port
from lightning_peft.surgery.sites import split_input
from lightning_peft.surgery.stack import Call, CallAdapter

MADE_FOR_THE_SEQUENCE = ("mask", "position", "bias")
BuildPatches = Callable[[BuildContext, PatchesPort], nn.Module]


def patch_prompt_taps(anatomy: Anatomy, count: int, build: BuildPatches, *, deep: bool) -> tuple[Tap, ...]:
    """Return the edits that put prompts into every body that reads patches.

    Args:
        anatomy: The model.
        count: N.
        build: Given context and port, returns a module that is called without arguments and gives (N, d).
        deep: A prompt in every block, not in front of the first one only.

    Raises:
        PortError: The model has no such body, or its blocks take (length, batch, d).
    """
    taps: list[Tap] = []
    for port in anatomy.port(PatchesPort):
        last = len(port.blocks) - 1
        for index, path in enumerate(port.blocks):
            block = anatomy.root.get_submodule(path)
            if isinstance(block, nn.TransformerEncoderLayer) and not block.self_attn.batch_first:
                raise PortError(f"'{path}' takes (length, batch, d). Build it with batch_first=True.")
            if isinstance(block, nn.TransformerDecoderLayer):
                raise PortError(f"'{path}' decodes: what it reads is no set of patches, behind which a prompt could stand.")
            enters, leaves = deep or index == 0, deep or index == last
            if enters or leaves:
                names = tuple(inspect.signature(type(block).forward).parameters)[1:]
                make = functools.partial(
                    _build_tap,
                    port=port,
                    build=build if enters else None,
                    count=count if leaves else 0,
                    in_front=deep,
                    names=names,
                )
                taps.append(Tap(Port(path=path, scope=port.scope), make))
    return tuple(taps)


def _build_tap(
    context: BuildContext,
    *,
    port: PatchesPort,
    build: BuildPatches | None,
    count: int,
    in_front: bool,
    names: tuple[str, ...],
) -> PromptedBlock:
    return PromptedBlock(None if build is None else build(context, port), count, in_front, names)


class PromptedBlock(CallAdapter):
    """Runs a block with a prompt beside the sequence.

    Args:
        tokens: Called without arguments, gives the prompt (N, d) that enters here; None if none does.
        leaves: Number of positions that are cut off after the block; 0 if the prompt goes on.
        in_front: The prompt stands in front of the sequence, not behind it.
        names: Parameter names of the block's forward.
    """

    def __init__(self, tokens: nn.Module | None, leaves: int, in_front: bool, names: tuple[str, ...]) -> None:
        super().__init__()
        self.tokens, self.leaves, self.in_front, self.names = tokens, leaves, in_front, names

    def reset_parameters(self) -> None:
        if self.tokens is not None:
            self.tokens.reset_parameters()  # type: ignore[operator]

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the block on its input (B, S, d) and the prompt; its output has S positions, or N more where the prompt goes on.

        Raises:
            PortError: The block reads something else, or what comes with the sequence (a mask, rotary positions) lacks the prompt.
        """
        hidden, rest = split_input(self, args, kwargs)
        if hidden.dim() != 3:
            raise PortError(
                f"a prompt needs blocks that read (batch, length, width); these read {hidden.dim()} dimensions. Use another method."
            )
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        beside = [name for name, value in call.items() if value is not hidden and _holds_tensor(value)]
        fixed = [name for name in beside if any(word in name for word in MADE_FOR_THE_SEQUENCE)]
        if fixed:
            raise PortError(
                f"'{fixed[0]}' comes with the sequence and has no place for the prompt. Leave it out, or use another method."
            )
        if self.tokens is not None:
            prompt = self.tokens().to(hidden).expand(len(hidden), -1, -1)  # (B, N, d)
            hidden = torch.cat([prompt, hidden] if self.in_front else [hidden, prompt], dim=1)
        args, kwargs = rest(hidden)
        out = base(*args, **kwargs)
        if not self.leaves:
            return out
        kept = slice(self.leaves, None) if self.in_front else slice(-self.leaves)
        return out[:, kept] if isinstance(out, Tensor) else (out[0][:, kept], *out[1:])


def _holds_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value))
