"""Trained token rows: the vectors of chosen tokens train in the input embedding and in the output head, nothing else of them.

What HF peft calls trainable tokens. No paper; ``E[ids]`` and ``H[ids]`` train, one tensor for both where they are tied.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.nn.token_rows import Rows, TokenRowsAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Attach, BuildShared, Edit, Plan, Reparametrize
from lightning_peft.surgery.layers import computes_more_than_a_lookup, parameter
from lightning_peft.surgery.sites import Site


@register(
    name="token_rows",
    family="selective",
    summary="Trains the embedding and output rows of chosen tokens, such as added special tokens.",
    paper="none; known as trainable tokens in HF peft",
    lr=1e-3,
    mergeable=True,
    layer_kinds=frozenset({"embedding", "linear"}),
    default_roles=("embedding",),
    may_rest=("*",),  # a row moves when its token occurs
    example={"ids": [1, 3]},
)
@dataclass(frozen=True, kw_only=True)
class TokenRows(PEFTStrategy):
    """Train the rows of some tokens, in every table of tokens and in the output head.

    Args:
        ids: Token ids. Resize the embeddings before injecting if they are new.
    """

    ids: tuple[int, ...] = ()

    def validate(self) -> None:
        require(len(self.ids) > 0, self, "ids", "it must name at least one token")
        require(min(self.ids) >= 0, self, "ids", "token ids are not negative")
        require(len(set(self.ids)) == len(self.ids), self, "ids", "each token may stand there once")
        object.__setattr__(self, "ids", tuple(sorted(self.ids)))

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        wrong = [s.key for s in sites if s.spec.kind != "embedding"]
        if wrong and self.targets is None:
            raise TargetError(f"TokenRows: '{wrong[0]}' embeds no tokens; {type(anatomy.root).__name__} has no token embedding.")
        if self.targets is None and "head" in anatomy.roles:
            entries = {s.spec.in_features for s in sites}
            sites += tuple(s for s in anatomy.sites("head") if s.spec.kind == "linear" and s.spec.out_features in entries)
        edits: list[Edit] = []
        shared: dict[str, BuildShared] = {}
        tables: dict[int, str] = {}
        for site in sites:
            rows = site.spec.in_features if site.spec.kind == "embedding" else site.spec.out_features
            if self.ids[-1] >= rows:
                raise ConfigError(
                    f"TokenRows: token {self.ids[-1]} is beyond '{site.key}', which has {rows} rows. Call "
                    f"model.resize_token_embeddings({self.ids[-1] + 1}) or more before injecting."
                )
            module = site.module(anatomy.root)
            weight = parameter(module, site.tensor)
            name = tables.setdefault(id(weight), f"rows{len(tables)}")
            if name not in shared:
                shared[name] = functools.partial(Rows, ids=self.ids, table=functools.partial(_table, site, module))
            edits.append(_edit(site, module, name))
        return Plan(tuple(edits), shared)


def _table(site: Site, module: nn.Module) -> Tensor:
    """Return the weight of an embedding or a head as (entries, dim)."""
    weight = site.weight(module)
    return weight.T if site.spec.kind == "embedding" else weight


def _edit(site: Site, module: nn.Module, shared: str) -> Edit:
    build = functools.partial(TokenRowsAdapter, shared=shared)
    # A subclass may do more than look up (Gemma scales): there the trained rows stand in for the stored ones instead.
    return Reparametrize(site, build) if computes_more_than_a_lookup(module) else Attach(site, build)
