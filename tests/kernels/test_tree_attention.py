from __future__ import annotations

import pytest
import torch
from attention_cases import PACKS, assert_as_good_as_eager, branches, inputs, results
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from ttpa_kernels.tree_attention import flex, sdpa
from ttpa_kernels.tree_attention.blocks import block_lists
from ttpa_kernels.tree_attention.op import TreeMask, tree_attention, tree_mask
from ttpa_kernels.tree_attention.reference import tree_attention_reference


def attend(mask, **options):
    return lambda query, key, value: tree_attention(query, key, value, mask, **options)


def test_the_reference_is_a_softmax_over_the_tokens_that_are_seen():
    query, key, value, _ = inputs(10, N=1, G=1, D=3)
    end = PACKS["ends that are no tree"]
    out = tree_attention_reference(query, key, value, end, scale=0.7)
    for i in range(10):
        seen = [j for j in range(i + 1) if i < end[j]]
        weight = (0.7 * key[0, 0, seen].double() @ query[0, 0, i].double()).softmax(dim=0)
        torch.testing.assert_close(out[0, 0, i], weight @ value[0, 0, seen].double())


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("name", PACKS)
def test_equals_the_mask_written_out(name, heads):
    end = PACKS[name]
    assert_as_good_as_eager(attend(tree_mask(end)), end, *inputs(len(end), N=heads[0], G=heads[1], D=12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    end = PACKS["nested trees"]
    assert_as_good_as_eager(attend(tree_mask(end)), end, *inputs(len(end), dtype=dtype))


def test_gradcheck():
    end = PACKS["ends that are no tree"]
    *tensors, _ = inputs(len(end), N=2, G=1, D=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(attend(tree_mask(end)), tensors)


def test_a_scale_of_ones_own():
    end = PACKS["nested trees"]
    assert_as_good_as_eager(attend(tree_mask(end), scale=0.9), end, *inputs(len(end)), scale=0.9)


def test_the_output_is_contiguous_with_tokens_first():
    end = PACKS["nested trees"]
    query, key, value, _ = inputs(len(end))
    assert tree_attention(query, key, value, tree_mask(end)).transpose(1, 2).is_contiguous()


def test_spans_are_trees_and_trunks_reach_to_the_first_branch():
    end = torch.tensor(branches(4, 2, 3) + branches(1, offset=9) + branches(2, 5, offset=10))
    spans = sdpa.spans(end)
    assert [(s.trunk, s.branches, s.whole) for s in spans] == [
        (slice(0, 4), slice(4, 9), slice(0, 9)),
        (slice(9, 10), slice(10, 10), slice(9, 10)),
        (slice(10, 17), slice(17, 17), slice(10, 17)),  # a single completion is as causal as its prompt
    ]
    assert sum(s.bias.numel() for s in spans) == 5 * 9


def test_trees_do_not_touch_each_other():
    end = torch.tensor(branches(4, 2, 3) + branches(3, 2, 2, offset=9))
    *tensors, upstream = inputs(16)
    clean = results(attend(tree_mask(end)), *tensors, upstream)
    poisoned = [x.detach().clone() for x in (*tensors, upstream)]
    for x in poisoned:
        x[:, :, :9] = torch.nan
    got = results(attend(tree_mask(end)), *(x.requires_grad_() for x in poisoned[:3]), poisoned[3])
    for a, b in zip(got, clean, strict=True):
        assert bool(a[:, :, :9].isnan().all()) and torch.equal(a[:, :, 9:], b[:, :, 9:])


def test_autocast_is_followed():
    end = PACKS["nested trees"]
    query, key, value, _ = inputs(len(end))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tree_attention(query, key, value.bfloat16(), tree_mask(end))
    assert out.dtype == torch.bfloat16
    half = (x.bfloat16() for x in (query, key, value))
    assert torch.equal(out, tree_attention(*half, tree_mask(end)))


def test_compiles_in_one_graph():
    end = PACKS["nested trees"]
    mask, (*tensors, upstream) = tree_mask(end), inputs(len(end))
    compiled = torch.compile(attend(mask), fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, *tensors, upstream), results(attend(mask), *tensors, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", [4, 16, 128])
@pytest.mark.parametrize("name", PACKS)
def test_block_lists(name, block):
    """Exactly the blocks in which a query sees a key, from both sides, and as full exactly those without a hole."""
    end = PACKS[name]
    T, lists = len(end), block_lists(end, block=block)
    index = torch.arange(T)
    sees = (index <= index[:, None]) & (index[:, None] < end)
    for order, counts, rule in (
        (lists.keys_BB, lists.num_keys_2B, sees),
        (lists.queries_BB, lists.num_queries_2B, sees.T),
    ):
        for b, (listed, full, visible) in enumerate(zip(order.tolist(), *counts.tolist(), strict=True)):
            rows = rule[b * block : (b + 1) * block]
            cells = {c: rows[:, c * block : (c + 1) * block] for c in range(len(order))}
            ragged = {len(order) - 1} if T % block else set()
            assert listed[:full] == [c for c in cells if cells[c].all() and b != c and not {b, c} & ragged]
            assert sorted(listed[:visible]) == [c for c in cells if cells[c].any()]
            assert sorted(listed) == list(cells)


@pytest.mark.parametrize("name", PACKS)
def test_flex_block_mask(name):
    end = PACKS[name]
    mask = flex.block_mask(block_lists(end, block=16))
    want = create_block_mask(mask.mask_mod, None, None, len(end), len(end), device="cpu", BLOCK_SIZE=16)
    assert torch.equal(mask.to_dense(), want.to_dense())
    assert torch.equal(mask.full_kv_num_blocks, want.full_kv_num_blocks)
    assert torch.equal(mask.full_q_num_blocks, want.full_q_num_blocks)


def test_flex_engine(monkeypatch):
    monkeypatch.setattr(flex, "compiled", flex_attention)
    end = PACKS["nested trees"]
    query, key, value, _ = (x.detach() for x in inputs(len(end)))
    mask = tree_mask(end, engine="flex")
    out = tree_attention(query, key, value, mask, scale=0.3)
    want = tree_attention_reference(query, key, value, end, scale=0.3)
    assert (out - want).abs().max() < 1e-6 and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        (torch.tensor([[1]]), ValueError, "one index for each token"),
        (torch.tensor([], dtype=torch.int64), ValueError, "not empty"),
        (torch.tensor([1.0]), TypeError, "torch.int64"),
        (torch.tensor([2, 1, 3]), ValueError, r"end_T\[1\] is 1: .* in \[2, 3\]"),
        (torch.tensor([3, 4, 3]), ValueError, r"end_T\[1\] is 4: .* in \[2, 3\]"),
    ],
)
def test_checks_of_the_mask(end, error, message):
    with pytest.raises(error, match=message):
        tree_mask(end)


def test_an_unknown_engine():
    with pytest.raises(ValueError, match="engine is 'fast'"):
        tree_mask(torch.tensor([1]), engine="fast")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"must be \[1, heads, T, D\]"),
        (lambda q, k, v: (q.repeat(2, 1, 1, 1), k, v), ValueError, "pack several sequences into one"),
        (lambda q, k, v: (q[:, :, 1:], k, v), ValueError, "10 tokens of the mask"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "a multiple of the others"),
        (lambda q, k, v: (q, k, v[:, :1]), ValueError, "a multiple of the others"),
        (lambda q, k, v: (q[..., 1:], k, v), ValueError, "width D"),
        (lambda q, k, v: (q.double(), k, v), TypeError, "same dtype"),
        (lambda q, k, v: (q.to("meta"), k, v), ValueError, "move them to one"),
    ],
)
def test_checks_of_the_tensors(change, error, message):
    query, key, value, _ = inputs(10)
    with pytest.raises(error, match=message):
        tree_attention(*change(query, key, value), tree_mask(PACKS["ends that are no tree"]))


def test_what_the_triton_engine_refuses():
    end = PACKS["one token"]
    mask = TreeMask("triton", 1, block_lists(end))
    query, key, value, _ = inputs(1, D=300)
    with pytest.raises(ValueError, match="at most 256"):
        tree_attention(query, key, value, mask)
    with pytest.raises(TypeError, match="float64"):
        tree_attention(query.double(), key.double(), value.double(), mask)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_checks_of_the_scale(scale):
    query, key, value, _ = inputs(10)
    with pytest.raises(ValueError, match="positive"):
        tree_attention(query, key, value, tree_mask(PACKS["ends that are no tree"]), scale=scale)
