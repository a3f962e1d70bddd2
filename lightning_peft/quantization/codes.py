"""Numbers to codes and back, in plain torch operations: NF4, FP4, the 8-bit map of their scales, and int8.

Equal to bitsandbytes 0.50 on the CPU bit for bit: codes, scales and what they stand for. NF4 and double quantization: QLoRA,
Dettmers et al. 2023, arXiv 2305.14314, section 3. The 8-bit map: Dettmers 2015, arXiv 1511.04561. int8: LLM.int8, Dettmers et al.
2022, arXiv 2208.07339, with a scale per row of the weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

#: The 16 values of NF4, ascending: quantiles of the normal distribution with an exact 0 (arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by their three bits: two of exponent, one of mantissa
#: The 16 values of FP4 by bit pattern; the first bit is the sign, and 0 has two codes.
FP4 = tuple(sign * magnitude for sign in (1, -1) for magnitude in _FP4_MAGNITUDES)

SCALES_PER_SCALE = 256  # double quantization: scales that share a scale of their own
_GRID = 65535
_CELLS = 1024
_CHUNK = 1 << 20  # weights quantized at a time, so that a large matrix is never copied whole; a power of two, as block sizes are


@functools.cache
def codebook(scheme: str, device: torch.device) -> Tensor:
    """Return the 16 values of ``nf4`` or ``fp4`` by code, fp32, the largest 1. Not to be changed."""
    values = torch.tensor(NF4 if scheme == "nf4" else FP4, dtype=torch.float32, device=device)
    return values / values.abs().max()


@functools.cache
def _rounding(scheme: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`_nearest` needs: per cell the code below its boundary, the boundary (or inf), and the code above."""
    values = codebook(scheme, device)
    order = values.argsort(stable=True)
    boundaries = _midpoints(values[order])
    places = _cell(boundaries)  # no two boundaries share a cell
    below = (places[:, None] < torch.arange(_CELLS + 1, device=device)).sum(0)
    boundary = torch.full((_CELLS + 1,), torch.inf, device=device, dtype=torch.float32)
    boundary[places] = boundaries
    codes = order.to(torch.uint8)
    return codes[below], boundary, codes[(below + 1).clamp(max=15)]


