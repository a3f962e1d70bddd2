"""Running a model without its numbers: what memory every operation takes and gives back, and what it computes.

Tensors are fake: they have a shape, a dtype and a storage with a size, but no memory. Everything else is real: the model's own code,
the adapters', autograd, checkpointing and autocast all run, on the operations of the CPU. Each storage counts once, from the
operation that made it until nothing refers to it.

Unseen is what an operation needs inside itself (packing buffers of a matrix product), and what the allocator wastes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_peft.errors import ConfigError

_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_DRAWN = "_cost_drawn"  # on numbers drawn at random, such as seeds, of which any will do
_aten = torch.ops.aten


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Return those of softmax(Q Kᵀ) V for (batch, heads, length, width); 2 per multiply-add, masked entries included."""
    batch, heads, length, width = q
    return 2 * batch * heads * length * k[2] * (width + v[3])


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return _attention_flops(query.shape, key.shape, value.shape)


def _cpu_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    # Scores once more, then the gradients of V, of the weights, of Q and of K: five products, as torch counts its CUDA kernels.
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (3 * width + 2 * value.shape[3])


FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's counter knows the attention kernels of CUDA only.
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    # ... and no product that is added in place, or of integers.
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._int_mm: flop_registry[_aten.mm],
}


class Watch:
    """The highest number of bytes alive from its making until :meth:`stop`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.start = self.peak = tracer.live
        self.flops_before = tracer.flops

    def stop(self) -> None:
        """Watch no longer."""
        self._tracer._watches.remove(self)

    @property
    def rise(self) -> int:
        """Bytes of the peak above the start."""
        return self.peak - self.start

    @property
    def flops(self) -> int:
        """Operations since the start."""
        return self._tracer.flops - self.flops_before


class Tracer(FakeTensorMode):
    """A mode under which tensors are fake and counted.

    Attributes:
        live: Bytes of all storages that exist.
        flops: Floating-point operations of matrix products, convolutions and attention so far; a multiply-add is two.
        gradient_share: Share of every gradient that stays on this device once it is there.
        not_here: Bytes of gradients that went to other devices and are not in :attr:`live`, though their tensors are.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.live = self.flops = 0
        self.gradient_share = 1.0
        self.not_here = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._watches: list[Watch] = []
        self._values_do_not_matter = False
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and not self.in_kernel_invocation:  # asked several times per operation
            return args[0].fake_device
        if self._inside:  # part of another operation, whose temporaries stay unseen
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        if func is _ITEM and (self._values_do_not_matter or hasattr(args[0], _DRAWN)):
            return 0.5  # true, and neither 0 nor 1, for which an optimizer may divide by zero
        self._inside = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"the model's forward depends on the values of its tensors ({error}), as routing among experts does; its cost depends on "
                "them too and cannot be estimated."
            ) from error
        finally:
            self._inside = False
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        if func._overloadpacket is _aten.randint:
            setattr(out, _DRAWN, True)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.live += size
        self.reached(self.live)

    def _release(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def reached(self, live: int) -> None:
        """Note that this many bytes were alive at one moment."""
        for watch in self._watches:
            watch.peak = max(watch.peak, live)

    def book(self, nbytes: int) -> None:
        """Count memory that no tensor stands for; less than zero gives it back."""
        self.live += nbytes
        self.reached(self.live)

    def has_gradient(self, parameter: Tensor) -> None:
        """Send the shares of a new gradient that belong to other devices away."""
        away = int((1 - self.gradient_share) * parameter.nbytes)
        self.live -= away
        self.not_here += away

    def watch(self) -> Watch:
        """Begin to watch for the highest value of :attr:`live`."""
        watch = Watch(self)
        self._watches.append(watch)
        return watch

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Hide what happens inside ``with`` from the watches of now."""
        outer, self._watches = self._watches, []
        try:
            yield
        finally:
            self._watches = outer

    def forget_watches(self) -> None:
        """Stop all watches."""
        self._watches.clear()

    @contextmanager
    def any_values(self) -> Iterator[None]:
        """Answer questions for the value of a tensor, for code whose memory does not depend on values."""
        before, self._values_do_not_matter = self._values_do_not_matter, True
        try:
            yield
        finally:
            self._values_do_not_matter = before

    def fake(self, model: nn.Module) -> None:
        """Replace every parameter and buffer of a model on the meta device by a fake one on the CPU; ties stay."""
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is None or not value.is_meta:
                        continue  # made by this mode already
                    if id(value) not in made:
                        made[id(value)] = self._faked(value)
                    tensors[name] = made[id(value)]  # type: ignore[assignment]

    def _faked(self, value: Tensor) -> Tensor:
        new: Any = FakeTensor(self, value.detach(), torch.device("cpu"))
        self._count(new)
        if isinstance(value, nn.Parameter):
            new.requires_grad_(value.requires_grad)
            new._is_param = True  # what nn.Parameter() does with a tensor of another class, without an operation for each
        return new  # type: ignore[no-any-return]
