"""An encoder that runs once for several rows of a batch that are the same text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

ROWS = ("input_ids", "attention_mask", "inputs_embeds")


@contextmanager
def encoded_once(model: Any, example: Tensor) -> Iterator[None]:
    """Let the encoder of an encoder-decoder model run once per example, while the model is called with a row per target of it.

    For the length of one call the encoder's forward, with the adapters on it, is given the first row of every example, and what it
    returns is repeated. So the model sees a plain batch, whoever shards or records it; a model whose encoder is not told or called in
    transformers' way computes the same from all rows.

    Args:
        model: An HF model.
        example: Number of the example that each row belongs to, (rows,): 0, 0, 1, 2, 2, ...
    """
    getter = getattr(model, "get_encoder", None)
    encoder = None if getter is None or hasattr(model, "_orig_mod") else getter()  # torch.compile would compile every call anew
    if not isinstance(encoder, nn.Module) or encoder is model:
        yield
        return
    own = encoder.__dict__.get("forward")
    run = functools.partial(type(encoder).forward, encoder) if own is None else own
    encoder.forward = functools.partial(_once, run, example)
    try:
        yield
    finally:
        if own is None:
            del encoder.forward
        else:
            encoder.forward = own


def _once(run: Any, example: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args:
        return run(*args, **kwargs)
    first = F.pad(example.diff(), (1, 0), value=1).bool()
    out = run(**{k: v[first] if k in ROWS and isinstance(v, Tensor) else v for k, v in kwargs.items()})
    if isinstance(out, tuple):
        return (out[0][example], *out[1:])
    out.last_hidden_state = out.last_hidden_state[example]
    return out
