from __future__ import annotations

import pytest
import torch
from next_token_cases import assert_right, assert_same, case
from ttpa_kernels.next_token import noise, online
from ttpa_kernels.next_token.op import NextToken, draw_from_top, next_token
from ttpa_kernels.next_token.reference import next_token_reference

OPTIONS = {
    "none": {},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
    "padded": {"vocab_size": 90, "temperature": 0.6},
}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(online, "CHUNK", 40)
    monkeypatch.setattr(online, "GROUP", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("num_top", [0, 1, 20, 64])
def test_equals_float64(num_top, dtype, options):
    given = case(5, 16, 131, dtype=dtype)
    bias = {"bias_V": torch.randn(131, generator=torch.Generator().manual_seed(0)).to(dtype)}
    arguments = given | bias | OPTIONS[options] | {"num_top": num_top}
    got = next_token(**arguments)
    assert got.top_logit_BK.shape == got.top_id_BK.shape == (5, num_top)
    if dtype == torch.float64:
        for mine, truth in zip(got, next_token_reference(**arguments), strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_right(got, **arguments)


@pytest.mark.parametrize(("B", "V", "num_top"), [(1, 1, 1), (1, 64, 64), (3, 16384, 20), (2, 40001, 64)])
def test_sizes(B, V, num_top):
    arguments = case(B, 8, V) | {"num_top": num_top}
    assert_right(next_token(**arguments), **arguments)


def test_no_rows_and_no_keys():
    given = case(0, 8, 50)
    got = next_token(**given, num_top=3)
    assert [x.shape for x in got] == [(0,), (0,), (0,), (0, 3), (0, 3), (0,), (0,)]
    assert next_token(given["hidden_BH"], given["weight_VH"], num_top=3)[5:] == (None, None)


@pytest.mark.usefixtures("small_chunks")
def test_equal_logits_stand_in_the_order_of_their_ids():
    weight = torch.zeros(130, 4)
    weight[[7, 64, 65, 100]] = 1.0
    weight[[3, 129]] = -1.0
    got = next_token(torch.ones(1, 4), weight, num_top=20)
    assert got.top_id_BK[0].tolist() == [7, 64, 65, 100, 0, 1, 2, *range(4, 7), *range(8, 18)]
    flat = next_token(torch.ones(2, 4), torch.ones(130, 4), num_top=64, key_B=torch.tensor([1, 2]))
    assert flat.top_id_BK.tolist() == [list(range(64))] * 2
    torch.testing.assert_close(flat.entropy_B, torch.full((2,), 130.0).log())
    assert float(flat.varentropy_B.abs().max()) < 1e-10


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("peak", [300.0, 1e6])
def test_huge_logits(peak):
    arguments = case(6, 16, 131, peak=peak) | {"num_top": 20}
    got = next_token(**arguments)
    assert all(bool(x.isfinite().all()) for x in got)
    assert_right(got, **arguments)


@pytest.mark.usefixtures("small_chunks")
def test_impossible_tokens():
    bias = torch.full((131,), -torch.inf)
    bias[[5, 90]] = 0.0  # the first chunk has one that is possible, the second has none
    arguments = case(4, 16, 131) | {"bias_V": bias, "num_top": 2}
    got = next_token(**arguments)
    assert_right(got, **arguments)
    assert set(got.draw_B.tolist()) <= {5, 90}
    assert next_token(**arguments | {"num_top": 4}).top_id_BK[:, 2:].tolist() == [[0, 1]] * 4


@pytest.mark.usefixtures("small_chunks")
def test_a_poisoned_row_stays_alone():
    given = case(5, 16, 131)
    clean = next_token(**given, num_top=4)
    given["hidden_BH"][2] = torch.nan
    got = next_token(**given, num_top=4)
    assert all(bool(x[2].isnan()) for x in (got.lse_B, got.entropy_B, got.varentropy_B))
    assert 0 <= int(got.draw_B[2]) < 131
    others = [0, 1, 3, 4]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(got, clean, strict=True))


def test_a_row_is_the_same_whatever_its_neighbours():
    given = case(6, 16, 300)
    got = next_token(**given, num_top=5)
    order = torch.tensor([4, 2, 2, 0, 5, 1])
    other = next_token(given["hidden_BH"][order], given["weight_VH"], num_top=5, key_B=given["key_B"][order])
    assert_same([x[order] for x in got], other)


def test_draws_do_not_depend_on_chunks(monkeypatch):
    given = case(6, 16, 300)
    whole = next_token(**given, num_top=0)
    monkeypatch.setattr(online, "CHUNK", 28)
    assert torch.equal(next_token(**given, num_top=0).draw_B, whole.draw_B)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that the authors of Philox publish with Random123
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, words):
    bits = key[0] | key[1] << 32
    key = torch.tensor([bits - (bits >> 63 << 64)])
    assert [int(x) for x in noise.philox(tuple(torch.tensor([x]) for x in counter), key)] == words


