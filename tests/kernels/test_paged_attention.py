from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import IDLE, PAGE, PASSES, Pages, alone, assert_as_good_as_eager, attend, branches, cache, random_pass
from torch.nn.functional import scaled_dot_product_attention
from ttpa_kernels.paged_attention import runs
from ttpa_kernels.paged_attention.op import Segment, paged_attention, paged_layout, store_paged_
from ttpa_kernels.paged_attention.reference import paged_attention_reference


def test_the_reference_is_a_softmax_over_the_positions_that_are_seen():
    query, key, value = cache([Segment([2, 1], 17, 2, 0, 0)], N=1, G=1, D=3)
    out = paged_attention_reference(query, key, value, [Segment([2, 1], 17, 2, 0, 0)], page_size=PAGE, scale=0.7)
    for token, seen in enumerate(([*range(32, 48), 16, 17], [*range(32, 48), 16, 17, 18])):
        weight = (0.7 * key[0, seen].double() @ query[0, 0, token].double()).softmax(dim=0)
        torch.testing.assert_close(out[0, token, 0], weight @ value[0, seen].double())


@pytest.mark.parametrize("heads", [(4, 2), (7, 1)])
@pytest.mark.parametrize("name", PASSES)
def test_equals_a_softmax_over_the_gathered_keys(name, heads):
    tensors = cache(PASSES[name], N=heads[0], G=heads[1], D=12)
    assert_as_good_as_eager(attend(PASSES[name], *tensors), PASSES[name], *tensors)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_any_pass(seed):
    """Slots that nothing has been written to hold NaN, and none of it shows."""
    segments = random_pass(seed)
    tensors = cache(segments, seed=seed)
    assert_as_good_as_eager(attend(segments, *tensors), segments, *tensors)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_any_pass_in_small_batches(seed):
    """As a pass of many rows or long ones is cut."""
    segments = random_pass(seed)
    tensors = cache(segments, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PAIRS": 200, "BIAS": 1000, "GATHERED": 20}.items():
            patch.setattr(runs, name, value)
        got = attend(segments, *tensors)
    assert_as_good_as_eager(got, segments, *tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["one prompt", "branches behind a prompt", "prompts behind a shared beginning"])
def test_dtypes(name, dtype):
    tensors = cache(PASSES[name], dtype=dtype)
    assert_as_good_as_eager(attend(PASSES[name], *tensors), PASSES[name], *tensors)


@pytest.mark.parametrize("name", ["one prompt", "branches behind a prompt", "a long draft among short ones"])
def test_a_scale_of_ones_own(name):
    tensors = cache(PASSES[name])
    assert_as_good_as_eager(attend(PASSES[name], *tensors, scale=0.9), PASSES[name], *tensors, scale=0.9)


def test_stored_piece_by_piece_a_sequence_is_attended_to_causally():
    """A prompt, a draft of four tokens and a single one are one causal pass over all of them."""
    pages = [3, 4, 1]
    query, key, value = torch.randn(3, 1, 45, 4, 16).transpose(2, 3).unbind()
    key, value = key[:, ::2], value[:, ::2]
    caches = torch.full((2, 2, 6 * PAGE, 16), torch.nan)
    found = []
    for start, stop in ((0, 40), (40, 44), (44, 45)):
        layout = paged_layout([Segment(pages, start, stop - start, 0, 0)], page_size=PAGE, device="cpu")
        store_paged_(*caches, key[:, :, start:stop], value[:, :, start:stop], layout)
        found.append(paged_attention(query[:, :, start:stop], *caches, layout))
    want = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(torch.cat(found, dim=1), want)
    slots = [page * PAGE + offset for page in pages for offset in range(PAGE)][:45]
    assert torch.equal(caches[0, :, slots], key[0]) and torch.equal(caches[1, :, slots], value[0])
    assert int(caches.isnan().sum()) == 2 * 2 * (6 * PAGE - 45) * 16


def test_rows_without_work_store_into_page_0():
    segments = [IDLE, Segment([2], 3, 1, 0, 0), IDLE]
    layout = paged_layout(segments, page_size=PAGE, device="cpu")
    assert layout.slot_T.tolist() == [0, 2 * PAGE + 3, 0]


def test_what_is_shared_is_read_where_it_stands():
    """Runs of neighbouring pages are views of the cache; only what each branch holds of its own is gathered."""
    prefix = [*range(10, 14), *range(5, 11)]
    tree = [Segment([*prefix, 20 + i], 10 * PAGE + i, 1, 0, 10 * PAGE) for i in range(5)]
    (part,) = paged_layout(tree, page_size=PAGE, device="cpu").pack.parts
    assert [run.keys for run in part.runs] == [slice(10 * PAGE, 14 * PAGE), slice(5 * PAGE, 11 * PAGE)]
    assert part.slot_UW.shape == (5, 5)


def test_what_lies_apart_is_gathered_once_a_group():
    prefix = [*range(2, 22, 2)]
    tree = [Segment([*prefix, 40 + i], 10 * PAGE + i, 1, 0, 10 * PAGE) for i in range(5)]
    (part,) = paged_layout(tree, page_size=PAGE, device="cpu").pack.parts
    (run,) = part.runs
    assert run.keys.tolist() == [page * PAGE + offset for page in prefix for offset in range(PAGE)]


def test_one_row_alone_reads_what_stands_before_it_where_it_stands():
    (part,) = paged_layout([Segment(range(3, 40), 500, 1, 0, 0)], page_size=PAGE, device="cpu").pack.parts
    assert [run.keys for run in part.runs] == [slice(3 * PAGE, 34 * PAGE)]
    assert part.slot_UW.tolist() == [[34 * PAGE + offset for offset in range(5)]]


def test_scores_are_held_in_pieces():
    """300 queries on 1,700 shared keys, as one prompt or many, 64 rows far behind their prompt, a very long prompt."""
    pages = Pages(0, longest_run=100)
    for segments in (
        branches(pages, 1700, (0, 300)),
        branches(pages, 1700, *[(0, 60)] * 5),
        branches(pages, 1700, *[(4000, 1)] * 64),
        alone(pages, 3000, 1500),
    ):
        T = sum(segment.count for segment in segments)
        pack = paged_layout(segments, page_size=PAGE, device="cpu").pack
        assert sum(part.tokens.stop - part.tokens.start for part in pack.parts) == T
        for part in pack.parts:
            if isinstance(part, runs.Together):
                columns = part.num_shared + part.slot_UW.shape[1]
                assert (part.tokens.stop - part.tokens.start) * columns <= runs.PAIRS == 1 << 17
            else:
                assert part.bias_TS.numel() <= runs.BIAS == 1 << 22


def test_a_layout_does_not_look_at_the_lists_again():
    pages = [1, 2]
    segments = [Segment(pages, 20, 1, 0, 0)]
    tensors = cache(segments)
    layout = paged_layout(segments, page_size=PAGE, device="cpu")
    want = paged_attention(*tensors, layout)
    pages[:] = [0, 0]
    assert torch.equal(paged_attention(*tensors, layout), want)


def test_the_caller_may_want_gradients_and_autocast():
    segments = PASSES["drafts of different lengths"]
    query, key, value = cache(segments)
    want = attend(segments, query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(segments, query.requires_grad_(), key, value)
    assert not got.requires_grad and torch.equal(got, want)


GOOD = Segment([1, 2, 3], 40, 1, 0, 32)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "no segments"),
        ([GOOD, GOOD._replace(count=0)], "segment 1: start is 40 and count is 0"),
        ([GOOD._replace(start=-1)], "start is -1"),
        ([GOOD._replace(count=9)], "segment 0: 3 pages of 16 do not hold 49 positions"),
        ([GOOD._replace(shared=20)], "shared is 20: give a multiple of 16"),
        ([GOOD._replace(shared=48)], "from 0 to 40"),
        ([GOOD, GOOD._replace(group=1, pages=[1, 4, 5]), GOOD._replace(pages=[1, 4, 5])], "segment 2: .* segment 0"),
    ],
)
def test_segments_that_cannot_be(segments, message):
    with pytest.raises(ValueError, match=message):
        paged_layout(segments, page_size=PAGE, device="cpu")