def _cell(x: Tensor) -> Tensor:
    return ((x + 1) * (_CELLS // 2)).int()


def _nearest(x: Tensor, scheme: str) -> Tensor:
    """Return the code of the value nearest to each number from -1 to 1, the lower one if two are.

    A number's cell, which never decreases with it, leaves one boundary to compare it with, where torch.bucketize searches.
    """
    below, boundary, above = _rounding(scheme, x.device)
    cell = _cell(x)
    return torch.where(x > boundary.index_select(0, cell), above.index_select(0, cell), below.index_select(0, cell))


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values of the 8-bit dynamic data type, ascending, fp32: few digits where small, more where large.

    For each power of ten from 1e-6 to 1, 1 to 64 values per sign between a tenth of it and it; then 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (exponent - 6)) * _midpoints(edges)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _nearest_in_map(device: torch.device) -> Tensor:
    """Return the code nearest to each of 65536 numbers from -1 to 1: as finely as bitsandbytes tells scales apart on the CPU."""
    grid = -1.0 + (2.0 * torch.arange(_GRID + 1, dtype=torch.float32, device=device)) / _GRID
    return torch.bucketize(grid, _midpoints(dynamic_map(device))).to(torch.uint8)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _scale_(flat: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Multiply ``flat`` (n,) in place by a scale (blocks,) per block; the last block may be short."""
    whole = flat.numel() // block_size
    flat[: whole * block_size].view(whole, block_size).mul_(scales[:whole, None])
    flat[whole * block_size :].mul_(scales[whole:])
    return flat


def _absmax(flat: Tensor, block_size: int) -> Tensor:
    """Return the largest magnitude of each block of ``flat`` (n,)."""
    whole = flat.numel() // block_size
    largest = flat[: whole * block_size].view(whole, block_size).abs().amax(1)
    rest = flat[whole * block_size :]
    return torch.cat([largest, rest.abs().amax(0, keepdim=True)]) if rest.numel() else largest


def quantize_4bit(weight: Tensor, scheme: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a weight.

    Args:
        weight: (out, in), floating point.
        scheme: ``nf4`` or ``fp4``.
        block_size: Weights that share a scale, in row-major order; even.

    Returns:
        Codes uint8 (ceil(n / 2), 1), the first of two in the high four bits, and scales fp32 (ceil(n / block_size),).
    """
    packed, scales = [], []
    for chunk in weight.reshape(-1).split(max(_CHUNK, block_size)):
        flat = chunk.to(torch.float32, copy=True)
        scale = _absmax(flat, block_size)
        tiny = scale.clamp(min=1e-38)  # a block of zeros: 0 / 0 is not a number, and 0 is meant
        whole = flat.numel() // block_size
        # bitsandbytes multiplies by the reciprocal, and divides in a last block that is short.
        rest = flat[whole * block_size :] / tiny[whole:]
        _scale_(flat, 1.0 / tiny, block_size)
        flat[whole * block_size :] = rest
        scale[whole:] = tiny[whole:]
        if flat.numel() % 2:
            flat = F.pad(flat, (0, 1))
        codes = _nearest(flat.nan_to_num_(0.0).clamp_(-1, 1), scheme)  # NaN shows in the scale
        packed.append(codes[::2] << 4 | codes[1::2])
        scales.append(scale)
    return torch.cat(packed)[:, None], torch.cat(scales)


def dequantize_4bit(
    codes: Tensor, scales: Tensor, values: Tensor, *, shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight (out, in) that :func:`quantize_4bit` stored, in ``dtype``.

    Args:
        codes: Packed, of any dtype that holds the bytes.
        scales: fp32 (blocks,).
        values: The codebook (16,).
        shape: (out, in).
        block_size: Weights that share a scale.
        dtype: Multiplied in fp32 and rounded once; in float64 not rounded at all.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).to(exact)  # what each byte stands for
    flat = pairs.index_select(0, codes.view(torch.uint8).view(-1).int()).view(-1)[: shape[0] * shape[1]]
    return _scale_(flat, scales.to(exact), block_size).view(shape).to(dtype)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves (double quantization, arXiv 2305.14314, section 3).

    Args:
        scales: fp32 (blocks,).

    Returns:
        Codes uint8 (blocks,), scales of the scales fp32 (ceil(blocks / 256),), and the mean that was taken off, fp32 ().
    """
    offset = scales.mean()
    centred = scales - offset
    outer = _absmax(centred, SCALES_PER_SCALE)
    # Where a block's scales are all equal, 0 · (1 / 0): bitsandbytes gives them code 0, and times 0 any code will do.
    normed = _scale_(centred, 1.0 / outer, SCALES_PER_SCALE).nan_to_num_(-1.0).clamp_(-1, 1)
    place = ((normed + 1.0).double() * (0.5 * _GRID) + 0.5).float()  # in double: the CPU multiplies and adds with one rounding
    return _nearest_in_map(scales.device)[place.int()], outer, offset


def dequantize_scales(codes: Tensor, outer: Tensor, offset: Tensor, values: Tensor) -> Tensor:
    """Return the scales fp32 (blocks,) that :func:`quantize_scales` stored; ``values`` is the 8-bit map (256,)."""
    return _scale_(values.index_select(0, codes.int()), outer, SCALES_PER_SCALE) + offset


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 (out, in) and scales fp32 (out,), the largest magnitude of each row; the weight is read as fp16."""
    codes, scales = [], []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        half = rows.half()
        scale = half.abs().amax(1).float()
        # A row of zeros: 0 · (1 / 0) is not a number, and 0 is meant.
        codes.append((half * (127.0 / scale[:, None])).nan_to_num_(0.0).round_().to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def dequantize_int8(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) that :func:`quantize_int8` stored, in ``dtype``."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Codes are exact in every dtype; the product is taken in the factors' dtype and rounded once, without a copy in it.
    return codes.to(dtype).mul_(scales.to(exact)[:, None] * (1.0 / 127.0))
