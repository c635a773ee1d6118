from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from head_cases import exact_logits
from next_token_cases import assert_right, assert_same, case
from shipped import NEWEST, shipped
from ttpa_kernels.configs import SpanTile, Tile
from ttpa_kernels.linear_logp.chunks import Head
from ttpa_kernels.next_token import kernel, noise
from ttpa_kernels.next_token.op import NextToken, draw_from_top, next_token

pytestmark = pytest.mark.triton
SPAN = SpanTile(16, 2, 4)


def compute(hidden_BH, weight_VH, *, num_top, key_B=None, bias_V=None, tile=None, **options) -> NextToken:
    """`next_token` in small tiles and spans; the kernels mark absent draws as empty."""
    tile = tile or Tile(16, max(16, triton.next_power_of_2(num_top)), 16, 4, 2)
    head = Head(weight_VH, bias_V, None, **options)
    found = kernel.next_token(head, hidden_BH, num_top=num_top, key_B=key_B, tile=tile, span=SPAN)
    return NextToken(*found[:5], *((None, None) if key_B is None else found[5:]))


OPTIONS = {"none": {}, "softcap": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "B", "H", "V"),
    [
        (torch.bfloat16, 3, 24, 70),  # descriptors
        (torch.bfloat16, 1, 9, 33),  # pointers
        (torch.float16, 16, 32, 64),
        (torch.float32, 3, 9, 100),  # spans
        (torch.float32, 1, 16, 32),
    ],
    ids=str,
)
def test_equals_float64(dtype, B, H, V, options, device, poisoned):
    bias = torch.randn(V, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    arguments = case(B, H, V, dtype=dtype, device=device) | OPTIONS[options] | {"num_top": 5, "bias_V": bias}
    assert_right(compute(**arguments), **arguments)


@pytest.mark.parametrize("num_top", [0, 1, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_numbers_of_likeliest_tokens(dtype, num_top, device, poisoned):
    arguments = case(2, 8, 150 if num_top < 64 else 64, dtype=dtype, device=device) | {"num_top": num_top}
    arguments["key_B"] = None
    kept = SPAN if num_top <= 16 else SpanTile(64, 2, 4)
    found = kernel.next_token(
        Head(arguments["weight_VH"]),
        arguments["hidden_BH"],
        num_top=num_top,
        key_B=None,
        tile=Tile(16, max(16, triton.next_power_of_2(num_top)), 16, 4, 2),
        span=kept,
    )
    assert_right(NextToken(*found[:5], None, None), **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_shipped_configurations_through_the_operation(dtype, device, poisoned):
    arguments = case(2, 16, 140, dtype=dtype, device=device) | {"num_top": 3, "vocab_size": 133}
    got = next_token(**arguments, engine="triton")
    assert_right(got, **arguments)
    assert torch.equal(got.draw_B, next_token(**arguments, engine="torch").draw_B)


def test_many_rows_and_chunks(monkeypatch, device, poisoned):
    monkeypatch.setattr(kernel, "BUFFER_ROWS", 3)
    monkeypatch.setattr(kernel, "BUFFER_BYTES", 3 * 2 * 32 * 4)
    arguments = case(7, 8, 150, device=device) | {"num_top": 4}
    assert_right(compute(**arguments), **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_likeliest_tokens_in_one_part(monkeypatch, dtype, device):
    monkeypatch.setattr(kernel, "JOINED", 8)
    given = case(2, 8, 200, dtype=dtype, device=device, peak=0.1)
    given["bias_V"] = torch.zeros(200, device=device, dtype=dtype)
    given["bias_V"][66:74] = 9.0  # all in one part, so that the join must read its list to the end
    arguments = given | {"num_top": 8}
    got = compute(**arguments)
    assert_right(got, **arguments)
    assert sorted(got.top_id_BK[0].tolist()) == list(range(66, 74))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equal_logits_stand_in_the_order_of_their_ids(dtype, device):
    hidden, weight = torch.ones(1, 4, dtype=dtype, device=device), torch.zeros(70, 4, dtype=dtype, device=device)
    flat = compute(hidden, weight, num_top=6, key_B=torch.tensor([3], device=device))
    assert flat.top_id_BK[0].tolist() == list(range(6))
    torch.testing.assert_close(flat.entropy_B.cpu(), torch.tensor([70.0]).log())
    assert float(flat.varentropy_B.abs().max()) < 1e-10
    weight[[33, 69, 16]] = 1.0
    weight[[1, 2]] = -1.0
    weight[5] = -0.0
    assert compute(hidden, weight, num_top=7).top_id_BK[0].tolist() == [16, 33, 69, 0, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_huge_logits(dtype, device, poisoned):
    arguments = case(3, 8, 70, dtype=dtype, peak=1000.0, device=device) | {"num_top": 4}
    got = compute(**arguments)
    assert all(bool(x.isfinite().all()) for x in got)
    assert_right(got, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_impossible_tokens(dtype, device, poisoned):
    bias = torch.full((70,), -torch.inf, device=device, dtype=dtype)
    bias[[5, 40]] = 0.0
    arguments = case(3, 8, 70, dtype=dtype, device=device) | {"bias_V": bias, "num_top": 2}
    got = compute(**arguments)
    assert_right(got, **arguments)
    assert set(got.draw_B.tolist()) <= {5, 40}
    assert compute(**arguments | {"num_top": 4}).top_id_BK[:, 2:].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_row_is_the_same_whatever_its_neighbours(dtype, device):
    given = case(5, 8, 70, dtype=dtype, device=device)
    got = compute(**given, num_top=3)
    order = torch.tensor([4, 2, 2, 0, 3], device=device)
    changed = given["hidden_BH"][order]
    changed[4] = torch.nan
    other = compute(changed, given["weight_VH"], num_top=3, key_B=given["key_B"][order])
    assert_same([x[order[:4]] for x in got], [y[:4] for y in other])
    assert bool(other.lse_B[4].isnan()) and bool(other.entropy_B[4].isnan()) and 0 <= int(other.draw_B[4]) < 70


@triton.jit
def _noise_kernel(key, unit, gumbel, first, N: tl.constexpr):
    row = tl.program_id(0)
    v = kernel._units(tl.load(key + row + tl.arange(0, 1))[:, None], first, N)
    at = row * N + tl.arange(0, N)[None, :]
    tl.store(unit + at, v)
    tl.store(gumbel + at, kernel._gumbel(v))


def test_noise_has_the_bits_of_its_twin(device):
    key = torch.tensor([0, -1, 2**62 + 12345, -(2**63)], device=device)
    unit, gumbel = torch.empty(2, 4, 256, device=device)
    _noise_kernel[(4,)](key, unit, gumbel, 4096, N=256)
    quads = torch.arange(1024, 1088, device=device)
    words = noise.philox((quads, quads * 0, quads * 0, quads * 0), key[:, None])
    assert torch.equal(unit, noise.unit(torch.stack(words, dim=2).flatten(1)))
    torch.testing.assert_close(gumbel, noise.gumbel(key, 4096, 4352), rtol=1e-6, atol=1e-6)
    assert torch.equal(noise.uniform(key, engine="triton"), noise.uniform(key, engine="torch"))


@triton.jit
def _ends_kernel(word, gumbel, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(gumbel + at, kernel._gumbel(kernel._unit(tl.load(word + at).to(tl.uint32))))


def test_noise_is_exact_at_both_ends(device):
    word = torch.tensor([0, 1, 2, 200, 2**16, 2**31, 2**32 - 2, 2**32 - 1], device=device)
    gumbel = torch.empty(8, device=device)
    _ends_kernel[(1,)](word, gumbel, N=8)
    exact = -(-torch.log1p(-noise.unit(word).double())).log()
    torch.testing.assert_close(gumbel.double(), exact, rtol=3e-7, atol=3e-7)


def test_draws_from_the_likeliest_are_those_of_the_torch_engine(device):
    given = case(40, 8, 60, device=device)
    found = next_token(**given, num_top=20, engine="torch")
    got, want = (
        draw_from_top(found, key_B=given["key_B"], top_p=0.9, min_p=0.01, engine=e) for e in ("triton", "torch")
    )
    assert all(map(torch.equal, got, want))


def test_no_rows_and_no_float64(device):
    got = next_token(**case(0, 8, 50, device=device), num_top=3, engine="triton")
    assert [x.shape for x in got] == [(0,), (0,), (0,), (0, 3), (0, 3), (0,), (0,)]
    assert noise.uniform(torch.zeros(0, dtype=torch.int64, device=device), engine="triton").shape == (0,)
    with pytest.raises(ValueError, match="float64"):
        next_token(**case(2, 8, 50, dtype=torch.float64, device=device), num_top=3, engine="triton")


@pytest.mark.ahead
def test_shipped_kernels_compile_without_spills():
    for line in shipped("next_token"):
        assert line["stack"] == 0, line
        if "rows 64" in line["name"]:  # fewer rows than 64 are too few for the newer instructions
            assert line["matrix"] == NEWEST[line["architecture"]], line
        elif "tiles" in line["name"]:
            assert line["matrix"] == "mma.sync", line


def large_case(B: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A vocabulary of 151,936 tokens, made on the device."""
    generator = torch.Generator("cuda").manual_seed(B)
    hidden = torch.randn(B, 1536, device="cuda", generator=generator)
    weight = torch.randn(151_936, 1536, device="cuda", generator=generator) * 4 / 1536**0.5
    key = torch.randint(2**62, (B,), device="cuda", generator=generator)
    return {"hidden_BH": hidden.to(dtype), "weight_VH": weight.to(dtype), "key_B": key}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "dtype"),
    [(b, torch.bfloat16) for b in (1, 16, 17, 64, 65, 256, 300)] + [(8, torch.float16), (8, torch.float32)],
)
def test_large_vocabulary(B, dtype):
    given = large_case(B, dtype)
    got = next_token(**given, num_top=20)
    z = torch.cat(
        [exact_logits(hidden_RH=given["hidden_BH"], weight_VH=part) for part in given["weight_VH"].split(20_000)], 1
    )
    logp = torch.log_softmax(z, dim=1)
    entropy = -(logp.exp() * logp).sum(1)
    top = z.topk(21, dim=1).values
    tolerance = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(got.lse_B.double(), z.logsumexp(1), **tolerance)
    torch.testing.assert_close(got.entropy_B.double(), entropy, **tolerance)
    varentropy = (logp.exp() * (logp + entropy[:, None]) ** 2).sum(1)
    torch.testing.assert_close(got.varentropy_B.double(), varentropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.top_logit_BK.double(), top[:, :20], **tolerance)
    torch.testing.assert_close(z.gather(1, got.top_id_BK), top[:, :20], **tolerance)
    torch.testing.assert_close(logp.gather(1, got.draw_B[:, None])[:, 0], got.draw_logp_B.double(), **tolerance)
    noisy = z + noise.gumbel(given["key_B"], 0, z.shape[1])
    torch.testing.assert_close(noisy.gather(1, got.draw_B[:, None])[:, 0], noisy.amax(1), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [16, 64, 256])
def test_in_a_graph_without_a_wait_and_with_little_memory(B):
    given = large_case(B, torch.bfloat16)
    plain = next_token(**given, num_top=20)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = next_token(**given, num_top=20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 48 << 20  # the buffer, the parts, and cuBLAS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = next_token(**given, num_top=20)
    graph.replay()
    for x, y, z in zip(plain, again, captured, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [16, 64, 256])
def test_a_row_of_a_large_batch_is_the_same_whatever_its_neighbours(B):
    given = large_case(B, torch.bfloat16)
    got = next_token(**given, num_top=20)
    order = torch.randperm(B, device="cuda")
    other = next_token(given["hidden_BH"][order], given["weight_VH"], num_top=20, key_B=given["key_B"][order])
    assert all(torch.equal(x[order], y) for x, y in zip(got, other, strict=True))