def test_tensors_that_do_not_fit():
    layout = paged_layout([GOOD], page_size=PAGE, device="cpu")
    query, key, value = cache([GOOD])
    new = torch.zeros(1, 2, 1, 16)
    for call, message in (
        (lambda: paged_attention(query[:, :3], key, value, layout), "N a multiple of its 2 heads"),
        (lambda: paged_attention(query[..., :8], key, value, layout), "width of the cache"),
        (lambda: paged_attention(query, key[:, :60], value[:, :60], layout), "fewer slots than the 64"),
        (lambda: paged_attention(query, key, value[:1], layout), "of the same shape"),
        (lambda: paged_attention(query, key, value, layout, scale=0.0), "scale is 0.0"),
        (lambda: store_paged_(key, value, new[:, :1], new[:, :1], layout), "must be .1, 2, 1, 16."),
        (lambda: store_paged_(key, value, new, new[..., :8], layout), "must be .1, 2, 1, 16."),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"query is torch.float64, the cache torch.float32"):
        paged_attention(query.double(), key, value, layout)
    with pytest.raises(TypeError, match=r"give torch.float32, the dtype of the cache"):
        store_paged_(key, value, new.double(), new.double(), layout)


def test_prompts_and_rows_in_one_pass_keep_their_places():
    """However the engine orders them, every token gets its own result."""
    pages = Pages(9)
    segments = [*alone(pages, 0, 70), *branches(pages, 64, (3, 1), (4, 1), group=1), *alone(pages, 12, 66)]
    tensors = cache(segments)
    turned = segments[::-1]
    first = [sum(s.count for s in segments[:i]) for i in range(len(segments))]
    order = [t for i in reversed(range(len(segments))) for t in range(first[i], first[i] + segments[i].count)]
    got = attend(turned, tensors[0][:, :, order], *tensors[1:])
    torch.testing.assert_close(got, attend(segments, *tensors)[:, order])
