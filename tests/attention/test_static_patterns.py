"""Static patterns equal slow definitions of their rules on any grid, and have the densities that are published."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.attention import BlockMap, TokenGrid, pattern, pattern_info, pattern_names
from dit.attention.patterns.lvsa import anchor_interval
from dit.attention.patterns.radial import decay_for_density
from dit.attention.patterns.sparse_videogen import band_frames
from tests.attention.grids import Place, grids, slow_mask

BLOCKS = st.integers(1, 9)
PROPERTY = settings(deadline=None, max_examples=30)


def raster(grid: TokenGrid, place: Place) -> int:
    return (place[0] * grid.height + place[1]) * grid.width + place[2]


def of_frame(grid: TokenGrid, place: Place) -> int:
    return place[1] * grid.width + place[2]


def check(made: BlockMap, expected: Tensor) -> None:
    assert torch.equal(made.to_mask(), expected)
    assert made.token_density() == pytest.approx(float(expected.double().mean()))


def of_blocks(grid: TokenGrid, visits: Tensor, block: int) -> Tensor:
    """Spread the visits of blocks in raster order to their tokens."""
    return slow_mask(grid, lambda query, key: bool(visits[raster(grid, query) // block, raster(grid, key) // block]))


@PROPERTY
@given(grid=grids(), share=st.sampled_from([0.0, 0.1, 0.3, 0.7, 2.0]), block=BLOCKS)
def test_in_frame_band(grid: TokenGrid, share: float, block: int) -> None:
    reach = int(grid.height * grid.width * share) // 2
    expected = slow_mask(grid, lambda query, key: abs(of_frame(grid, query) - of_frame(grid, key)) <= reach)
    check(pattern("in_frame_band", grid, share=share, block=block), expected)


@PROPERTY
@given(
    grid=grids(),
    density=st.floats(0.05, 1.0),
    sink=st.booleans(),
    temporal=st.booleans(),
    block=BLOCKS,
)
def test_bands_of_sparse_videogen(grid: TokenGrid, density: float, sink: bool, temporal: bool, block: int) -> None:
    name = "svg_temporal" if temporal else "svg_spatial"
    frame = grid.height * grid.width
    if density <= 2 * grid.exact_length / grid.length:
        with pytest.raises(ValueError, match="exact tokens alone"):
            pattern(name, grid, density=density, sink=sink, block=block)
        return
    tokens = band_frames(grid, density) * frame  # half the width of the band

    def place(one: Place) -> int:
        return of_frame(grid, one) * grid.frames + one[0] if temporal else raster(grid, one)

    def allowed(query: Place, key: Place) -> bool:
        distance = abs(place(query) - place(key))
        if sink:
            blocks = max(1, -int(-tokens / block // 1))
            return distance <= blocks * block or place(key) < frame
        return distance < max(1, int(tokens / block)) * block

    check(pattern(name, grid, density=density, sink=sink, block=block), slow_mask(grid, allowed))


@PROPERTY
@given(
    grid=grids(),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.5]),
    frames=st.none() | st.integers(0, 3),
    block=BLOCKS,
)
def test_diagonals_of_sparse_vdit(grid: TokenGrid, share: float, frames: int | None, block: int) -> None:
    frame, length = grid.height * grid.width, grid.visual_length
    reach = int(share * frame) // 2
    count = -(-length // block)
    for name, most in (("diagonal", 0), ("multi_diagonal", grid.frames if frames is None else frames)):
        visits = torch.zeros(count, count, dtype=torch.bool)
        for i in range(length):
            for j in range(length):
                if any(abs(i - j - k * frame) <= reach for k in range(-most, most + 1)):
                    visits[i // block, j // block] = True
        params: dict[str, Any] = {} if name == "diagonal" else {"frames": frames}
        check(pattern(name, grid, share=share, block=block, **params), of_blocks(grid, visits, block))


@PROPERTY
@given(grid=grids(), data=st.data(), block=BLOCKS)
def test_vertical_stripe(grid: TokenGrid, data: st.DataObject, block: int) -> None:
    columns = data.draw(st.lists(st.integers(0, grid.visual_length - 1), min_size=1, max_size=3))
    blocks = {column // block for column in columns}

    def allowed(query: Place, key: Place) -> bool:
        own, other = raster(grid, query) // block, raster(grid, key) // block
        return other == own or other in blocks

    check(pattern("vertical_stripe", grid, columns=columns, block=block), slow_mask(grid, allowed))
    even = pattern("vertical_stripe", grid, share=0.3, block=block).visits[0, 0]
    count = -(-grid.visual_length // block)
    assert int(even[:count, :count].all(0).sum()) == max(round(0.3 * count), 1)


@PROPERTY
@given(grid=grids(), data=st.data())
def test_sliding_tile(grid: TokenGrid, data: st.DataObject) -> None:
    tile = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    window = data.draw(st.tuples(*[st.integers(1, 7)] * 3))  # larger than the axis at times

    def near(x: int, y: int, length: int, side: int, width: int) -> bool:
        count = -(-length // side)
        width = min(width, count)
        starts = range(max(count - (width // 2 * 2 + 1), 0) + 1)  # windows of an odd number of tiles within the axis
        start = min(starts, key=lambda one: abs(one - (x // side - width // 2)))
        return y // side in range(start, start + width // 2 * 2 + 1)

    def allowed(query: Place, key: Place) -> bool:
        return all(near(*one) for one in zip(query, key, grid.shape, tile, window, strict=True))

    check(pattern("sliding_tile", grid, window=window, tile=tile), slow_mask(grid, allowed))


def radial_visits(grid: TokenGrid, decay: float, sink: bool, block: int) -> Tensor:
    """Follow the authors' steps: each pair of frames as a mask of tokens, placed, cut into blocks, and shrunk."""
    frame = grid.height * grid.width
    count, span = -(-grid.visual_length // block), -(-frame // block)
    visits = torch.eye(count, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            distance, decayed = abs(i - j), 2 ** frame.bit_length() / 2 ** abs(i - j).bit_length()
            width = frame if distance <= 1 else max(decayed * decay, block)
            kept = decayed >= block or distance % int(block / decayed) == 0
            pairs = torch.zeros((span + 1) * block, (span + 1) * block, dtype=torch.bool)
            for row in range(frame):
                for column in range(frame):
                    if (sink and j == 0) or (kept and abs(row - column) <= width):
                        pairs[i * frame % block + row, j * frame % block + column] = True
            for a in range(span):
                for b in range(span):
                    rows = pairs[a * block : (a + 1) * block, b * block : (b + 1) * block].sum(0)
                    if (rows > block / 3).sum() > 0.6 * (rows > 0).sum():
                        visits[i * frame // block + a, j * frame // block + b] = True
    if grid.visual_length % block:
        visits[-1] = visits[:, -1] = True
    return visits


@settings(deadline=None, max_examples=15)
@given(grid=grids(), decay=st.sampled_from([0.0, 0.2, 0.5, 1.0]), sink=st.booleans(), block=st.integers(1, 12))
def test_radial(grid: TokenGrid, decay: float, sink: bool, block: int) -> None:
    made = pattern("radial", grid, decay=decay, sink=sink, block=block)
    block = min(block, grid.height * grid.width)
    check(made, of_blocks(grid, radial_visits(grid, decay, sink, block), block))


@PROPERTY
@given(
    grid=grids(8),
    window=st.integers(0, 3),
    first=st.integers(0, 2),
    interval=st.integers(1, 9),
    offset=st.integers(0, 9),
    block=BLOCKS,
)
def test_lvsa(grid: TokenGrid, window: int, first: int, interval: int, offset: int, block: int) -> None:
    frames = grid.frames
    anchors = {frame for frame in range(frames) if frame < first}
    anchors |= {(offset + index * interval) % frames for index in range(-(-frames // interval))}

    def window_of(frame: int) -> set[int]:
        if window == 0:
            return set()
        inside = min(2 * window + 1, frames)
        start = min(max(frame - window, 0), frames - inside)
        seen, left = list(range(start, start + inside)), True
        while len(set(seen) - anchors) < min(2 * window + 1, frames - len(anchors)):
            seen = [seen[0] - 1, *seen] if left else [*seen, seen[-1] + 1]
            seen, left = [one for one in seen if 0 <= one < frames], not left
        return set(seen)

    expected = slow_mask(grid, lambda query, key: key[0] in anchors or key[0] in window_of(query[0]))
    made = pattern("lvsa", grid, window=window, first=first, interval=interval, offset=offset, block=block)
    check(made, expected)


def test_lvsa_takes_further_anchors() -> None:
    grid = TokenGrid(9, 2, 2)
    seen = pattern("lvsa", grid, window=1, first=1, interval=9, anchors=(5,)).to_mask()[0, 0]
    assert seen[:, 20:24].all()


def test_anchors_of_lvsa_follow_a_step_that_is_known() -> None:
    grid = TokenGrid(9, 2, 2)
    at = {step: pattern("lvsa", grid, window=0, interval=4, offset="step", step=step).to_mask() for step in (2, 11)}
    assert torch.equal(at[2], pattern("lvsa", grid, window=0, interval=4, offset=2).to_mask())
    assert torch.equal(at[2], at[11]), "they repeat after as many steps as there are frames"
    assert pattern_info("lvsa").period_of(grid, {"offset": "step"}) == 9
    assert pattern_info("lvsa").period_of(grid, {"offset": 3}) == 1
    assert pattern_info("radial").period_of(grid, {}) == 1
    with pytest.raises(ValueError, match="offset is 'step' and step None"):
        pattern("lvsa", grid, offset="step")
    with pytest.raises(ValueError, match="offset is 'last'"):
        pattern("lvsa", grid, offset="last", step=1)


@PROPERTY
@given(grid=grids(4), data=st.data(), block=BLOCKS)
def test_paro(grid: TokenGrid, data: st.DataObject, block: int) -> None:
    axes = data.draw(st.lists(st.sampled_from(["thw", "twh", "htw", "hwt", "wth", "wht"]), min_size=1, max_size=3))
    count = -(-grid.visual_length // block)
    masks = torch.rand(len(axes), count, count, generator=torch.Generator().manual_seed(data.draw(BLOCKS))) < 0.4
    made = pattern("paro", grid, axes=axes, masks=masks, block=block)
    mask = made.to_mask().expand(1, len(axes), -1, -1)
    for head, order in enumerate(axes):
        sizes = [grid.shape["thw".index(axis)] for axis in order]

        def position(place: Place, order: str = order, sizes: list[int] = sizes) -> int:
            first, second, third = (place["thw".index(axis)] for axis in order)
            return (first * sizes[1] + second) * sizes[2] + third

        kept = masks[head] | torch.eye(count, dtype=torch.bool)

        def allowed(query: Place, key: Place, kept: Tensor = kept, at: Any = position) -> bool:
            return bool(kept[at(query) // block, at(key) // block])

        assert torch.equal(mask[:, head : head + 1], slow_mask(grid, allowed))


def test_paro_takes_one_order_or_one_mask_for_all_heads() -> None:
    grid = TokenGrid(2, 3, 4)
    masks = torch.zeros(5, 6, 6, dtype=torch.bool)
    assert pattern("paro", grid, axes="hwt", masks=masks, block=4).visits.shape == (1, 5, 6, 6)
    assert pattern("paro", grid, axes=["hwt", "wth"], masks=masks[0], block=4).to_mask().shape == (1, 2, 24, 24)
    with pytest.raises(ValueError, match="expected bool"):
        pattern("paro", grid, axes=["hwt", "wth"], masks=masks, block=4)


HUNYUAN, WAN = TokenGrid(30, 48, 80), TokenGrid(18, 48, 80)


@pytest.mark.parametrize(
    ("name", "grid", "params", "density"),
    [
        ("radial", HUNYUAN, {"decay": 0.95}, 0.2746),
        ("radial", WAN, {"decay": 0.2, "sink": True}, 0.2871),
        ("radial", TokenGrid(128, 48, 80), {"decay": 1.0}, 0.1150),
        ("sliding_tile", HUNYUAN, {"window": (3, 3, 3)}, 0.09),
        ("sliding_tile", HUNYUAN, {"window": (1, 6, 10)}, 0.20),
        ("sliding_tile", HUNYUAN, {"window": (5, 3, 3)}, 0.15),
        ("sliding_tile", HUNYUAN, {"window": (3, 3, 5)}, 0.15),
        ("sliding_tile", HUNYUAN, {"window": (5, 1, 10)}, 1 / 6),
        ("sliding_tile", HUNYUAN, {"window": (5, 6, 1)}, 0.10),
        ("sliding_tile", HUNYUAN, {"window": (3, 5, 5)}, 0.25),
        ("sliding_tile", HUNYUAN, {"window": (1, 5, 5)}, 1 / 12),
        *(
            ("lvsa", TokenGrid(frames, 2, 3), {"window": 4, "reference": reference}, density)
            for reference, frames, density in [
                *((33, 49, 0.694), (33, 65, 0.477), (33, 81, 0.444), (33, 121, 0.281)),
                *((21, 41, 0.561), (21, 49, 0.449), (21, 81, 0.259), (21, 121, 0.182)),
            ]
        ),
    ],
)
def test_published_densities(name: str, grid: TokenGrid, params: dict[str, Any], density: float) -> None:
    digits = 3 if name == "lvsa" else 4
    assert round(pattern(name, grid, **params).density(), digits) == round(density, digits)


def test_anchor_intervals_of_lvsa() -> None:
    assert [anchor_interval(frames, 4, 1, 33) for frames in (33, 49, 65, 81, 121)] == [1, 2, 3, 3, 5]
    assert [anchor_interval(frames, 4, 1, 21) for frames in (21, 41, 49, 81, 121)] == [1, 3, 4, 7, 10]


def test_in_frame_band_of_cogvideox() -> None:
    """43 of 1350 keys of a frame are 3.185 %; the band is cut off at the ends of a frame, so all tokens see 3.160 %."""
    grid = TokenGrid(13, 30, 45, 226, "first")
    made = pattern("in_frame_band", grid)
    rows = pattern("in_frame_band", TokenGrid(1, 30, 45)).to_mask()[0, 0].sum(-1).double()  # (1350,), keys of a frame
    assert rows[21:-21].unique().tolist() == [43]
    assert rows[0] == 22
    assert float(rows.mean() / 1350) == pytest.approx((1350 * 43 - 21 * 22) / 1350**2)
    assert made.token_density() == pytest.approx(0.05606589574)  # of the authors' mask, with the text


def test_widths_of_sparse_videogen() -> None:
    assert band_frames(TokenGrid(33, 45, 80, 256, "last"), 0.25) == pytest.approx(4.35, abs=0.005)
    assert band_frames(TokenGrid(21, 45, 80), 0.3) == pytest.approx(3.43, abs=0.005)
    made = pattern("svg_temporal", TokenGrid(33, 45, 80, 256, "last"), density=0.25)
    assert 0.247 < made.token_density() <= made.density() <= 0.25


@pytest.mark.parametrize("density", [0.2, 0.3])
def test_radial_finds_the_decay_of_a_density(density: float) -> None:
    assert pattern("radial", HUNYUAN, density=density).density() == pytest.approx(density, rel=0.01)
    with pytest.raises(ValueError, match=r"radial attention visits 0\.1860 to 1\.0000"):
        decay_for_density(HUNYUAN, 0.01)
    with pytest.raises(ValueError, match="not both"):
        pattern("radial", HUNYUAN, decay=1.0, density=0.2)


STATIC = [name for name in pattern_names() if not pattern_info(name).online]


@pytest.mark.parametrize("name", [name for name in STATIC if name not in ("neighborhood", "skip")])
@pytest.mark.parametrize("grid", [TokenGrid(1, 7, 9), TokenGrid(5, 3, 2, 4, "last"), TokenGrid(1, 1, 1)])
def test_every_token_sees_a_visual_one(name: str, grid: TokenGrid) -> None:
    params: dict[str, Any] = {"density": 0.9} if name.startswith("svg") else {}
    visual = slice(grid.visual_start, grid.visual_start + grid.visual_length)
    mask = pattern(name, grid, **params).to_mask()[0, 0]
    assert mask[visual, visual].any(-1).all()
    assert mask[:, grid.visual_length :].all()
    assert mask[grid.visual_length :].all()
