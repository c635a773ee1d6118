from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import IDLE, PAGE, PASSES, Pages, alone, assert_as_good_as_eager, attend, branches, cache, random_pass
from shipped import NEWEST, shipped
from ttpa_kernels.configs import PAGED_ATTENTION_SPLIT
from ttpa_kernels.paged_attention import decode, items, kernel
from ttpa_kernels.paged_attention.op import (
    DecodeLayout,
    Segment,
    _attend,
    paged_attention,
    paged_layout,
    store_paged_,
)

pytestmark = pytest.mark.triton
FULL, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def short_ranges():
    """Ranges of 32 keys, so that short sequences are split and merged as long ones are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (items, decode):
            patch.setattr(module, "PAGED_ATTENTION_SPLIT", 32)
        yield


@pytest.mark.parametrize("name", PASSES)
def test_equals_a_softmax_over_the_gathered_keys(name, device, poisoned):
    """Memory that was never written to holds NaN, that of the cache as that of the partial results."""
    tensors = cache(PASSES[name], N=2, G=1, device=device)
    assert_as_good_as_eager(attend(PASSES[name], *tensors, engine="triton"), PASSES[name], *tensors)


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_any_pass(seed):
    segments = random_pass(seed, longest=40)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = cache(segments, N=2, G=1, seed=seed, device=device)
    assert_as_good_as_eager(attend(segments, *tensors, engine="triton"), segments, *tensors)


def test_the_shipped_ranges(device, poisoned, monkeypatch):
    """Behind 256 shared keys, and over 256 of its own, a row has partial results."""
    monkeypatch.setattr(items, "PAGED_ATTENTION_SPLIT", PAGED_ATTENTION_SPLIT)
    segments = branches(Pages(0), 300, (3, 1), (290, 1), (0, 2))
    tensors = cache(segments, N=2, G=1, device=device)
    layout = paged_layout(segments, page_size=PAGE, device=device, engine="triton")
    assert layout.pack.parts_T.tolist() == [3, 4, 3, 3]
    assert_as_good_as_eager(paged_attention(*tensors, layout), segments, *tensors)


@pytest.mark.parametrize(
    ("N", "G", "dtype"),
    [(1, 1, FULL), (2, 2, HALF), (7, 1, FULL), (16, 1, HALF), (16, 2, FULL), (3, 1, torch.float16)],
)
def test_heads_and_dtypes(N, G, dtype, device, poisoned):
    segments = branches(Pages(0), 35, (0, 1), (5, 3))
    tensors = cache(segments, N=N, G=G, dtype=dtype, device=device)
    assert_as_good_as_eager(attend(segments, *tensors, engine="triton"), segments, *tensors)


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("D", [8, 32, 64, 80, 96, 128, 256])
def test_widths(D, dtype, device, poisoned):
    segments = branches(Pages(0), 35, (0, 1), (5, 3))
    tensors = cache(segments, N=2, G=1, D=D, dtype=dtype, device=device)
    assert_as_good_as_eager(attend(segments, *tensors, engine="triton"), segments, *tensors)


def test_more_tokens_than_a_tile_behind_one_prompt(device, poisoned):
    """Tiles of 64 tokens, of which 64 // 3 fit the rows of a program; the more tiles, the longer the ranges."""
    segments = branches(Pages(0), 80, *[(i, 6) for i in range(12)])
    tensors = cache(segments, N=3, G=1, device=device)
    layout = paged_layout(segments, page_size=PAGE, device=device, engine="triton")
    assert layout.pack.wide_IF[:4, :5].tolist() == [
        [0, 64, 0, 0, 64],
        [0, 64, 0, 64, 80],
        [64, 8, 0, 0, 64],
        [64, 8, 0, 64, 80],
    ]
    assert_as_good_as_eager(paged_attention(*tensors, layout), segments, *tensors)


