"""Decoding agrees with transformers' generate, and its statistics with a full recomputation."""

from __future__ import annotations

import pytest
import torch

from ttpa.sampling.decode import TOP, Fork, Trunks, batches, decode, end_ids

NEW = 24


@pytest.fixture
def model(tiny_model):
    """Sharper than random weights are, so that answers differ and some end before the limit."""
    with torch.no_grad():
        tiny_model.model.norm.weight.mul_(8.0)
    return tiny_model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in (9, 31, 17, 4, 17, 26, 12)]


@pytest.fixture
def ends(model, tokenizer, prompts):
    """Beside the end-of-turn token one that the model does write, so that rows end at different steps."""
    written = generated(model, prompts[0], [tokenizer.eos_token_id])
    return [tokenizer.eos_token_id, written[NEW // 2]]


def generated(model, prompt, ends, new=NEW):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def recomputed(model, prompt, ids):
    """log-probabilities, entropies and probabilities of a completion in one pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logp.exp()


def check_statistics(model, prompt, ids, decoded):
    """`decoded` is the end of the completion `ids`."""
    n = len(decoded.ids)
    logp, entropy, p = (x[len(ids) - n :] for x in recomputed(model, prompt, ids))
    torch.testing.assert_close(torch.tensor(decoded.logps).double(), logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(decoded.entropy).double(), entropy, atol=1e-5, rtol=0)
    return p


def test_trunks_equal_generate(model, prompts, ends):
    trunks = Trunks(model, prompts, ends=ends, max_new_tokens=NEW)
    lengths = set()
    for prompt, decoded in zip(prompts, trunks.decoded, strict=True):
        assert decoded.ids == generated(model, prompt, ends)
        assert decoded.finish == ("stop" if decoded.ids[-1] in ends else "length")
        p = check_statistics(model, prompt, decoded.ids, decoded)
        torch.testing.assert_close(
            torch.tensor(decoded.top_probabilities).double(), p.topk(TOP).values, atol=1e-5, rtol=0
        )
        assert decoded.top_ids[:, 0].tolist() == decoded.ids
        lengths.add(len(decoded.ids))
    assert len(lengths) > 1 and NEW in lengths, "rows must end at different steps for this test to mean anything"


def test_branches_equal_a_fresh_decode(model, prompts, ends):
    trunks = Trunks(model, prompts, ends=ends, max_new_tokens=NEW)
    forks = []
    for row, trunk in enumerate(trunks.decoded):
        for at in sorted({0, len(trunk.ids) // 2, len(trunk.ids) - 1}):
            forks += [Fork(row, at, int(token)) for token in trunk.top_ids[at, 1:3]]
    branches = trunks.branch(forks, batch_size=16)
    for fork, branch in zip(forks, branches, strict=True):
        prefix = [*trunks.decoded[fork.row].ids[: fork.at], fork.token]
        if fork.token in ends or len(prefix) == NEW:
            assert branch.ids == []
            continue
        assert branch.ids == generated(model, prompts[fork.row] + prefix, ends, NEW - len(prefix))
        check_statistics(model, prompts[fork.row], prefix + branch.ids, branch)
    assert any(branch.ids for branch in branches)
    alone = [trunks.branch([fork], batch_size=1)[0].ids for fork in forks]
    assert alone == [branch.ids for branch in branches]


def test_a_fork_at_an_end_or_at_the_limit_is_empty(model, prompts, ends):
    trunks = Trunks(model, prompts, ends=ends, max_new_tokens=NEW)
    row = next(i for i, trunk in enumerate(trunks.decoded) if len(trunk.ids) == NEW)
    ended, cut = trunks.branch([Fork(row, 3, ends[0]), Fork(row, NEW - 1, 5)], batch_size=4)
    assert (ended.ids, ended.finish) == ([], "stop")
    assert (cut.ids, cut.finish) == ([], "length")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_do_not_depend_on_the_batch(model, prompts, ends, batch_size):
    found = decode(model, prompts, ends=ends, max_new_tokens=NEW, batch_size=batch_size)
    assert [d.ids for d in found] == [generated(model, prompt, ends) for prompt in prompts]


def test_draws_depend_on_their_seed_only(model, prompts, ends):
    options = {"ends": ends, "max_new_tokens": NEW}
    together = decode(model, prompts, seeds=range(len(prompts)), **options)
    alone = [decode(model, [prompt], seeds=[i], **options)[0] for i, prompt in enumerate(prompts)]
    assert [d.ids for d in together] == [d.ids for d in alone]
    assert [d.ids for d in together] != [d.ids for d in decode(model, prompts, **options)]
    for prompt, decoded in zip(prompts, together, strict=True):
        check_statistics(model, prompt, decoded.ids, decoded)


def test_draws_follow_the_probabilities(model, prompts, ends):
    number = 2000
    drawn = decode(model, [prompts[3]] * number, ends=ends, max_new_tokens=1, batch_size=500, seeds=range(number))
    p = recomputed(model, prompts[3], [0])[2][0]
    counts = torch.bincount(torch.tensor([d.ids[0] for d in drawn]), minlength=len(p))
    deviation = (counts / number - p).abs() / (p * (1 - p) / number).sqrt().clamp(min=1e-3)
    assert float(deviation.max()) < 5


def test_the_mode_of_the_model_is_kept(model, prompts, ends):
    model.train()
    decode(model, prompts[:1], ends=ends, max_new_tokens=2)
    assert model.training


def test_end_ids_come_from_model_and_tokenizer(model, tokenizer):
    model.generation_config.eos_token_id = [3, 1]
    model.config.eos_token_id = 7
    assert end_ids(model, tokenizer) == sorted({1, 3, 7, tokenizer.eos_token_id})


def test_batches_put_like_lengths_together():
    assert list(batches([3, 9, 4, 9, 1], 2)) == [[1, 3], [2, 0], [4]]
    assert list(batches([], 2)) == []
