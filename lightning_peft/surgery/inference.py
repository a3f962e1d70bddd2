"""Anatomy from facts alone, for models of no known family: repeated blocks, torch's own transformer layers, usual names.

Nothing here looks at an architecture's identity, and what it finds is printed. Methods do not take their default targets from an
inferred anatomy (:meth:`.Anatomy.default_sites`); torch's own transformer layers are known, so theirs are.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.surgery.builder import AnatomyBuilder, output_embeddings
from lightning_peft.surgery.families import Roles
from lightning_peft.surgery.layers import EMBEDDING, LinearKind, layer_kind
from lightning_peft.surgery.ports import attention_ports
from lightning_peft.surgery.tree import ModuleTree, join

# Children of torch's own layers; their linear layers have fixed meanings.
TORCH_ENCODER: Roles = {"attention": "self_attn", "mlp.up": "linear1", "mlp.down": "linear2"}
TORCH_DECODER: Roles = {**TORCH_ENCODER, "cross_attention": "multihead_attn"}
LAST_NORM = {"encoder": "norm2", "decoder": "norm3"}

# Sibling sets of projection names: a set counts only if query, key and value stand side by side.
ATTENTION_NAMES = (
    ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense")),
    ("query", "key", "value", ("out", "dense", "output")),
    ("query_proj", "key_proj", "value_proj", ("out_proj", "output_proj")),
    ("to_q", "to_k", "to_v", ("to_out", "to_out.0")),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
    ("wq", "wk", "wv", ("wo",)),
    ("w_q", "w_k", "w_v", ("w_o",)),
    ("q", "k", "v", ("o", "out", "proj")),
)
MLP_NAMES = (
    {"mlp.gate": "gate_proj", "mlp.up": "up_proj", "mlp.down": "down_proj"},
    {"mlp.up": "fc1", "mlp.down": "fc2"},
    {"mlp.up": "fc_in", "mlp.down": "fc_out"},
    {"mlp.up": "lin1", "mlp.down": "lin2"},
    {"mlp.up": "linear1", "mlp.down": "linear2"},
    {"mlp.up": "up_proj", "mlp.down": "down_proj"},
    {"mlp.up": "c_fc", "mlp.down": "c_proj"},
    {"mlp.up": "dense_h_to_4h", "mlp.down": "dense_4h_to_h"},
    {"mlp.up": "intermediate_dense", "mlp.down": "output_dense"},
)


def infer(tree: ModuleTree, notes: tuple[str, ...] = ()) -> AnatomyBuilder:
    """Return a builder filled from the structure of the model."""
    builder = AnatomyBuilder(tree)
    builder.notes += notes
    add_torch_layers(builder)
    if not builder.layers:
        _add_longest_list(builder)
    for path, module in tree.modules.items():
        if isinstance(module, nn.MultiheadAttention):
            if not _has_site(builder, path):
                builder.add("cross_attention" if "cross" in path else "attention", path)
        else:
            _add_named_children(builder, path)
    _add_embedding(builder)
    _add_head(builder)
    builder.add_norms()
    builder.add_experts()
    builder.add_patches()
    config = getattr(tree.root, "config", None)
    cross = tuple(p for p in tree.modules if _is_cross(p))
    builder.ports["attention_kv"] += attention_ports(tree, "", "", builder.layers, config, cross)
    return builder


def add_torch_layers(builder: AnatomyBuilder) -> bool:
    """Add blocks and roles of nn.TransformerEncoderLayer and nn.TransformerDecoderLayer, scoped if the model has both."""
    kinds = (("encoder", nn.TransformerEncoderLayer, TORCH_ENCODER), ("decoder", nn.TransformerDecoderLayer, TORCH_DECODER))
    found = {
        scope: tuple(path for path, module in builder.tree.modules.items() if isinstance(module, cls)) for scope, cls, _ in kinds
    }
    for scope, _, roles in kinds:
        prefix = scope if all(found.values()) else ""
        stacks: dict[str, list[str]] = {}
        for block in found[scope]:
            owner = block.rpartition(".")[0]
            owner = owner.rpartition(".")[0] if isinstance(builder.tree[owner], nn.ModuleList) else owner
            stacks.setdefault(owner, []).append(block)
            builder.add_block_roles(block, roles, prefix)
            if not builder.tree[block].norm_first:
                builder.add_block_roles(block, {"mlp_norm": LAST_NORM[scope]}, prefix)
        for owner, blocks in stacks.items():
            builder.add_blocks(tuple(blocks), prefix)
            builder.add_body(owner, tuple(blocks), prefix, None)
    return bool(builder.layers)


def _add_longest_list(builder: AnatomyBuilder) -> None:
    """Blocks are the longest ModuleList or Sequential of equal-class modules that have children of their own."""
    lists: dict[str, tuple[str, ...]] = {}
    for path, module in builder.tree.modules.items():
        children = builder.tree.children(path)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1:
            classes = {type(builder.tree[child]) for child in children}
            if len(classes) == 1 and all(builder.tree.children(child) for child in children):
                lists[path] = children
    if lists:
        path = max(lists, key=lambda key: len(lists[key]))
        builder.add_blocks(lists[path], "")
        module = builder.tree[path]
        # A ModuleList has no forward; its owner runs the blocks.
        body = path.rpartition(".")[0] if isinstance(module, nn.ModuleList) else path
        config = getattr(builder.tree[body], "config", None) or getattr(builder.tree.root, "config", None)
        builder.add_body(body, lists[path], "", config)
        builder.notes.append(f"blocks: '{path}' is the longest list of equal modules")


def _add_named_children(builder: AnatomyBuilder, path: str) -> None:
    """Add attention and MLP roles of the children of one module."""
    tree = builder.tree

    def linear(name: str) -> bool:
        child = join(path, name)
        return child in tree and isinstance(layer_kind(tree[child]), LinearKind) and not _has_site(builder, child)

    for query, key, value, outputs in ATTENTION_NAMES:
        if linear(query) and linear(key) and linear(value):
            role = "cross_attention" if _is_cross(path) else "attention"
            for part, name in (("query", query), ("key", key), ("value", value)):
                builder.add(f"{role}.{part}", join(path, name))
            # BERT and its relatives keep the output projection beside the module that holds query, key and value.
            candidates = [join(path, name) for name in outputs]
            candidates += [join(path.rpartition(".")[0], "output", "dense")] if path.rpartition(".")[2] == "self" else []
            output = next((p for p in candidates if p in tree and isinstance(layer_kind(tree[p]), LinearKind)), None)
            if output is not None:
                builder.add(f"{role}.output", output)
            break
    for names in MLP_NAMES:
        if all(linear(name) for name in names.values()):
            for role, name in names.items():
                builder.add(role, join(path, name))
            break


def _add_embedding(builder: AnatomyBuilder) -> None:
    """The input embedding is what the model says it is, or its only nn.Embedding."""
    tree = builder.tree
    tables = [path for path, module in tree.modules.items() if layer_kind(module) == EMBEDDING]
    for root in tree.hf_roots:
        getter = getattr(tree[root], "get_input_embeddings", None)
        try:
            own = getter() if callable(getter) else None
        except NotImplementedError:  # vision and audio models of transformers
            own = None
        path = None if own is None else tree.path_of(own)
        if path is not None:
            builder.add("embedding", path)
    if not tree.hf_roots and len(tables) == 1:
        builder.add("embedding", tables[0])


def _add_head(builder: AnatomyBuilder) -> None:
    """The head is what ``get_output_embeddings()`` or timm's ``get_classifier()`` gives; otherwise it is not known."""
    tree = builder.tree
    found: list[object] = [output_embeddings(tree[root]) for root in tree.hf_roots]
    for module in tree.modules.values():
        getter = getattr(module, "get_classifier", None)
        found += [getter()] if callable(getter) else []
    for head in found:
        path = None if head is None else tree.path_of(head)
        if path is not None:
            builder.add("head", path)
    if tree.hf_roots and "head" not in builder.roles:
        builder.add_heads(tree.hf_roots)


def _has_site(builder: AnatomyBuilder, path: str) -> bool:
    return any(site.path == path for role, sites in builder.roles.items() for site in sites if site.spec.kind != "module")


def _is_cross(path: str) -> bool:
    return any(word in path.rsplit(".", 1)[-1].lower() for word in ("cross", "encdec", "encoder_attn"))