def test_shared_keys_are_read_once_for_all_tokens_of_a_group(device):
    """One item a range of the prompt, and one a branch for what lies behind it."""
    pages = Pages(0)
    segments = [*branches(pages, 64, *[(i, 1) for i in range(5)]), *branches(pages, 40, (0, 1), group=1)]
    work = paged_layout(segments, page_size=PAGE, device=device, engine="triton").pack
    assert work.wide_IF[:, 1:].tolist() == [[5, 0, 0, 32, 0], [5, 0, 32, 64, 1]]
    assert [row[3:] for row in work.narrow_IF.tolist()] == [
        *[[64, 65 + i, 2] for i in range(5)],
        *[[0, 32, 0], [32, 41, 1]],  # a branch without others takes the prompt as its own
    ]
    assert work.parts_T.tolist() == [3] * 5 + [2] and work.num_partials == 17 and work.merge


def test_a_result_of_one_part_is_written_at_once(device):
    work = paged_layout(alone(Pages(0), 0, 30), page_size=PAGE, device=device, engine="triton").pack
    assert work.wide_IF.tolist() == [[0, 30, 0, 0, 30, -1]] and not work.merge and work.num_partials == 0


def test_the_more_tiles_a_prompt_has_the_longer_its_ranges(device):
    """And a tile walks as far as its last token sees."""
    work = paged_layout(alone(Pages(0), 32, 130), page_size=PAGE, device=device, engine="triton").pack
    assert [row[1:5] for row in work.wide_IF.tolist()] == [
        [64, 0, 0, 96],
        *[[64, 0, 0, 96], [64, 0, 96, 160]],
        *[[2, 0, 0, 96], [2, 0, 96, 162]],
    ]


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "a slice of something wider": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "columns apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "every other slot": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, device):
    segments = PASSES["branches behind a prompt"]
    tensors = cache(segments, N=2, G=1, device=device)
    want = attend(segments, *tensors, engine="triton")
    assert torch.equal(attend(segments, *map(LAYOUTS[layout], tensors), engine="triton"), want)


def test_a_scale_of_ones_own(device):
    segments = PASSES["branches behind a prompt"]
    tensors = cache(segments, N=2, G=1, device=device)
    got = attend(segments, *tensors, engine="triton", scale=0.9)
    assert_as_good_as_eager(got, segments, *tensors, scale=0.9)


@pytest.mark.parametrize(("dtype", "size"), [(FULL, 20), (HALF, 300)])
def test_huge_and_equal_scores(dtype, size, device):
    segments = PASSES["branches behind a prompt"]
    query, key, value = cache(segments, N=2, G=1, dtype=dtype, device=device)
    key[:, 3::2] = key[:, 2:-1:2]
    key[0, 0], query = 0.1, query * size
    tensors = query, key, value.nan_to_num(0.0)
    assert_as_good_as_eager(attend(segments, *tensors, engine="triton"), segments, *tensors)


def test_a_tree_gets_the_same_bits_whatever_else_is_in_the_pass(device):
    pages = Pages(0)
    tree, other = (branches(pages, 70, (3, 1), (40, 1), (0, 2), group=group) for group in (0, 1))
    query, key, value = cache(tree + other, N=2, G=1, device=device)
    both = attend(tree + other, query, key, value, engine="triton")
    assert torch.equal(attend(tree, query[:, :, :4], key, value, engine="triton"), both[:, :4])
    assert torch.equal(attend(other, query[:, :, 4:], key, value, engine="triton"), both[:, 4:])


def stepped(segment: Segment | None, steps: int) -> Segment:
    return IDLE if segment is None else segment._replace(start=segment.start + steps)


def decode_steps(layout: DecodeLayout, rows: list[Segment | None], steps: int, device) -> None:
    """Load rows, then attend and advance; what comes out is that of a pass over the rows as they are by then."""
    busy = [i for i, row in enumerate(rows) if row is not None]
    last = [stepped(row, steps) for row in rows]
    _, key, value = cache(last, N=2, G=1, device=device)
    layout.load(rows)
    for step in range(steps):
        now = [stepped(row, step) for row in rows]
        query = torch.randn(1, 2, len(rows), 16, device=device)
        assert layout.position_B.tolist() == [row.start for row in now]
        store_paged_(key, value, *torch.randn(2, 1, 1, len(rows), 16, device=device), layout.layout)
        out = paged_attention(query, key, value, layout.layout)
        assert not out[:, [i for i in range(len(rows)) if i not in busy]].any()
        assert_as_good_as_eager(
            out[:, busy].contiguous(), [now[i] for i in busy], query[:, :, busy].contiguous(), key, value
        )
        plain = paged_layout(now, page_size=PAGE, device=device, engine="triton")
        assert torch.equal(layout.layout.slot_T, plain.slot_T)
        layout.advance_()


