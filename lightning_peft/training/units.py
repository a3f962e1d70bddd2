"""Units of sharding: what FSDP gathers at a time. One unit per transformer block, and one for the rest.

A block's adapters belong to its unit, frozen and trainable parameters side by side: FSDP2 shards them one by one. FSDP1 flattens a
unit into one tensor, so its parameters need one floating dtype, and ``use_orig_params`` where only some train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_peft.errors import ConfigError, ConflictError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.surgery.handle import Handle


def shard(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Shard a model in place with FSDP2, block by block; adapters have to be there already.

    For ``configure_model`` under ``ModelParallelStrategy``: build the model, ``callback.apply(self)``, then
    ``lp.shard(self.net, self.device_mesh["data_parallel"])``. :class:`.PEFTLightningModule` does so by itself.

    Args:
        model: The adapted model. A model whose blocks are not known becomes one unit.
        mesh: Devices to shard over, one dimension of ``LightningModule.device_mesh``.
        **options: Arguments of ``torch.distributed.fsdp.fully_shard``, such as ``mp_policy`` or ``reshard_after_forward``.

    Returns:
        The model.

    Raises:
        ConflictError: A part of it is sharded already.
        ConfigError: A parameter has no dimension to shard along.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    low = next((path for path, part in model.named_modules() if isinstance(part, FSDPModule)), None)
    if low is not None:
        raise ConflictError(f"'{low or type(model).__name__}' is sharded already.")
    scalar = next((name for name, parameter in model.named_parameters() if parameter.dim() == 0), None)
    if scalar is not None:
        raise ConfigError(f"'{scalar}' is a parameter without dimensions, which FSDP2 cannot shard. Give it the shape (1,).")
    for path in sorted(anatomy_of(model).blocks, key=lambda path: -path.count(".")):  # blocks inside blocks first
        fully_shard(model.get_submodule(path), mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def data_parallel(mesh: Any) -> Any:
    """Return the dimension of Lightning's device mesh that models are sharded along.

    Raises:
        ConfigError: The mesh asks for tensor parallelism too.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            f"ModelParallelStrategy(tensor_parallel_size={mesh['tensor_parallel'].size()}): adapters are sharded (FSDP2), not split over "
            "tensor-parallel ranks. Use tensor_parallel_size=1."
        )
    return mesh["data_parallel"]


def prepare_fsdp1(strategy: Any, handle: Handle, say: Callable[[str], None]) -> None:
    """Make ready for FSDP1 what Lightning is about to wrap: units, and one dtype in them.

    Args:
        strategy: Lightning's ``FSDPStrategy``, not set up yet. Without a policy of the user's it gets one unit per block.
        handle: The adapter; its floating tensors take the dtype of the base.
        say: Prints to the user.

    Raises:
        ConfigError: ``use_orig_params=False``; or quantized weights whose codes cannot be flattened with the rest.
    """
    if not strategy.kwargs.get("use_orig_params", True):
        raise ConfigError("FSDPStrategy(use_orig_params=False) cannot freeze a part of a unit. Leave it out, or use FSDP2.")
    dtype = _dtype_of(handle)
    for path, module in handle.root.named_modules():
        backend = backend_of(module)
        if backend is None:
            continue
        assert isinstance(module, nn.Linear)
        stored = backend.config(module).storage_dtype
        if stored != str(dtype).removeprefix("torch."):
            raise ConfigError(
                f"FSDP1 flattens '{path}' together with {dtype} parameters, and its codes lie in {stored}. Quantize with "
                f"storage_dtype='{str(dtype).removeprefix('torch.')}', or use FSDP2 (ModelParallelStrategy)."
            )
    changed = [s for s in handle.slots if not s.claimed and s.tensor().is_floating_point() and s.tensor().dtype != dtype]
    for slot in changed:
        slot.tensor().data = slot.tensor().data.to(dtype)
    if changed:
        say(f"adapters are {dtype}: FSDP1 wants one dtype per unit.")
    if "auto_wrap_policy" not in strategy.kwargs:
        from torch.distributed.fsdp.wrap import CustomPolicy

        blocks = {id(handle.root.get_submodule(path)) for path in anatomy_of(handle.root).blocks}
        strategy.kwargs["auto_wrap_policy"] = CustomPolicy(lambda module: id(module) in blocks)


def _dtype_of(handle: Handle) -> torch.dtype:
    owned = {id(slot.tensor()) for slot in handle.slots}
    dense = [p for p in handle.root.parameters() if p.is_floating_point() and id(p) not in owned]
    return dense[0].dtype if dense else torch.get_default_dtype()
