"""What trains beside an adapter, or instead of one, with the base's own names: norms, token rows, whole modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConfigError, FormatError, TargetError
from lightning_peft.interop.files import PREFIX
from lightning_peft.interop.names import hf_targets, our_targets, strings
from lightning_peft.interop.table import Fields, Format, Parsed, Written, layers_of
from lightning_peft.nn.token_rows import TokenRowsAdapter
from lightning_peft.strategies.selective.layer_selection import LayerSelection
from lightning_peft.strategies.selective.ln_tuning import LNTuning
from lightning_peft.strategies.selective.token_rows import TokenRows
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.stack import RESERVED
from lightning_peft.surgery.targets import REGEX, Targets
from lightning_peft.surgery.tree import is_within

ROWS = "trainable_tokens_delta"
INSIDE = f"token_adapter.{ROWS}"

# ---------------------------------------------------------------------- LN_TUNING


@dataclass(frozen=True, kw_only=True)
class NormFormat(Format):
    """LN_TUNING: a whole copy of each norm."""

    def suffixes(self) -> tuple[str, ...]:
        return ("ln_tuning_layers.weight", "ln_tuning_layers.bias")

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        tensors: dict[str, Tensor] = {}
        for slot in handle.slots:
            path, _, name = slot.key.rpartition(".")
            tensors[f"{PREFIX}{path}.ln_tuning_layers.{name}"] = slot.tensor().detach()
        paths = list(dict.fromkeys(slot.key.rpartition(".")[0] for slot in handle.slots))
        return Written({"target_modules": hf_targets(paths, anatomy.tree)}, tensors)

    def strategy(self, file: Parsed, anatomy: Anatomy) -> PEFTStrategy:
        paths = _present(file.layers, file, anatomy)
        return LNTuning(targets=our_targets(paths, anatomy, LNTuning.info.layer_kinds))

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        found = {}
        for path, given in file.layers.items():
            for suffix, tensor in given.items():
                found[f"{path}.{suffix.rpartition('.')[2]}"] = tensor
        return found


LN_TUNING = NormFormat(peft_type="LN_TUNING", methods=(LNTuning,), fields=Fields())

# ---------------------------------------------------------------------- trainable tokens


def write_tokens(part: Handle, anatomy: Anatomy) -> dict[str, tuple[list[int], Tensor]]:
    """Return ids and rows by the path of the table that HF keeps them at: of tied ones the input embedding of the model."""
    tables: dict[int, list[str]] = {}
    rows: dict[int, TokenRowsAdapter] = {}
    for layer in layers_of(part):
        assert isinstance(layer.adapter, TokenRowsAdapter)
        tables.setdefault(id(layer.adapter.trained), []).append(layer.path)
        rows.setdefault(id(layer.adapter.trained), layer.adapter)
    found = {}
    for key, paths in tables.items():
        trained = rows[key].trained
        found[_home(paths, anatomy)] = (list(trained.ids), trained.rows.detach())
    return found


def _home(paths: Sequence[str], anatomy: Anatomy) -> str:
    """Return the path at which HF keeps the rows of tied tables: the model's input embedding, where it is one of them."""
    embedding = _input_embedding(anatomy)
    weights = [getattr(anatomy.tree[path], "weight", None) for path in paths]
    if embedding is not None and any(getattr(anatomy.tree[embedding], "weight", None) is weight for weight in weights):
        return embedding
    return paths[0]


def _input_embedding(anatomy: Anatomy) -> str | None:
    root: Any = anatomy.root
    try:
        module = root.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return anatomy.tree.path_of(module)


def token_strategy(tables: Mapping[str, Sequence[int]], anatomy: Anatomy, where: str) -> TokenRows:
    """Return the strategy that trains these rows, in all tables that are tied to one of the named ones.

    Args:
        tables: Token ids by the path of their table.
        anatomy: The model.
        where: Names the file.

    Raises:
        CompatibilityError: A table does not exist, or two have different ids.
    """
    ids = {tuple(sorted(given)) for given in tables.values()}
    if len(ids) != 1:
        raise CompatibilityError(f"{where}: the tables {sorted(tables)} have other tokens each; one set for all is read.")
    paths = {other for path in tables for other in _tied(path, anatomy, where)}
    ordered = sorted(paths, key=anatomy.tree.order.__getitem__)
    return TokenRows(ids=ids.pop(), targets=our_targets(ordered, anatomy, TokenRows.info.layer_kinds))


def _tied(path: str, anatomy: Anatomy, where: str) -> list[str]:
    """Return the paths of the modules that run and have the weight of the module at ``path``."""
    if path not in anatomy.tree:
        raise CompatibilityError(f"{where} trains token rows of '{path}', which the model has not.")
    weight = getattr(anatomy.tree[path], "weight", None)
    tied = [p for p, m in anatomy.tree.modules.items() if weight is not None and getattr(m, "weight", None) is weight]
    return [p for p in tied if anatomy.bypassed(p) is None]