def test_rows_move_on_in_the_buffers_of_a_decode_layout(device, poisoned):
    """Over the ends of pages and of ranges, with pages reserved ahead, and again with other rows."""
    layout = DecodeLayout(rows=5, max_positions=150, page_size=PAGE, device=device)
    tensors = [x.data_ptr() for x in layout.layout.pack if isinstance(x, torch.Tensor)]
    pages = Pages(0)
    tree = branches(pages, 70, (24, 8), (1, 4), (0, 70))
    (single,) = alone(pages, 30, 6)
    tree, single = [row._replace(count=1) for row in tree], single._replace(count=1)
    decode_steps(layout, [tree[0], None, single, tree[1], tree[2]], 4, device)
    decode_steps(layout, [None, tree[2], None, None, tree[0]], 2, device)
    layout.load([None] * 5)
    layout.advance_()
    assert not layout.layout.slot_T.any() and not layout.position_B.any()
    assert not paged_attention(*cache(tree, N=2, G=1, T=5, device=device), layout.layout).any()
    assert [x.data_ptr() for x in layout.layout.pack if isinstance(x, torch.Tensor)] == tensors


def test_the_result_of_a_decode_layout_is_that_of_a_pass(device):
    """To the bit, where the rows have no pages to spare."""
    rows = branches(Pages(0), 70, (3, 1), (40, 1), (0, 1))
    query, key, value = cache(rows, N=2, G=1, device=device)
    layout = DecodeLayout(rows=3, max_positions=128, page_size=PAGE, device=device)
    layout.load(rows)
    want = attend(rows, query, key, value, engine="triton")
    assert torch.equal(paged_attention(query, key, value, layout.layout), want)


def test_behind_its_last_page_a_row_stores_into_page_0(device):
    layout = DecodeLayout(rows=2, max_positions=2 * PAGE, page_size=PAGE, device=device)
    layout.load([Segment([3], 14, 1, 0, 0), Segment([1, 2], 30, 1, 0, 0)])
    slots = [layout.layout.slot_T.tolist()]
    for _ in range(3):
        layout.advance_()
        slots.append(layout.layout.slot_T.tolist())
    assert slots == [[62, 46], [63, 47], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([None], "1 segments for 2 rows"),
        ([None, Segment([1], 3, 2, 0, 0)], "row 1: start is 3 and count is 2"),
        ([Segment([1, 2, 3], 32, 1, 0, 0), None], "row 0: .* below 32"),
        ([None, Segment([1], 16, 1, 0, 0)], "1 pages of 16 do not hold 17 positions"),
    ],
)
def test_rows_that_do_not_fit(rows, message, device):
    with pytest.raises(ValueError, match=message):
        DecodeLayout(rows=2, max_positions=32, page_size=PAGE, device=device).load(rows)


def test_what_the_kernels_do_not_take(device):
    segments = [Segment([1], 3, 1, 0, 0)]
    layout = paged_layout(segments, page_size=PAGE, device=device, engine="triton")
    with pytest.raises(TypeError, match=r"torch.float64.*engine='torch'"):
        paged_attention(*cache(segments, dtype=torch.float64, device=device), layout)
    for sizes in ({"N": 17, "G": 1}, {"D": 320}):
        with pytest.raises(ValueError, match="at most 16, or make the layout for engine='torch'"):
            paged_attention(*cache(segments, device=device, **sizes), layout)
    with pytest.raises(ValueError, match="multiples of 16"):
        paged_layout(segments, page_size=8, device=device, engine="triton")


def test_the_operator_is_well_behaved(device):
    segments = branches(Pages(0), 35, (0, 1), (5, 1))
    tensors = cache(segments, N=2, G=1, fill=0.0, device=device)
    layout = paged_layout(segments, page_size=PAGE, device=device, engine="triton")
    torch.library.opcheck(_attend, (*tensors, *layout.pack, PAGE, 0.25))


