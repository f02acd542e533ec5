"""The cache of keys and values: exact, small, and strict about the order of calls."""

import pytest
import torch
from torch import Tensor

from dit.attention import attention
from dit.cache import ScaleKVCache
from dit.layers.scales import scale_grids, token_counts
from dit.models.next_scale import SCALES_256, SCALES_512

COUNTS, LAYERS, ROWS, HEADS, WIDTH = (1, 4, 9, 16), 3, 2, 2, 4


def empty() -> ScaleKVCache:
    return ScaleKVCache(COUNTS, LAYERS, ROWS, HEADS, WIDTH)


def parts(scale: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer at a scale."""
    shape = (ROWS, COUNTS[scale], HEADS, WIDTH)
    generator = torch.Generator().manual_seed(scale)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(LAYERS)]


def test_gives_back_what_was_stored() -> None:
    """The plain way: keep everything in lists and join them."""
    cache = empty()
    keys: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    values: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for scale in range(len(COUNTS)):
        for layer, (key, value) in enumerate(parts(scale)):
            keys[layer].append(key)
            values[layer].append(value)
            found = cache.append(layer, scale, key, value)
            assert torch.equal(found[0], torch.cat(keys[layer], dim=1))
            assert torch.equal(found[1], torch.cat(values[layer], dim=1))


def test_the_last_scale_is_never_stored() -> None:
    cache, token = empty(), 2 * ROWS * HEADS * WIDTH * 4
    lengths = []
    for scale in range(len(COUNTS)):
        for layer, pair in enumerate(parts(scale)):
            cache.append(layer, scale, *pair)
        lengths.append(cache.length(0))
    assert lengths == [1, 5, 14, 0]
    assert cache.nbytes == 0
    assert cache.peak_nbytes == (LAYERS * 14 + 2) * token + 30 * token // HEADS  # a row of one head


@pytest.mark.parametrize(
    ("scales", "depth", "stored", "peak"),
    [(SCALES_256, 16, 0.416, 0.418), (SCALES_256, 30, 0.416, 0.416), (SCALES_512, 36, 0.362, 0.362)],
)
def test_memory_against_the_released_code_in_half_precision(
    scales: tuple[int, ...], depth: int, stored: float, peak: float
) -> None:
    """There keys are float32, values bfloat16, and the last scale is kept; what joining takes there is not counted."""
    counts = token_counts(scale_grids(scales))
    cache = ScaleKVCache(counts, depth, 2, depth, 64, dtype=torch.bfloat16, device="meta")
    released = depth * sum(counts) * 2 * depth * 64 * (4 + 2)
    for scale, count in enumerate(counts[:-1]):
        part = torch.empty(2, count, depth, 64, dtype=torch.bfloat16, device="meta")
        for layer in range(depth):
            cache.append(layer, scale, part, part)
    assert cache.nbytes / released == pytest.approx(stored, abs=1e-3)
    assert cache.peak_nbytes / released == pytest.approx(peak, abs=1e-3)


def test_attending_equals_appending() -> None:
    """Also where the first layer's heads are joined one by one: the same rows, the same state afterwards."""
    one, other = empty(), empty()
    for scale in range(len(COUNTS)):
        for layer, (key, value) in enumerate(parts(scale)):
            seen = one.append(layer, scale, key, value)
            expected = attention(key, *seen)
            one.evict(layer, key, *seen)
            assert torch.allclose(other.attend(layer, scale, key, key, value, attention), expected, atol=1e-6)
            assert other.length(layer) == one.length(layer)
    assert one.nbytes == other.nbytes == 0
    with pytest.raises(ValueError, match="reset"):
        other.attend(0, len(COUNTS), *parts(0)[0], parts(0)[0][0], attention)


def test_select_moves_rows() -> None:
    cache = empty()
    for scale in (0, 1):
        for layer, pair in enumerate(parts(scale)):
            cache.append(layer, scale, *pair)
    before = cache.nbytes
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    assert (cache.batch_size, cache.nbytes) == (3, before * 3 // 2)
    key, value = (x[rows] for x in parts(2)[0])
    keys, _ = cache.append(0, 2, key, value)
    expected = torch.cat([parts(scale)[0][0] for scale in (0, 1, 2)], dim=1)[rows]
    assert torch.equal(keys, expected)
    with pytest.raises(ValueError, match="at least one"):
        cache.select(torch.tensor([], dtype=torch.long))


def test_reset_starts_anew() -> None:
    cache = empty()
    for scale in range(len(COUNTS)):
        for layer, pair in enumerate(parts(scale)):
            cache.append(layer, scale, *pair)
    with pytest.raises(ValueError, match="reset"):
        cache.append(0, len(COUNTS), *parts(0)[0])
    cache.reset()
    keys, _ = cache.append(0, 0, *parts(0)[0])
    assert torch.equal(keys, parts(0)[0][0])


def test_calls_out_of_order_are_refused() -> None:
    cache = empty()
    with pytest.raises(ValueError, match="got scale 1"):
        cache.append(0, 1, *parts(1)[0])
    with pytest.raises(ValueError, match="layer 3 is not cached"):
        cache.append(LAYERS, 0, *parts(0)[0])
    with pytest.raises(ValueError, match=r"expected \(B, N, K, E\) \(2, 1, 2, 4\)"):
        cache.append(0, 0, *parts(1)[0])
    for scale in range(len(COUNTS) - 1):
        for layer, pair in enumerate(parts(scale)):
            cache.append(layer, scale, *pair)
    with pytest.raises(ValueError, match="in order"):
        cache.append(1, len(COUNTS) - 1, *parts(len(COUNTS) - 1)[1])


def test_one_scale_is_enough() -> None:
    cache = ScaleKVCache((4,), 2, 1, 1, 2)
    key = torch.randn(1, 4, 1, 2)
    for layer in range(2):
        assert torch.equal(cache.append(layer, 0, key, key)[0], key)


def test_impossible_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="'full'"):
        ScaleKVCache(COUNTS, LAYERS, ROWS, HEADS, WIDTH, policy="half")
    with pytest.raises(ValueError, match="0 rows"):
        ScaleKVCache(COUNTS, LAYERS, 0, HEADS, WIDTH)
    with pytest.raises(ValueError, match="0 scales"):
        ScaleKVCache((), LAYERS, ROWS, HEADS, WIDTH)
