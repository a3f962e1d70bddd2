"""What a network beside the base's blocks may read of them: their heads, the width of their MLPs, their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_peft.errors import TargetError, UnsupportedLayerError
from lightning_peft.nn.ladder import AttentionWeights, BlockWeights
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.ports import BodyPort, heads
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.tree import is_within

PARTS = ("query", "key", "value", "output")


def head_count(anatomy: Anatomy, port: BodyPort) -> int | None:
    """Return the attention heads of a body's blocks, None where nothing tells them."""
    block = anatomy.root.get_submodule(port.blocks[0])
    config = getattr(anatomy.root.get_submodule(port.path), "config", None)
    own = (heads(module, None)[0] for module in block.modules())
    return next((count for count in own if count), None) or heads(block, config)[0]


def feed_forward_width(anatomy: Anatomy, port: BodyPort) -> int | None:
    """Return the width inside the MLPs of a body's blocks, None where it is not known or not one."""
    widths = {s.spec.in_features for s in _sites(anatomy, port.blocks, "mlp.down")}
    return widths.pop() if len(widths) == 1 else None


def block_weights(anatomy: Anatomy, blocks: Sequence[str], *, hidden: int, inner: int) -> Callable[[], list[BlockWeights]]:
    """Return a function that reads the weights of blocks, when a network is built.

    Args:
        anatomy: The model.
        blocks: Paths of its blocks.
        hidden: d.
        inner: Width inside the MLPs of the network, at most the base's.

    Raises:
        TargetError: The blocks' MLPs are not known, or too narrow.
    """
    for block in blocks:
        up, down = (_sites(anatomy, (block,), role) for role in ("mlp.up", "mlp.down"))
        if len(up) != 1 or len(down) != 1 or down[0].spec.out_features != hidden or down[0].spec.in_features < inner:
            raise TargetError(
                f"init='pruned': block '{block}' has no single MLP with a known up and down projection that is at least {inner} wide. Take "
                "init='random'."
            )
    return functools.partial(_read, anatomy, tuple(blocks))


def _read(anatomy: Anatomy, blocks: tuple[str, ...]) -> list[BlockWeights]:
    return [_read_block(anatomy, block) for block in blocks]


def _read_block(anatomy: Anatomy, block: str) -> BlockWeights:
    def attention(kind: str) -> AttentionWeights | None:
        found = [_sites(anatomy, (block,), f"{kind}.{part}") for part in PARTS]
        if any(len(sites) != 1 for sites in found):
            return None
        query, key, value, output = (_weight(anatomy.root, sites[0]) for sites in found)
        return query, key, value, output

    up, down = (_weight(anatomy.root, _sites(anatomy, (block,), role)[0]) for role in ("mlp.up", "mlp.down"))
    return BlockWeights(up, down, attention("attention"), attention("cross_attention"))


def _sites(anatomy: Anatomy, blocks: Sequence[str], role: str) -> list[Site]:
    return [
        site
        for full, sites in anatomy.roles.items()
        if full == role or full.endswith(f".{role}")
        for site in sites
        if any(is_within(site.path, block) for block in blocks)
    ]


def _weight(root: nn.Module, site: Site) -> Tensor:
    weight = site.weight(site.module(root))
    if weight.is_meta:
        raise UnsupportedLayerError(
            f"'{site.key}' is on the meta device, and init='pruned' reads the base's weights. Load the weights before injecting, or take "
            "init='random'."
        )
    return weight