def token_state(
    part: Handle, tables: Mapping[str, tuple[Sequence[int], Tensor]], anatomy: Anatomy, where: str
) -> dict[str, Tensor]:
    """Return the rows of a file for the slots of a freshly installed :class:`TokenRows`, in ascending order of their ids."""
    found: dict[str, Tensor] = {}
    homes = {other: path for path in tables for other in _tied(path, anatomy, where)}
    slots = {id(slot.owner): slot for slot in part.slots}
    for layer in layers_of(part):
        assert isinstance(layer.adapter, TokenRowsAdapter)
        ids, rows = tables[homes[layer.path]]
        if rows.dim() != 2 or rows.shape[0] != len(ids):
            raise CompatibilityError(f"{where}: {len(ids)} trainable tokens, and rows of shape {tuple(rows.shape)}.")
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        found[slots[id(layer.adapter.trained)].key] = rows[order]
    return found


@dataclass(frozen=True, kw_only=True)
class TokensFormat(Format):
    """TRAINABLE_TOKENS, standing alone."""

    def suffixes(self) -> tuple[str, ...]:
        return (ROWS,)

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        tables = write_tokens(handle, anatomy)
        tensors = {f"{PREFIX}{path}.{ROWS}": rows for path, (_, rows) in tables.items()}
        ids = next(iter(tables.values()))[0]
        return Written({"token_indices": ids, "target_modules": hf_targets(list(tables), anatomy.tree)}, tensors)

    def strategy(self, file: Parsed, anatomy: Anatomy) -> PEFTStrategy:
        ids = token_ids(file.config.get("token_indices"), "token_indices", file.where)
        return token_strategy(dict.fromkeys(_present(file.layers, file, anatomy), ids), anatomy, file.where)

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        ids = file.config["token_indices"]
        tables = {path: (ids, given[ROWS]) for path, given in file.layers.items()}
        return token_state(part, tables, anatomy, file.where)


TRAINABLE_TOKENS = TokensFormat(
    peft_type="TRAINABLE_TOKENS",
    methods=(TokenRows,),
    fields=Fields(free=frozenset({"init_weights"}), own=frozenset({"token_indices"})),
)


def token_ids(value: Any, name: str, where: str) -> list[int]:
    """Return token ids of a config.

    Raises:
        FormatError: They are no list of different whole numbers.
    """
    if (
        not isinstance(value, list)
        or not value
        or not all(type(i) is int and i >= 0 for i in value)
        or len(set(value)) < len(value)
    ):
        raise FormatError(f"{where}: {name}={str(value)[:100]!r} is no list of different token ids.")
    return value


def tables_in_lora(file: Parsed, anatomy: Anatomy) -> dict[str, tuple[list[int], Tensor]]:
    """Return ids and rows by path of the trainable tokens inside a LoRA.

    Raises:
        FormatError: Ids and rows do not belong together.
    """
    given = file.config.get("trainable_token_indices")
    rows = {key.removesuffix(f".{INSIDE}"): tensor for key, tensor in file.rest.items() if key.endswith(f".{INSIDE}")}
    if given is None and not rows:
        return {}
    if isinstance(given, dict):
        named = {str(name): token_ids(ids, "trainable_token_indices", file.where) for name, ids in given.items()}
        ids = {path: next((v for n, v in named.items() if path == n or path.endswith(f".{n}")), None) for path in rows}
    else:
        single = token_ids(given, "trainable_token_indices", file.where)
        ids = dict.fromkeys(rows, single)
    lost = [path for path, value in ids.items() if value is None]
    if not rows or lost:
        raise FormatError(
            f"{file.where}: trainable_token_indices and the rows in the file do not belong together ({lost[:1] or 'no rows'})."
        )
    return {path: (ids[path] or [], tensor) for path, tensor in rows.items()}


# ---------------------------------------------------------------------- modules_to_save


def write_modules(claimed: Iterable[str], anatomy: Anatomy, more: Sequence[str] = ()) -> tuple[list[str], dict[str, Tensor]]:
    """Return ``modules_to_save`` and their tensors.

    Args:
        claimed: Keys of parameters of the base that train in place.
        anatomy: The model.
        more: Paths of further modules to save as they are now.

    Raises:
        ConfigError: A module trains in part only, or has a weight that another one shares.
        TargetError: A path of ``more`` does not exist.
    """
    tree, keys = anatomy.tree, set(claimed)
    owners = {key.rpartition(".")[0] for key in keys}
    chosen = {path for path in owners if _parameters(tree[path]) and all(f"{path}.{n}" in keys for n in _parameters(tree[path]))}
    for key in keys:
        if not any(is_within(key.rpartition(".")[0], path) for path in chosen):
            raise ConfigError(
                f"'{key}' trains, and not the rest of its module. HF peft saves whole modules only; train the whole module, or keep the "
                "own format (lp.save_adapter)."
            )
    for path in more:
        if path not in tree:
            raise TargetError(f"modules_to_save: '{path}' is no module of {type(anatomy.root).__name__}.")
        chosen.add(tree.canonical(path))
    tops = sorted(path for path in chosen if not any(path != other and is_within(path, other) for other in chosen))
    for path in tops:
        # HF finds them by the end of their name, wherever that begins.
        other = next((p for p in tree.modules if p.endswith(path) and not is_within(p, path)), None)
        if other is not None and other not in tops:
            raise ConfigError(
                f"'{path}' cannot be saved whole: HF peft would take it for '{other}' too, whose name ends in the same way."
            )
        refuse_tied(path, anatomy, "HF peft would train a copy of it for one of the two")
    tensors = {f"{PREFIX}{path}.{name}": value for path in tops for name, value in _state(tree[path]).items()}
    return tops, tensors


