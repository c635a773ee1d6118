from __future__ import annotations

import pytest
import torch
from attention_cases import PACKS, assert_as_good_as_eager, branches, inputs, results
from shipped import NEWEST, shipped
from ttpa_kernels.tree_attention import kernel
from ttpa_kernels.tree_attention.blocks import block_lists
from ttpa_kernels.tree_attention.op import TreeMask, _forward, tree_attention, tree_mask

pytestmark = pytest.mark.triton


def attend(end, *, block: int = 16, **options):
    """Attention with blocks, and so tiles, of `block` tokens."""
    mask = TreeMask("triton", len(end), block_lists(end, block=block))
    return lambda query, key, value: tree_attention(query, key, value, mask, **options)


@pytest.mark.parametrize("name", PACKS)
def test_equals_the_mask_written_out(name, device, poisoned):
    end = PACKS[name].to(device)
    assert_as_good_as_eager(attend(end), end, *inputs(len(end), N=2, G=1, device=device))


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("N", "G", "dtype"), [(1, 1, FULL), (2, 2, HALF), (4, 2, FULL), (3, 1, HALF), (8, 1, FULL), (2, 1, torch.float16)]
)
def test_heads_and_dtypes(N, G, dtype, device, poisoned):
    end = PACKS["a small tree"].to(device)
    assert_as_good_as_eager(attend(end), end, *inputs(len(end), N=N, G=G, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("D", [8, 64, 80, 96, 128, 256])
def test_widths(D, dtype, device, poisoned):
    end = torch.tensor(branches(9, 8, 4), device=device)
    assert_as_good_as_eager(attend(end), end, *inputs(21, N=2, G=1, D=D, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_the_shipped_tiles(dtype, device, poisoned):
    end = torch.tensor(branches(70, 30, 22) + branches(20, offset=122), device=device)
    mask = tree_mask(end, engine="triton")
    tensors = inputs(len(end), N=2 if dtype == HALF else 1, G=1, dtype=dtype, device=device)
    assert_as_good_as_eager(lambda q, k, v: tree_attention(q, k, v, mask), end, *tensors)


@pytest.mark.parametrize(("dtype", "size"), [(FULL, 20), (HALF, 300)])
def test_huge_and_equal_scores(dtype, size, device):
    """Up to some hundreds in fp32 (beyond, the rounding of the log-sum-exp shows) and thousands in bf16."""
    end = PACKS["a small tree"].to(device)
    query, key, value, upstream = inputs(len(end), N=2, dtype=dtype, device=device)
    with torch.no_grad():
        key[:, :, 3:17] = key[:, :, 3:4]
        query *= size
    assert_as_good_as_eager(attend(end), end, query, key, value, upstream)


def test_a_scale_of_ones_own(device):
    end = PACKS["a small tree"].to(device)
    assert_as_good_as_eager(attend(end, scale=0.9), end, *inputs(len(end), device=device), scale=0.9)


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "a slice of something wider": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "columns apart": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "not aligned": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, device, poisoned):
    """Aligned rows go through tensor descriptors, others through pointers."""
    end = PACKS["a small tree"].to(device)
    *tensors, upstream = inputs(len(end), dtype=HALF, device=device)
    want = results(attend(end), *tensors, upstream)
    moved = [LAYOUTS[layout](x.detach()).requires_grad_() for x in tensors]
    got = results(attend(end), *moved, LAYOUTS[layout](upstream))
    assert all(map(torch.equal, got, want))
    for x in got:
        assert x.transpose(1, 2).is_contiguous()


def test_an_upstream_gradient_without_memory(device):
    end = PACKS["a chain"].to(device)
    *tensors, upstream = inputs(len(end), N=2, device=device)
    got = torch.autograd.grad(attend(end)(*tensors).sum(), tensors)
    want = results(attend(end), *tensors, torch.ones_like(upstream))[1:]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("frozen", [(0,), (1, 2)])
def test_frozen_inputs_get_no_gradient(frozen, device):
    end = PACKS["a small tree"].to(device)
    *tensors, upstream = inputs(len(end), N=2, device=device)
    want = results(attend(end), *tensors, upstream)[1:]
    leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
    attend(end)(*leaves).backward(upstream)
    for i, (x, gradient) in enumerate(zip(leaves, want, strict=True)):
        assert x.grad is None if i in frozen else torch.equal(x.grad, gradient)


def test_blocks_that_are_not_visible_are_not_read(device):
    """NaN in a block that is visited reaches the result, be its tokens masked or not: 0 times NaN is NaN."""
    end = torch.tensor(branches(32, 16, 16) + branches(16, offset=64), device=device)
    *tensors, upstream = inputs(80, N=2, G=1, device=device)
    clean = results(attend(end), *tensors, upstream)
    # the first branch: nothing but itself sees it, and it sees itself and the prompt
    hidden, rest = slice(32, 48), [*range(48, 80)]
    for poison_query in (False, True):
        dirty = [x.detach().clone() for x in (*tensors, upstream)]
        for x in [dirty[0], dirty[3]] if poison_query else dirty[1:3]:
            x[:, :, hidden] = torch.nan
        got = results(attend(end), *(x.requires_grad_() for x in dirty[:3]), dirty[3])
        assert bool(got[0][:, :, hidden].isnan().all())
        for a, b in zip(got[:2], clean[:2], strict=True):  # output and dquery of the others
            assert torch.equal(a[:, :, rest], b[:, :, rest])
        for a, b in zip(got[2:], clean[2:], strict=True):  # dkey and dvalue of what the branch does not see
            assert torch.equal(a[:, :, rest], b[:, :, rest])
            assert bool(a[:, :, :32].isnan().any())  # the prompt hears of it


def test_the_same_bits_every_time_and_without_a_gradient(device):
    end = PACKS["a small tree"].to(device)
    tensors = inputs(len(end), N=2, dtype=HALF, device=device)
    first, second = (results(attend(end), *tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        assert torch.equal(attend(end)(*tensors[:3]), first[0])


def test_autocast_is_followed(device):
    end = PACKS["a chain"].to(device)
    query, key, value, _ = inputs(len(end), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = attend(end)(query, key, value.bfloat16())
    assert torch.equal(out, attend(end)(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_the_operator_is_well_behaved(device):
    end = PACKS["ends that are no tree"].to(device)
    *tensors, _ = inputs(len(end), N=2, G=1, device=device)
    block, *lists = block_lists(end, block=16)
    torch.library.opcheck(_forward, (*tensors, *lists, block, 0.25))


def test_compiles_in_one_graph(device):
    end = PACKS["ends that are no tree"].to(device)
    *tensors, upstream = inputs(len(end), N=2, G=1, device=device)
    compiled = torch.compile(attend(end), fullgraph=True, backend="aot_eager")
    want = results(attend(end), *tensors, upstream)
    assert all(map(torch.equal, results(compiled, *tensors, upstream), want))


@pytest.mark.ahead
def test_shipped_kernels_compile_without_spills():
    for line in shipped("tree_attention_"):
        assert line["stack"] == 0, line
        if "bf16" in line["name"] and "delta" not in line["name"]:
            assert line["matrix"] == NEWEST[line["architecture"]], line


def test_what_ships():
    """Every width of tiles, forward and all gradients, for half precision and fp32."""
    for architecture in (80, 90, 100):
        names = [variant.name for variant in kernel.variants(architecture)]
        assert len(set(names)) == len(names)
        for dtype in ("bf16", "fp32"):
            for D in (64, 128, 256):
                for of in ("forward", "key_gradient", "query_gradient"):
                    assert any(f"tree_attention_{of} {dtype} D{D}" in name for name in names)


LONG = branches(2048, 96, 96, 400) + branches(1500, 200, 700, 31, offset=2640) + branches(3121, offset=5071)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_flex_and_triton_agree_on_a_gpu(D, dtype):
    end = torch.tensor(LONG, device="cuda")
    assert len(end) == 8192
    tensors = inputs(8192, N=8, G=2, D=D, dtype=dtype, device="cuda")
    got, want = (
        results(lambda q, k, v, mask=mask: tree_attention(q, k, v, mask), *tensors)
        for mask in (tree_mask(end, engine="triton"), tree_mask(end, engine="flex"))
    )
    for a, b in zip(got, want, strict=True):
        # FlexAttention multiplies fp32 in TF32 on some versions
        limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}[dtype]
        assert (a.float() - b.float()).norm() <= limit * b.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_the_shipped_tiles_on_a_gpu(D, dtype):
    end = torch.tensor(branches(700, 96, 130, 98), device="cuda")
    mask = tree_mask(end, engine="triton")
    tensors = inputs(1024, N=8, G=2, D=D, dtype=dtype, device="cuda")
    assert_as_good_as_eager(lambda q, k, v: tree_attention(q, k, v, mask), end, *tensors)


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """Beyond outputs and gradients: two numbers a head and token, and the lists."""
    end = torch.tensor(LONG, device="cuda")
    *tensors, upstream = inputs(8192, N=32, G=8, D=128, dtype=torch.bfloat16, device="cuda")
    results(lambda q, k, v: tree_attention(q, k, v, tree_mask(end)), *tensors, upstream)  # compile first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = results(lambda q, k, v: tree_attention(q, k, v, tree_mask(end)), *tensors, upstream)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in held)
    assert extra <= 2 * 32 * 8192 * 4 + (4 << 20)
