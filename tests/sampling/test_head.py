"""The token that is taken, and the statistics of the distribution it comes from."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from ttpa_kernels.next_token.noise import uniform
from ttpa_kernels.next_token.reference import next_token_from

from ttpa.sampling.head import draw_key, path_key, pick

B, H, V = 48, 16, 300
FILTERS = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}]
WAYS = [{"temperature": t} | f for t in (1.0, 0.6, 1.7) for f in ({}, *FILTERS)]


@pytest.fixture
def rows():
    """Hidden states, a head, and one key a row."""
    generator = torch.Generator().manual_seed(0)
    hidden_BH, weight_VH = torch.randn(B, H, generator=generator), torch.randn(V, H, generator=generator)
    return hidden_BH, weight_VH, torch.arange(B) * 7919


def logits(hidden_BH, weight_VH):
    return hidden_BH.double() @ weight_VH.double().T


def kept(logp_V, *, top_k=None, top_p=None, min_p=None):
    """The probabilities of one row after all filters, not normalised, most likely first, and the token ids."""
    p_V, id_V = logp_V.exp().sort(descending=True, stable=True)
    keep_V = torch.ones(len(p_V), dtype=torch.bool)
    if top_k is not None:
        keep_V[top_k:] = False
    if top_p is not None:
        keep_V &= p_V.cumsum(0) - p_V < top_p
    if min_p is not None:
        keep_V &= p_V >= min_p * p_V[0]
    return p_V * keep_V, id_V


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def check_statistics(picked, rows, K):
    z_BV = logits(*rows[:2])
    expected = next_token_from(z_BV, num_top=K)
    close(picked.entropy_B, expected.entropy_B)
    close(picked.varentropy_B, expected.varentropy_B, atol=1e-4)
    assert torch.equal(picked.top_id_BK, expected.top_id_BK)
    close(picked.top_p_BK, (expected.top_logit_BK - expected.lse_B[:, None]).exp())
    close(picked.logp_B, z_BV.log_softmax(1).gather(1, picked.token_B[:, None])[:, 0])


def test_without_temperature_the_likeliest_token_is_taken(rows):
    picked = pick(*rows[:2], num_top=20)
    assert torch.equal(picked.token_B, logits(*rows[:2]).argmax(1)) and picked.complete_B.all()
    check_statistics(picked, rows, 20)
    assert all(map(torch.equal, picked, pick(*rows[:2], num_top=20, key_B=rows[2]))), "keys play no part"


def test_of_equal_tokens_the_lower_id_is_taken(rows):
    hidden_BH, weight_VH, _ = rows
    best_B = logits(hidden_BH, weight_VH).argmax(1)
    twice_VH = torch.cat([weight_VH, weight_VH])
    picked = pick(hidden_BH, twice_VH, num_top=2)
    assert torch.equal(picked.token_B, best_B)
    assert torch.equal(picked.top_id_BK, torch.stack([best_B, best_B + V], dim=1))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_draw_is_that_of_its_key_and_its_statistics_those_at_temperature_1(rows, way):
    hidden_BH, weight_VH, key_B = rows
    picked = pick(hidden_BH, weight_VH, num_top=7, key_B=key_B, **way)
    check_statistics(picked, rows, 7)
    z_BV = logits(hidden_BH, weight_VH) / way["temperature"]
    filters = {name: value for name, value in way.items() if name != "temperature"}
    if not filters:
        assert torch.equal(picked.token_B, next_token_from(z_BV, num_top=0, key_B=key_B).draw_B)
        assert picked.complete_B.all()
    else:
        uniform_B = uniform(key_B, engine="torch")
        for row, logp_V in enumerate(z_BV.log_softmax(1)):
            p_V, id_V = kept(logp_V, **filters)
            assert picked.complete_B[row] == (p_V[64:].sum() == 0)
            drawn = (p_V[:64].cumsum(0) <= uniform_B[row] * p_V[:64].sum()).sum()
            assert picked.token_B[row] == id_V[drawn]
    assert not torch.equal(picked.token_B, pick(hidden_BH, weight_VH, num_top=1).token_B)


@pytest.mark.parametrize("way", [{"temperature": 1.5}, {"temperature": 0.8, "top_p": 0.7}], ids=str)
def test_draws_follow_the_tempered_and_filtered_probabilities(rows, way):
    number = 20_000
    hidden_BH, weight_VH = rows[0][:1] / 2, rows[1]
    key_B = draw_key(torch.tensor(path_key(0, "tree", "trunk")), torch.arange(number))
    picked = pick(hidden_BH.expand(number, H), weight_VH, num_top=1, key_B=key_B, **way)
    logp_V = (logits(hidden_BH, weight_VH)[0] / way["temperature"]).log_softmax(0)
    p_V, id_V = kept(logp_V, **{name: way[name] for name in way if name != "temperature"})
    p_V = p_V / p_V.sum()
    share_V = torch.bincount(picked.token_B, minlength=V)[id_V] / number
    assert share_V[p_V == 0].sum() == 0
    assert ((share_V - p_V).abs() / (p_V * (1 - p_V) / number).sqrt().clamp(min=1e-3)).max() < 5


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_a_row_draws_the_same_in_every_batch(rows, way):
    together = pick(rows[0], rows[1], num_top=2, key_B=rows[2], **way).token_B
    order_B = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        pick(rows[0][order_B], rows[1], num_top=2, key_B=rows[2][order_B], **way).token_B, together[order_B]
    )
    alone = [pick(rows[0][i : i + 1], rows[1], num_top=2, key_B=rows[2][i : i + 1], **way).token_B for i in range(B)]
    assert torch.equal(torch.cat(alone), together)


def test_a_vocabulary_smaller_than_what_is_asked_for(rows):
    hidden_BH, weight_VH, key_B = rows[0], rows[1][:9], rows[2]
    assert pick(hidden_BH, weight_VH, num_top=20).top_id_BK.shape == (B, 9)
    for filters in ({"top_k": 50}, {"top_p": 1.0}, {"min_p": 1e-9}):
        picked = pick(hidden_BH, weight_VH, num_top=20, temperature=2.0, key_B=key_B, **filters)
        assert picked.complete_B.all() and picked.token_B.unique().numel() == 9


def test_a_filter_that_would_keep_unknown_tokens_is_told(rows):
    hidden_BH, weight_VH, key_B = rows
    flat = pick(hidden_BH / 100, weight_VH, num_top=3, temperature=1.0, top_p=0.9, key_B=key_B)
    assert not flat.complete_B.any()
    assert pick(hidden_BH * 100, weight_VH, num_top=3, temperature=1.0, top_p=0.9, key_B=key_B).complete_B.all()


@pytest.mark.parametrize("way", [{}, *WAYS[:2], *WAYS[5:7]], ids=str)
def test_nothing_depends_on_values_that_are_not_there_yet(rows, way):
    """Fake tensors have no values: reading one, or a shape that depends on one, raises."""
    expected = pick(*rows[:2], num_top=4, key_B=rows[2], **way)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in rows]
        picked = pick(*fake[:2], num_top=4, key_B=fake[2], **way)
    assert [(x.shape, x.dtype) for x in picked] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{}, *WAYS[:2], *WAYS[5:7]], ids=str)
def test_a_cuda_graph_holds_a_call(rows, way):
    hidden_BH, weight_VH, key_B = (x.cuda() for x in rows)
    fresh_BH, fresh_B = hidden_BH.flip(0).clone(), key_B.flip(0).clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pick(hidden_BH, weight_VH, num_top=4, key_B=key_B, **way)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picked = pick(hidden_BH, weight_VH, num_top=4, key_B=key_B, **way)
    hidden_BH.copy_(fresh_BH)
    key_B.copy_(fresh_B)
    graph.replay()
    for found, expected in zip(picked, pick(fresh_BH, weight_VH, num_top=4, key_B=fresh_B, **way), strict=True):
        assert torch.equal(found, expected)


def test_the_key_of_a_path_depends_on_seed_tree_and_name():
    names = [(0, "a:1", "trunk"), (1, "a:1", "trunk"), (0, "a:2", "trunk"), (0, "a:1", "sample 0"), (0, "a", "1trunk")]
    keys = [path_key(*name) for name in names]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**63 for key in keys)
    assert path_key(0, "a:1", "trunk") == 5497774532572105103, "a resumed run must draw the same"


def test_the_key_of_a_position_is_a_sum_modulo_2_to_the_63():
    last = 2**63 - 1
    assert [draw_key(last, t) for t in (0, 1, 2)] == [last, 0, 1]
    assert draw_key(torch.tensor([last, 5]), torch.tensor([2, 2])).tolist() == [1, 7]