@pytest.mark.ahead
def test_shipped_kernels_compile_without_spills():
    for line in shipped("paged_attention "):
        assert line["stack"] == 0, line
        if "one token bf16" in line["name"]:
            assert line["matrix"] == "mma.sync", line  # the others take 64 rows at least
        elif "several tokens bf16" in line["name"]:
            assert line["matrix"] == NEWEST[line["architecture"]], line


def test_what_ships():
    """Every width of tiles, for half precision and fp32."""
    for architecture in (80, 90, 100):
        names = [variant.name for variant in kernel.variants(architecture)]
        assert len(set(names)) == len(names)
        for dtype in ("bf16", "fp32"):
            for D in (64, 128, 256):
                for of in ("one token", "several tokens"):
                    assert f"paged_attention {of} {dtype} D{D}" in names


def long_pass() -> list[Segment]:
    pages = Pages(0, longest_run=50)
    trees = [row for group in range(4) for row in branches(pages, 1700, *[(9 * i, 1) for i in range(12)], group=group)]
    drafts = branches(pages, 900, (30, 20), (3, 33), (250, 1), group=9)
    return [*trees, *drafts, *alone(pages, 0, 1000), *alone(pages, 700, 300), IDLE]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("N", "G", "D"), [(8, 2, 64), (14, 2, 64), (16, 1, 80), (32, 8, 128), (4, 4, 256)])
def test_both_engines_agree_on_a_gpu(N, G, D, dtype, monkeypatch):
    for module in (items, decode):
        monkeypatch.setattr(module, "PAGED_ATTENTION_SPLIT", PAGED_ATTENTION_SPLIT)
    segments = long_pass()
    tensors = cache(segments, N=N, G=G, D=D, dtype=dtype, device="cuda")
    want = attend(segments, *(x.double() for x in tensors), engine="torch")
    got, eager = (attend(segments, *tensors, engine=engine).double() for engine in ("triton", "torch"))
    assert (got - want).norm() <= 1.5 * (eager - want).norm() + 1e-3 * want.norm()


@pytest.mark.gpu
def test_a_captured_graph_follows_its_layout():
    """Loaded and advanced between replays, without a new capture, and loaded again at once."""
    layout = DecodeLayout(rows=4, max_positions=600, page_size=PAGE, device="cuda")
    pages = Pages(0)
    tree = [row._replace(count=1) for row in branches(pages, 400, (0, 40), (17, 40), (50, 40))]
    _, key, value = cache([row._replace(start=row.start + 40) for row in tree], N=8, G=2, D=64, device="cuda")
    query = torch.randn(1, 8, 4, 64, device="cuda")

    def step() -> torch.Tensor:
        out = paged_attention(query, key, value, layout.layout)
        layout.advance_()
        return out

    layout.load([*tree, None])
    step()  # compile first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for rows in ([*tree, None], [None, tree[2], None, tree[0]]):
        layout.load([None] * 4)
        layout.load(rows)
        for steps in range(3):
            graph.replay()
            now = [stepped(row, steps) for row in rows]
            busy = [i for i, row in enumerate(rows) if row is not None]
            want = attend(now, query, key, value, engine="torch")
            torch.testing.assert_close(out[:, busy], want[:, busy], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_on_a_gpu():
    """A cache of 2^31 numbers a head and more; keys and values lie in the same memory."""
    far = 2**31 // (64 * PAGE) + 7
    segments = [Segment([far, 1, far + 1], 40, 1, 0, 0)]
    cache_GSD = torch.empty(1, (far + 2) * PAGE, 64, dtype=HALF, device="cuda")
    for page in (1, far, far + 1):
        cache_GSD[:, page * PAGE : (page + 1) * PAGE].normal_()
    query = torch.randn(1, 4, 1, 64, dtype=HALF, device="cuda")
    got = attend(segments, query, cache_GSD, cache_GSD, engine="triton")
    assert_as_good_as_eager(got, segments, query, cache_GSD, cache_GSD)