def refuse_tied(path: str, anatomy: Anatomy, why: str) -> None:
    """Check that no module outside has a parameter of the module at ``path``.

    Raises:
        ConfigError: One has.
    """
    own = {id(p): n for n, p in anatomy.tree[path].named_parameters() if RESERVED not in n.split(".")}
    for other, module in anatomy.tree.modules.items():
        for value in module._parameters.values():
            if id(value) in own and not is_within(other, path):
                raise ConfigError(f"'{path}.{own[id(value)]}' is tied to '{other}': {why}. Untie the two first, or leave it out.")


def _parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if RESERVED not in name.split(".")]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if RESERVED not in name.split(".")}


@dataclass(frozen=True)
class SavedModules:
    """Whole modules of a file.

    Args:
        parameters: Values of parameters by key.
        owners: Paths of the modules that hold them.
    """

    parameters: Mapping[str, Tensor]
    owners: tuple[str, ...]

    def strategy(self, anatomy: Anatomy) -> LayerSelection:
        """Return the strategy that trains them."""
        kinds = LayerSelection.info.layer_kinds
        targets = our_targets(self.owners, anatomy, kinds)
        found = targets.include
        if any(name.startswith(REGEX) for name in found):  # a regular expression names layers only, and these may be modules
            targets = Targets(include=self.owners)
        return LayerSelection(targets=targets)


def saved_under(key: str, names: Sequence[str]) -> str | None:
    """Return the path of the module in ``modules_to_save`` that a tensor belongs to: HF goes by the end of the name."""
    path = key.rpartition(".")[0]
    parents = [*(path[:i] for i, sign in enumerate(path) if sign == "."), path]
    return next((p for p in parents if any(p.endswith(name) for name in names)), None)


def read_modules(file: Parsed, rest: Mapping[str, Tensor], anatomy: Anatomy) -> SavedModules | None:
    """Return the modules that a file holds whole, None if there are none.

    Args:
        file: The file.
        rest: Its tensors that belong to nothing else, by key in the model.
        anatomy: The model.

    Raises:
        FormatError: A tensor belongs to nothing.
        CompatibilityError: It does not fit the model, or its weight is tied.
    """
    names = strings(file.config.get("modules_to_save"), "modules_to_save", file.where)
    tree, parameters = anatomy.tree, {}
    live = dict(anatomy.root.named_parameters())
    buffers = dict(anatomy.root.named_buffers())
    for key, value in rest.items():
        top = saved_under(key, names)
        if top is None:
            raise FormatError(
                f"{file.where}: '{key}' belongs to no adapter tensor of {file.config['peft_type']} and to no modules_to_save."
            )
        target = live.get(key, buffers.get(key))
        if target is None or top not in tree:
            raise CompatibilityError(f"{file.where} holds '{key}', which the model has not. It was made for another base model.")
        if target.shape != value.shape:
            raise CompatibilityError(
                f"{file.where}: '{key}' has shape {tuple(value.shape)}, the model has {tuple(target.shape)}. Build the model with the same "
                "head (number of labels)."
            )
        if key in buffers and not torch.equal(target, value.to(target.device, target.dtype)):
            raise CompatibilityError(
                f"{file.where}: '{key}' is a buffer with other values than the model's, which no adapter holds."
            )
        if key in live:
            parameters[key] = value
            try:
                refuse_tied(top, anatomy, "the file trains one of the two only")
            except ConfigError as error:
                raise CompatibilityError(f"{file.where}: {error}") from error
    if not parameters:
        return None
    return SavedModules(parameters, tuple(dict.fromkeys(key.rpartition(".")[0] for key in parameters)))


def _present(paths: Iterable[str], file: Parsed, anatomy: Anatomy) -> list[str]:
    found = list(paths)
    missing = [path for path in found if path not in anatomy.tree]
    if not found:
        raise FormatError(f"{file.where} holds no tensor of {file.config['peft_type']}.")
    if missing:
        raise CompatibilityError(
            f"{file.where} adapts '{missing[0]}', which {type(anatomy.root).__name__} has not. It was made for another base model."
        )
    return sorted(found, key=anatomy.tree.order.__getitem__)