def test_noise_is_finite_at_both_ends_and_follows_the_token():
    ends = noise.unit(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert ends.tolist() == [2.0**-33, 3 * 2.0**-33, 0.5, 1 - 2.0**-24]
    key = torch.tensor([3, -5])
    whole = noise.gumbel(key, 0, 50)
    assert bool(whole.isfinite().all())
    assert torch.equal(noise.gumbel(key, 7, 22), whole[:, 7:22])
    many = noise.gumbel(torch.arange(200), 0, 1000).double()
    assert abs(float(many.mean()) - 0.5772157) < 0.01 and abs(float(many.var()) - torch.pi**2 / 6) < 0.02


def chi_square(draws: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic of draws from p."""
    expected = p * len(draws)
    return float(((torch.bincount(draws, minlength=len(p)) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("first_key", [0, 2**40, -(2**62)])
def test_draws_follow_the_distribution(first_key):
    N, z = 20_000, torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -2.0, 1.5, -3.0])
    got = next_token(torch.ones(N, 1), z[:, None], num_top=8, key_B=first_key + torch.arange(N))
    p = torch.softmax(z.double(), 0)
    assert chi_square(got.draw_B, p) < 24.3  # 0.999 quantile of 7 degrees of freedom
    torch.testing.assert_close(got.draw_logp_B.double(), p.log()[got.draw_B])
    top = draw_from_top(got, key_B=first_key + torch.arange(N), top_k=4)
    kept = torch.zeros(8, dtype=torch.float64).index_fill_(0, torch.tensor([0, 6, 1, 2]), 1.0) * p
    assert set(top.draw_B.tolist()) == {0, 1, 2, 6}
    kept = kept[[0, 1, 2, 6]] / kept.sum()
    rank = torch.tensor([0, 1, 2, 0, 0, 0, 3, 0])[top.draw_B]
    assert chi_square(rank, kept) < 16.3  # 0.999 quantile of 3 degrees of freedom
    torch.testing.assert_close(top.logp_B.double(), p.log()[top.draw_B])
    torch.testing.assert_close(top.filtered_logp_B.double(), kept.log()[rank])


def top_of(probabilities: list[float], K: int, V: int = 1000) -> NextToken:
    """The likeliest K tokens, from id 10 on, of a distribution whose other tokens share the rest."""
    p = torch.tensor(probabilities[:K]).log()[None]
    zero = torch.zeros(1)
    return NextToken(zero, zero, zero, p, torch.arange(10, 10 + K)[None], None, None)


@pytest.mark.parametrize(
    ("filters", "kept", "complete"),
    [
        ({"top_k": 2}, 2, True),
        ({"top_k": 4}, 4, True),
        ({"top_p": 0.45}, 1, True),
        ({"top_p": 0.7}, 2, True),
        ({"top_p": 0.9}, 4, True),
        ({"top_p": 0.99}, 4, False),
        ({"min_p": 0.3}, 2, True),
        ({"min_p": 0.01}, 4, False),
        ({"min_p": 0.3, "top_p": 0.99}, 2, True),
        ({"top_k": 3, "top_p": 0.99}, 3, True),
        ({"top_p": 1e-9}, 1, True),
    ],
)
def test_filters(filters, kept, complete):
    one = top_of([0.5, 0.3, 0.1, 0.05], 4)
    many = NextToken(*(None if x is None else x.expand(400, *x.shape[1:]) for x in one))
    got = draw_from_top(many, key_B=torch.arange(400), **filters)
    assert set(got.draw_B.tolist()) == set(range(10, 10 + kept))
    assert got.complete_B.tolist() == [complete] * 400
    torch.testing.assert_close(
        (got.logp_B - got.filtered_logp_B).exp(), torch.full((400,), sum([0.5, 0.3, 0.1, 0.05][:kept]))
    )


def test_traced_as_one_operation():
    given = case(3, 8, 50) | {"bias_V": None}
    ordered = (given["hidden_BH"], given["weight_VH"], None, given["key_B"])
    torch.library.opcheck(torch.ops.ttpa_kernels.next_token.default, (*ordered, 4, 1.0, None, 1.0, 50, "torch"))
    torch.library.opcheck(
        torch.ops.ttpa_kernels.next_token.default, (*ordered[:3], None, 0, 1.0, 3.0, 0.5, 40, "torch")
    )
    compiled = torch.compile(next_token, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(compiled(**given, num_top=4), next_token(**given, num_top=4), strict=True):
        assert torch.equal(mine, plain)


def test_nothing_requires_a_gradient_and_autocast_changes_nothing():
    given = case(3, 8, 50)
    plain = next_token(**given, num_top=4)
    given["hidden_BH"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = next_token(**given, num_top=4)
    assert not any(x.requires_grad for x in got)
    assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_top": 65}, ValueError, r"\[0, 64\]"),
        ({"num_top": -1}, ValueError, r"\[0, 64\]"),
        ({"num_top": 51}, ValueError, "the vocabulary has 50 tokens"),
        ({"vocab_size": 10, "num_top": 11}, ValueError, "the vocabulary has 10 tokens"),
        ({"key_B": torch.zeros(2, dtype=torch.int64)}, ValueError, "each of 3 rows"),
        ({"key_B": torch.zeros(3, dtype=torch.int32)}, TypeError, "torch.int64"),
        ({"key_B": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "one device"),
        ({"hidden_BH": torch.zeros(3, 7)}, ValueError, "same width"),
        ({"hidden_BH": torch.zeros(3, 8).half()}, TypeError, "same one of"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"engine": "cuda"}, ValueError, "engine"),
    ],
)
def test_checks_say_what_to_do(change, error, message):
    with pytest.raises(error, match=message):
        next_token(**(case(3, 8, 50) | {"num_top": 2} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": None}, ValueError, "no filter"),
        ({"top_k": 5}, ValueError, r"\[1, 4\]"),
        ({"top_p": 0.0}, ValueError, r"top_p is 0.0"),
        ({"min_p": 1.5}, ValueError, r"min_p is 1.5"),
        ({"key_B": torch.zeros(1)}, TypeError, "torch.int64"),
        ({"likeliest": top_of([], 0)}, ValueError, "num_top of at least 1"),
    ],
)
def test_checks_of_filters_say_what_to_do(change, error, message):
    plain = {"likeliest": top_of([0.5, 0.3, 0.1, 0.05], 4), "key_B": torch.zeros(1, dtype=torch.int64), "top_k": 2}
    with pytest.raises(error, match=message):
        draw_from_top(**(plain | change))
