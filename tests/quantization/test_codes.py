"""Codes, scales and what they stand for: by hand, by the papers' numbers, and bit for bit as bitsandbytes makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_peft.quantization import codes
from lightning_peft.quantization.backend import backend_for
from lightning_peft.quantization.config import Quantization

CPU = torch.device("cpu")
# One block, several, a short last one, shorter than a byte, an odd number, rows that no block divides, thousands of blocks.
SHAPES = [(1, 1), (7, 9), (8, 8), (64, 64), (130, 66), (33, 1000), (96, 520), (512, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles some of its functions for the CPU at their first call, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight with rows of different size, the first one 0."""
    return (torch.randn(shape) * torch.linspace(0, 2, shape[0])[:, None]).to(dtype)


def unpacked(packed: Tensor) -> Tensor:
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()


def test_nf4_is_the_quantiles_of_a_normal_distribution() -> None:
    """arXiv 2305.14314, appendix E; the offset is the authors'."""

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count, dtype=torch.float64))[:-1]

    values = torch.cat([-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9)]).sort().values
    torch.testing.assert_close(codes.codebook("nf4", CPU).double(), values / values.max(), rtol=0, atol=2e-7)


def test_packs_the_first_of_two_into_the_high_bits() -> None:
    packed, scales = codes.quantize_4bit(torch.linspace(-1.5, 1.2, 64)[None], "nf4", 64)
    assert scales.tolist() == [1.5]
    assert packed.shape == (32, 1)
    assert packed.flatten()[:8].tolist() == [0, 0, 0, 17, 17, 17, 17, 34]
    assert packed.flatten()[-4:].tolist() == [221, 238, 238, 238]


def test_the_map_of_scales() -> None:
    values = codes.dynamic_map(CPU)
    places = [0, 1, 2, 63, 126, 127, 128, 129, 191, 253, 254, 255]
    expected = [-0.9929687, -0.9789063, -0.9648438, -0.1070313, -5.5e-7, 0, 5.5e-7, 3.25e-6, 0.1070313, 0.9789063, 0.9929687, 1]
    torch.testing.assert_close(values[places], torch.tensor(expected), rtol=1e-6, atol=1e-10)
    assert len(values) == len(values.unique()) == 256


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_takes_the_nearest_value(scheme: str) -> None:
    weight = weights((16, 256))
    packed, scales = codes.quantize_4bit(weight, scheme, 64)
    values = codes.codebook(scheme, CPU)
    scaled = weight.view(-1, 64).double() / scales.clamp(min=1e-38)[:, None]
    chosen = (scaled.flatten() - values[unpacked(packed).int()]).abs()
    nearest = (scaled.flatten()[:, None] - values).abs().amin(1)
    torch.testing.assert_close(chosen, nearest, rtol=0, atol=1e-6)


def test_a_block_never_errs_by_more_than_half_a_gap() -> None:
    weight = weights((64, 96))
    packed, scales = codes.quantize_4bit(weight, "nf4", 64)
    dense = codes.dequantize_4bit(packed, scales, codes.codebook("nf4", CPU), shape=(64, 96), block_size=64, dtype=torch.float32)
    assert ((dense - weight).abs().view(-1, 64) <= 0.1520 * scales[:, None] + 1e-7).all()


