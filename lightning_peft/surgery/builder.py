"""Reads a model with the data of a family and collects roles, blocks and ports."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_peft.errors import TargetError
from lightning_peft.surgery.architectures import BY_MODEL_TYPE, BYPASSES
from lightning_peft.surgery.families import Family, Fused, Roles, Stack
from lightning_peft.surgery.layers import EMBEDDING, MODULE, NORM, TENSOR, TRANSPOSED_TENSOR, LinearKind, Rows, layer_kind
from lightning_peft.surgery.ports import BodyPort, PatchesPort, Port, attention_ports, embeddings_port, heads, hidden_width
from lightning_peft.surgery.sites import Site, attention_sites, make_site
from lightning_peft.surgery.tree import ModuleTree, is_within, join, model_type

LOCAL_ROLES = (
    "attention", "cross_attention", "mlp", "experts", "norm", "mlp_norm", "embedding", "projection", "head", "block", "body",
)  # fmt: skip
PARTS = ("query", "key", "value", "output")
PART_ORDER = (*PARTS, "gate_up", "gate", "up", "down")
EXPERT_TENSORS = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}


def spellings(role: str) -> tuple[str, ...]:
    """Return the names under which a full role is found: with its scopes, with fewer, with none.

    Cross attention is attention for who names no scope, as it is for a suffix such as ``q_proj``.
    """
    parts = role.split(".")
    start = next((i for i, part in enumerate(parts) if part in LOCAL_ROLES), 0)
    names = [".".join(parts[i:]) for i in range(start + 1)]
    if names[-1].startswith("cross_attention"):
        names.append(names[-1].removeprefix("cross_"))
    return tuple(names)


def in_order(tree: ModuleTree, sites: Iterable[Site]) -> tuple[Site, ...]:
    """Return sites in model order; parts of one fused weight in the order of their rows."""

    def position(site: Site) -> tuple[int, int, str, str]:
        return tree.order[site.path], -1 if site.rows is None else site.rows.start, site.tensor, site.member or ""

    return tuple(sorted(sites, key=position))


class AnatomyBuilder:
    """Collects what an :class:`Anatomy` holds. Reads the model only.

    Args:
        tree: The model.
    """

    def __init__(self, tree: ModuleTree) -> None:
        self.tree = tree
        self.roles: dict[str, list[Site]] = {}
        self.layers: dict[str, int] = {}
        self.ports: dict[str, list[Port]] = {"embeddings": [], "attention_kv": [], "body": [], "patches": []}
        self.bypasses = dict(_bypasses(tree))
        self.optional = [path for path in tree.modules if path.rpartition(".")[2] == "experts"]
        self.notes: list[str] = []
        self._scopes: dict[str, str] = {}  # path of a stack -> its scope

    def sorted_roles(self) -> dict[str, tuple[Site, ...]]:
        """Return the roles in a fixed order (scope, kind, part), their sites in model order."""
        scopes = list(dict.fromkeys(self._scopes.values()))

        def place(role: str) -> tuple[int, int, int, str]:
            parts = role.split(".")
            start = next((i for i, part in enumerate(parts) if part in LOCAL_ROLES), 0)
            scope, local, part = ".".join(parts[:start]), parts[start], parts[-1]
            return (
                scopes.index(scope) if scope in scopes else len(scopes),
                LOCAL_ROLES.index(local) if local in LOCAL_ROLES else len(LOCAL_ROLES),
                PART_ORDER.index(part) if part in PART_ORDER else len(PART_ORDER),
                role,
            )

        return {role: in_order(self.tree, self.roles[role]) for role in sorted(self.roles, key=place)}

    # Whole models

    def add_known(self) -> str | None:
        """Describe the model by the families of the HF models in it; None if one of them is unknown or there is none."""
        roots = self.tree.hf_roots
        names: list[str] = []
        for path in roots:
            # Several models side by side (teacher and student) are told apart by their attribute.
            name = self._add_model(path, path.rpartition(".")[2] if len(roots) > 1 else "")
            if name is None:
                return None
            names.append(name)
        if not roots:
            return None
        self._add_everywhere(roots)
        return "+".join(dict.fromkeys(names))

    def add_given(self, family: Family) -> str:
        """Describe the model by the user's own data.

        Raises:
            TargetError: None of its stacks is in the model.
        """
        roots = self.tree.hf_roots if len(self.tree.hf_roots) == 1 else ("",)
        if not self._add_family(roots[0], family, ""):
            wanted = ", ".join(repr(join(s.path, s.blocks)) for s in family.stacks) or ", ".join(family.parts.values())
            raise TargetError(
                f"Anatomy '{family.name}' does not fit {type(self.tree.root).__name__}: none of {wanted} exists below "
                f"'{self.tree.hf_base(roots[0])}'. Top-level modules: {', '.join(self.tree.children('')) or 'none'}."
            )
        self._add_everywhere(roots)
        return family.name

    def _add_model(self, path: str, scope: str) -> str | None:
        kind = model_type(self.tree[path])
        family = BY_MODEL_TYPE.get(kind or "")
        if family is None:
            self.notes.append(f"model_type '{kind}' is not a known family")
            return None
        if not self._add_family(path, family, scope):
            self.notes.append(f"the blocks of family '{family.name}' were not found in model_type '{kind}'")
            return None
        return family.name

    def _add_family(self, path: str, family: Family, scope: str) -> bool:
        base = self.tree.hf_base(path)
        found = False
        for part, child in family.parts.items():
            nested = join(base, child)
            found |= nested in self.tree and self._add_model(nested, join(scope, part)) is not None
        for stack in family.stacks:
            # A part that names its own scope (a CLIP tower inside CLIP) does not get it twice.
            inner = scope if scope.rpartition(".")[2] == stack.scope else join(scope, stack.scope)
            found |= self._add_stack(join(base, stack.path), stack, inner, self.tree[path])
        for role, child in family.roles.items():
            if join(path, child) in self.tree:
                outer = scope if role.startswith(f"{scope.rpartition('.')[2]}.") else join(scope, role.partition(".")[0])
                self.add(join(outer, role.partition(".")[2]), join(path, child))
        return found

    def _add_everywhere(self, roots: Iterable[str]) -> None:
        """Add what is the same for every family: heads, norms, expert stacks, bodies of vision models."""
        self.add_heads(tuple(roots))
        self.add_norms()
        self.add_experts()
        self.add_patches()

    # Stacks and blocks

    def _add_stack(self, at: str, stack: Stack, scope: str, model: nn.Module) -> bool:
        blocks_path = join(at, stack.blocks)
        blocks = self.tree.children(blocks_path) if blocks_path in self.tree else ()
        if not blocks:
            return False
        config = getattr(self.tree[at], "config", None) or getattr(model, "config", None)
        self._scopes[at] = scope
        if _reads_encoder(config):
            cross: tuple[str, ...] = tuple(p for b in blocks for p in self._cross_modules(b, stack))
        else:
            cross = ()
            self._bypass_cross_attention(blocks, stack)
        self.add_blocks(blocks, scope)
        for block in blocks:
            self.add_block_roles(block, stack.roles, scope)
            for child, fused in stack.fused.items():
                if join(block, child) in self.tree:
                    self._add_fused(join(block, child), fused, scope, config)
        if stack.embedding is not None and join(at, stack.embedding) in self.tree:
            self.add(join(scope, "embedding"), join(at, stack.embedding))
        self.add_body(blocks_path.rpartition(".")[0], blocks, scope, config)
        embeddings = embeddings_port(self.tree, at, stack, scope, config)
        if embeddings is not None and not any(_is_encoder_of(port.scope, scope) for port in self.ports["embeddings"]):
            self.ports["embeddings"].append(embeddings)
        indices = {block: self.layers[block] for block in blocks}
        found = attention_ports(self.tree, at, scope, indices, config, cross)
        self.ports["attention_kv"] += [port for port in found if port.path not in self.bypasses]
        rate = max((getattr(config, name, 0.0) or 0.0 for name in ("layerdrop", f"{stack.scope}_layerdrop")), default=0.0)
        if rate > 0:
            self.optional += blocks
        return True

    def add_blocks(self, blocks: tuple[str, ...], scope: str) -> None:
        """Register blocks in order, with the role ``block``."""
        for index, block in enumerate(blocks):
            self.layers[block] = index
            self._append(join(scope, "block"), make_site(self.tree.root, block, kind=MODULE, role=join(scope, "block")))

    def add_body(self, path: str, blocks: tuple[str, ...], scope: str, config: object) -> None:
        """Register the owner of the blocks as port and role ``body``."""
        width = hidden_width(self.tree[path], config)
        self.ports["body"].append(BodyPort(path=path, scope=scope, blocks=blocks, hidden=width))
        self._append(join(scope, "body"), make_site(self.tree.root, path, kind=MODULE, role=join(scope, "body")))

    def add_block_roles(self, block: str, roles: Roles, scope: str) -> None:
        """Add the layers that a block has of ``roles``; an nn.MultiheadAttention expands to its projections."""
        for role, children in roles.items():
            for child in (children,) if isinstance(children, str) else children:
                path = join(block, child)
                if path in self.tree:
                    self.add(join(scope, role), path)

    def add(self, role: str, path: str) -> None:
        """Add the layer at ``path`` under a full role name, unless it is known never to run."""
        path = self.tree.canonical(path)
        module = self.tree[path]
        if path in self.bypasses:
            return
        if isinstance(module, nn.MultiheadAttention):
            for part in PARTS:
                for site in attention_sites(self.tree.root, path, part, join(role, part)):
                    self._append(join(role, part), site)
        elif layer_kind(module) is not None:
            self._append(role, make_site(self.tree.root, path, role=role))

    def _append(self, role: str, site: Site) -> None:
        sites = self.roles.setdefault(role, [])
        if site not in sites:
            sites.append(site)

    def _add_fused(self, path: str, fused: Fused, scope: str, config: object) -> None:
        module = self.tree[path]
        kind = layer_kind(module)
        if path in self.bypasses or not isinstance(kind, LinearKind):
            return
        total = kind.spec(module, "weight").out_features
        owner = self.tree[path.rpartition(".")[0]]
        count, kv_heads = heads(owner, getattr(owner, "config", None) or config)
        units = [count or 1 if part.endswith("query") else kv_heads or 1 for part in fused.parts]
        if not any(part.endswith(".query") for part in fused.parts):
            units = [1] * len(fused.parts)
        period = None
        if fused.per_head:
            groups = kv_heads or 1
            units, total = [unit // groups for unit in units], total // groups
            period = total
        start = 0
        for part, unit in zip(fused.parts, units, strict=True):
            stop = start + total * unit // sum(units)
            role = join(scope, part)
            rows = Rows(start, stop, period)
            member = part.rpartition(".")[2]
            self._append(role, make_site(self.tree.root, path, rows=rows, member=member, role=role))
            start = stop

    # What is read from structure alone

    def add_heads(self, roots: tuple[str, ...]) -> None:
        """Add the role ``head``: the output embeddings of an HF model, else its linear layers outside the base model.

        Linear layers beside the HF model, as in a LightningModule with its own classifier, are heads too.
        """
        taken = {site.path for sites in self.roles.values() for site in sites if site.kind is not MODULE}
        bases = tuple(self.tree.hf_base(path) for path in roots)
        outputs = {root: output_embeddings(self.tree[root]) for root in roots}
        for path, module in self.tree.modules.items():
            output = next((outputs[root] for root in roots if is_within(path, root)), None)
            if output is not None:
                is_head = output is module
            else:
                is_head = isinstance(layer_kind(module), LinearKind) and not any(is_within(path, base) for base in bases)
            if is_head and path not in taken:
                self.add("head", path)

    def add_norms(self) -> None:
        """Add the role ``norm``: every normalisation layer with a weight, in the scope of its stack."""
        for path, module in self.tree.modules.items():
            if layer_kind(module) == NORM:
                stacks = [at for at in self._scopes if is_within(path, at)]
                self.add(join(self._scopes[max(stacks, key=len)] if stacks else "", "norm"), path)

    def add_experts(self) -> None:
        """Add the expert stacks of transformers 5: three-dimensional parameters of a module called ``experts``."""
        for path, module in self.tree.modules.items():
            if path.rpartition(".")[2] != "experts":
                continue
            kind = TRANSPOSED_TENSOR if getattr(module, "is_transposed", False) else TENSOR
            for tensor, part in EXPERT_TENSORS.items():
                value = module._parameters.get(tensor)
                if value is not None and value.dim() == 3 and value.is_floating_point():
                    role = f"experts.{part}"
                    self._append(role, make_site(self.tree.root, path, kind=kind, tensor=tensor, member=part, role=role))

    def add_patches(self) -> None:
        """Add the bodies that read patches: what embeds their input is no table, and where nothing is known of that, there is no table.

        Their width, if need be, is that of their norms.
        """
        tables = any(layer_kind(module) == EMBEDDING for module in self.tree.modules.values())
        for body in self.ports["body"]:
            assert isinstance(body, BodyPort)
            embeddings = self.roles.get(join(body.scope, "embedding"), [])
            if any(site.spec.kind == "embedding" for site in embeddings) or (tables and not embeddings):
                continue
            norms = {site.spec.out_features for sites in self.roles.values() for site in sites if self._is_norm_of(site, body)}
            hidden = body.hidden or (norms.pop() if len(norms) == 1 else None)
            patch = next((site.spec.in_features for site in embeddings), None)
            port = PatchesPort(path=body.path, scope=body.scope, blocks=body.blocks, hidden=hidden, patch=patch)
            self.ports["patches"].append(port)

    @staticmethod
    def _is_norm_of(site: Site, body: BodyPort) -> bool:
        return site.spec.kind == "norm" and any(is_within(site.path, block) for block in body.blocks)

    # Cross attention

    def _cross_modules(self, block: str, stack: Stack) -> tuple[str, ...]:
        """Return the cross-attention modules of a block: the children of the block that hold such roles."""
        children = [c for role, c in stack.roles.items() if role.startswith("cross_attention")]
        flat = [c for group in children for c in ((group,) if isinstance(group, str) else group)]
        tops = {join(block, child.rpartition(".")[0].removesuffix(".self").removesuffix(".output")) for child in flat}
        return tuple(top for top in tops if top in self.tree)

    def _bypass_cross_attention(self, blocks: tuple[str, ...], stack: Stack) -> None:
        reason = (
            "its cross attention runs only with encoder_hidden_states, which this model's config says it does not get; "
            "set config.add_cross_attention = True if it does"
        )
        for block in blocks:
            for top in self._cross_modules(block, stack):
                # BART's encoder_attn has its encoder_attn_layer_norm beside it.
                self.bypasses.update({path: reason for path, _ in self.tree.below(block) if path.startswith(top)})


def _reads_encoder(config: object) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))


def _is_encoder_of(first: str, second: str) -> bool:
    """Whether two scopes are encoder and decoder of one model."""
    return first.rpartition(".")[2] == "encoder" and second == join(first.rpartition(".")[0], "decoder")


def output_embeddings(module: nn.Module) -> nn.Module | None:
    """Return what ``get_output_embeddings()`` gives, where the model has it."""
    getter = getattr(module, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _bypasses(tree: ModuleTree) -> Iterable[tuple[str, str]]:
    for path, module in tree.modules.items():
        name = type(module).__name__
        for bypass in BYPASSES:
            if re.fullmatch(bypass.owner, name):
                for child in bypass.children:
                    if join(path, child) in tree.modules:
                        yield join(path, child), f"{bypass.reason}; {bypass.remedy}"
        if isinstance(module, nn.MultiheadAttention):
            for child, _ in tree.below(path):
                if child != path:
                    yield child, f"nn.MultiheadAttention reads its weight directly; adapt '{path}' itself"
        shared, tables = join(path, "shared"), [join(path, s, "embed_tokens") for s in ("encoder", "decoder")]
        if shared in tree.modules and any(table in tree.modules for table in tables):
            # Where `embed_tokens` is the same object it is an alias of `shared`, and `shared` does run.
            yield shared, "the encoder and decoder embed through their own embed_tokens; adapt encoder.embed_tokens or " \
                "decoder.embed_tokens"  # fmt: skip