@pytest.mark.parametrize("block_size", [32, 64, 128, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_four_bits_equal_bitsandbytes(scheme: str, dtype: torch.dtype, block_size: int) -> None:
    from bitsandbytes import functional

    for shape in SHAPES:
        weight = weights(shape, dtype)
        packed, scales = codes.quantize_4bit(weight, scheme, block_size)
        nested, outer, offset = codes.quantize_scales(scales)
        once = functional.quantize_4bit(weight, blocksize=block_size, quant_type=scheme)
        twice = functional.quantize_4bit(weight, blocksize=block_size, quant_type=scheme, compress_statistics=True)
        assert torch.equal(packed, once[0]), shape
        assert torch.equal(packed, twice[0]), shape
        assert torch.equal(scales, once[1].absmax), shape
        assert torch.equal(nested, twice[1].absmax), shape
        assert torch.equal(outer, twice[1].state2.absmax), shape
        assert torch.equal(offset, twice[1].offset), shape
        theirs = functional.dequantize_blockwise(twice[1].absmax, twice[1].state2) + twice[1].offset
        ours = codes.dequantize_scales(nested, outer, offset, codes.dynamic_map(CPU))
        assert torch.equal(ours, theirs), shape

        values = codes.codebook(scheme, CPU)
        assert torch.equal(values, once[1].code)
        if shape[1] % 16 == 0 and shape[1] % block_size and block_size < 2048:
            continue  # its kernel for AVX512 reads the wrong scales there: test_the_kernel_that_reads_wrong_scales
        for into in DTYPES:
            once[1].dtype = twice[1].dtype = into
            args = {"shape": shape, "block_size": block_size, "dtype": into}
            assert torch.equal(codes.dequantize_4bit(packed, scales, values, **args), functional.dequantize_4bit(*once)), shape
            assert torch.equal(codes.dequantize_4bit(packed, ours, values, **args), functional.dequantize_4bit(*twice)), shape


@pytest.mark.parametrize("count", [1, 5, 255, 256, 257, 100_003])
def test_scales_equal_bitsandbytes(count: int) -> None:
    """Also where all are equal, where most are 0, and where they span many powers of ten."""
    from bitsandbytes import functional

    uniform = torch.rand(count)
    for scales in (uniform, torch.ones(count), (uniform > 0.9).float(), 10 ** (-6 * uniform)):
        theirs, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
        ours, outer, offset = codes.quantize_scales(scales)
        assert torch.equal(ours, theirs)
        assert torch.equal(outer, state.absmax)
        assert offset == scales.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_equals_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    for shape in SHAPES:
        weight = weights(shape, dtype)
        ours, scales = codes.quantize_int8(weight)
        theirs, their_scales, _ = functional.int8_vectorwise_quant(weight.half())
        assert torch.equal(ours, theirs)
        assert torch.equal(scales, their_scales)
        for into in DTYPES:  # as its own forward and backward unpack it
            dense = theirs.to(into, copy=True).mul_(their_scales.unsqueeze(1).mul(1.0 / 127.0))
            assert torch.equal(codes.dequantize_int8(ours, scales, dtype=into), dense)


def test_pieces_of_a_large_matrix_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights((37, 200))
    whole = [*codes.quantize_4bit(weight, "nf4", 64), *codes.quantize_int8(weight)]
    monkeypatch.setattr(codes, "_CHUNK", 512)
    pieces = [*codes.quantize_4bit(weight, "nf4", 64), *codes.quantize_int8(weight)]
    assert all(map(torch.equal, whole, pieces))


def test_float64_is_what_the_codes_stand_for_exactly() -> None:
    weight = weights((8, 64))
    packed, scales = codes.quantize_4bit(weight, "nf4", 64)
    values = codes.codebook("nf4", CPU)
    dense = codes.dequantize_4bit(packed, scales, values, shape=(8, 64), block_size=64, dtype=torch.float64)
    exact = [values[c].item() * scales[i // 64].item() for i, c in enumerate(unpacked(packed).tolist())]
    assert dense.flatten().tolist() == exact


@pytest.mark.parametrize(("scheme", "block_size"), [("nf4", 64), ("nf4", 4096), ("fp4", 64), ("int8", 64)])
def test_expected_error(scheme: str, block_size: int) -> None:
    config = Quantization.parse({"scheme": scheme, "block_size": block_size, "backend": "torch"})
    backend = backend_for(config)
    weight = torch.randn(256, 4096)
    stored = backend.dequantize(backend.linear(weight, None, config))
    assert ((stored - weight).norm() / weight.norm()).item() == pytest.approx(backend.expected_error(config), rel=0.01)


def test_expected_error_of_nf4_is_the_known_one() -> None:
    assert backend_for(Quantization(backend="torch")).expected_error(Quantization()) == pytest.approx(0.092, abs=5e-4)
