"""The command: trees in, one page out that shows them and loads nothing, seen through a headless Chromium."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from chromium import Browser
from hesitant import TOOLS
from transformers import Qwen3Config, Qwen3ForCausalLM

from ttpa.errors import InputError
from ttpa.esm.pairs import strict_pairs
from ttpa.esm.score import score_tokens
from ttpa.model import load_model
from ttpa.trees.io import write_trees
from ttpa.trees.record import Completion, Leaf, PreferenceTree, merge_completions
from ttpa.view import main
from ttpa.viewer.page import html_page
from ttpa.viewer.ratios import all_logps
from ttpa.viewer.records import Recorder

HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>{{records}}"
FACTS = {"file": "f", "tokenizer": "t", "weights": "errors", "policy": None, "reference": None}


def num_shared(one, other):
    """The length of the beginning that two sequences have in common."""
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def turn(**arguments):
    return "<tool_call>\n" + json.dumps({"name": "weather", "arguments": arguments}) + "\n</tool_call><|im_end|>"


def make_tree(tokenizer, id, *answers, prompt="Weather?", **gold):
    """A tree of (kind, text), scored against a call with the arguments `gold`; all but a gold leaf were sampled."""
    call = {"name": "weather", "arguments": gold}
    completions = []
    for kind, text in answers:
        ids = tokenizer(text)["input_ids"]
        score = score_tokens(tokenizer, ids, [call], TOOLS)
        leaf = Leaf(-1, kind, "stop", [call] if score.valid else [], score.score, [e.to_leaf() for e in score.errors])
        entropy = None if kind == "gold" else [i / 64 for i in range(len(ids))]
        completions.append(Completion(ids, leaf, entropy and [-value for value in entropy], entropy))
    nodes, leaves = merge_completions(completions)
    return PreferenceTree(id, tokenizer(prompt)["input_ids"], nodes, leaves, strict_pairs(leaves), tools=TOOLS)


@pytest.fixture(scope="module")
def trees(tokenizer):
    """One with three wrong answers and gold, one with nothing to compare, one with text that the page must not run."""
    rome = [("trunk", turn(city="Oslo", days=2)), ("branch", turn(city="Oslo", days="2"))]
    rome += [("branch", turn(city="Rome", days=2, wind=True)), ("gold", turn(city="Rome", days=2))]
    strange = [("trunk", turn(city=HOSTILE)), ("branch", '<b>Kölń 👍</b>\n"' + HOSTILE)]
    strange_tree = make_tree(tokenizer, f"strange {HOSTILE}", *strange, prompt=HOSTILE, city=HOSTILE)
    strange_tree.leaves[1].errors.append({"code": HOSTILE, "call": 0, "pointer": HOSTILE, "tokens": [3, 5]})
    return [
        make_tree(tokenizer, "rome", *rome, city="Rome", days=2),
        make_tree(tokenizer, "alone", ("trunk", "I cannot\nsay.<|im_end|>"), city="Rome"),
        strange_tree,
    ]


@pytest.fixture(scope="module")
def folder(trees, tokenizer, tmp_path_factory):
    """The trees as a file, two models with their tokenizer, and the page of the trees with log-ratios."""
    folder = tmp_path_factory.mktemp("view")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes)
    for seed, name in enumerate(("sampler", "policy")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_trees(folder / "trees.jsonl", [replace(tree, origin={"model": str(folder / "sampler")}) for tree in trees])
    view(folder / "trees.jsonl", "--policy", folder / "policy", "--ref_model", folder / "sampler")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, folder):
    """The page with its first tree, of which nothing went wrong in the end."""
    browser.problems.clear()
    yield browser.open(folder / "trees.html", "tree=rome&color=none")
    assert not browser.problems


def view(*words):
    main([str(word) for word in words])


def recorded(path):
    """What a page holds: its header, and its trees."""
    text = re.search(r'id="records">([A-Za-z0-9+/=]+)</script>', path.read_text(encoding="utf-8"))[1]
    header, *trees = map(json.loads, gzip.decompress(base64.b64decode(text)).splitlines())
    return header, trees


def recorder_of(tokenizer, trees):
    recorder = Recorder(tokenizer, weights=lambda tree, pair: (tree.trained(pair.chosen), tree.trained(pair.rejected)))
    for tree in trees:
        recorder.add(tree)
    return recorder


def test_the_page_holds_every_token_and_what_is_known_of_it(folder, trees, tokenizer):
    header, found = recorded(folder / "trees.html")
    assert [tree["id"] for tree in found] == [tree.id for tree in trees] == [row["id"] for row in header["rows"]]
    for tree, record in zip(trees, found, strict=True):
        assert record["prompt"] == tokenizer.decode(tree.prompt_ids)
        for node, shown in zip(tree.nodes, record["nodes"], strict=True):
            pieces = [header["pieces"][token] for token in shown["tokens"]]
            assert [id for id, _ in pieces] == node.ids
            assert shown["parent"] == node.parent and len(shown["classes"]) == len(node.ids)
            assert shown.get("entropy") == (node.entropy and pytest.approx(node.entropy, abs=1e-4))
    # every byte is a token of its own: a character stands at the first of its bytes
    whole = [header["pieces"][token][1] for token in found[2]["nodes"][found[2]["leaves"][1]["node"]]["tokens"]]
    assert "".join(whole) in tokenizer.decode(trees[2].completion_ids(1)) and "👍" in whole
    assert whole[whole.index("👍") :][1:4] == ["", "", ""]


def test_errors_are_those_on_record_with_what_was_expected(folder, trees):
    _, found = recorded(folder / "trees.html")
    shown = found[0]["leaves"][1]["errors"]
    assert [{**error, "expected": 0, "got": 0} for error in shown] == [
        {**error, "expected": 0, "got": 0} for error in trees[0].leaves[1].errors
    ]
    assert [(e["code"], e["pointer"], e["expected"], e["got"]) for e in shown] == [
        ("value.type", "/days", {"type": "integer"}, "2"),
        ("value.wrong", "/city", "Rome", "Oslo"),
    ]
    assert "expected" not in found[2]["leaves"][1]["errors"][-1], "scoring again does not find the made-up error"


def test_log_ratios_are_those_of_plain_forward_passes(folder, trees):
    header, found = recorded(folder / "trees.html")
    models = [load_model(folder / name, dtype=torch.float32) for name in ("policy", "sampler")]
    tree, record = trees[0], found[0]
    for leaf in range(len(tree.leaves)):
        ids = torch.tensor([tree.prompt_ids + tree.completion_ids(leaf)])
        policy, sampler = (
            model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for model in models
        )
        expected = (policy - sampler)[len(tree.prompt_ids) - 1 :].tolist()
        assert [r for n in tree.path(leaf) for r in record["nodes"][n]["ratios"]] == pytest.approx(expected, abs=2e-4)
    assert 0 < header["scales"]["ratios"] < 20
    small = all_logps(models[0], trees, pack_tokens=200)
    for one, other in zip(small, all_logps(models[0], trees), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_without_a_reference_model_the_policy_is_compared_with_the_sampler(folder, trees, tmp_path):
    view(folder / "trees.jsonl", "--policy", folder / "policy", "--output", tmp_path / "page.html")
    header, found = recorded(tmp_path / "page.html")
    (logps,) = all_logps(load_model(folder / "policy", dtype=torch.float32), trees[:1])
    node, first = trees[0].nodes[0], found[0]["nodes"][0]
    assert first["ratios"] == pytest.approx((logps[: len(node.ids)] - np.array(node.logps)).tolist(), abs=2e-4)
    gold = found[0]["nodes"][trees[0].leaves[3].node]
    assert header["reference"] == "the sampler" and set(gold["ratios"]) == {None}


def test_weights_are_those_of_training_with_the_same_options(folder, trees, tmp_path):
    pair = trees[0].pairs[0]
    fork = num_shared(*map(trees[0].completion_ids, (pair.chosen, pair.rejected)))
    for options, expected in (([], (1.0, 0.0)), (["--error_weight", "3", "--follow_weight", "0.5"], (3.0, 0.5))):
        view(folder / "trees.jsonl", *options, "--output", tmp_path / "page.html")
        rejected = recorded(tmp_path / "page.html")[1][0]["pairs"][0]["weights"][1]
        assert (rejected[fork], rejected[-1]) == expected and set(rejected[:fork]) == {1.0}
    view(folder / "trees.jsonl", "--token_weights", "keys", "--output", tmp_path / "page.html")
    assert recorded(tmp_path / "page.html")[1][0]["pairs"][0]["weights"][1] != rejected


def test_preferences_are_shown_with_the_tokens_of_the_embedded_model(tmp_path, capsys):
    row = {"prompt": "Say it", "chosen": " well enough", "rejected": " badly"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "rejected": row["chosen"]}))
    view(tmp_path / "pairs.jsonl")
    header, (tree,) = recorded(tmp_path / "pairs.html")
    texts = ["".join(header["pieces"][token][1] for token in node["tokens"]) for node in tree["nodes"]]
    assert texts[-2].startswith(" well enough") and texts[-1].startswith(" badly")
    printed = capsys.readouterr().out
    assert re.search(r"dropped: .* 1\n", printed) and "its tokens are those of the embedded model" in printed


def test_the_same_trees_make_the_same_page(folder, tmp_path):
    for name in ("a.html", "b.html"):
        view(folder / "trees.jsonl", "--output", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--file is required"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["trees.jsonl", "--ref_model", "sampler"], "--ref_model is what --policy is compared with"),
        (["trees.jsonl", "--output", "trees.jsonl"], "--output would replace the file"),
        (["trees.jsonl", "--error_weight", "-1"], "the weight 'error' must be"),
        (["trees.jsonl", "--policy", "nowhere"], "nowhere: there is no such folder"),
        (["elsewhere.jsonl"], "sampled by org/model, which is not a folder here: give the model .* with --model"),
        (["large.jsonl"], "tree 'rome' has the token id 99999, and the tokenizer of .* only 1024 entries: .* --model"),
        (
            ["given.jsonl", "--model", "sampler", "--policy", "policy"],
            "no log-probabilities of a sampler .* --ref_model",
        ),
        (["trees.jsonl", "--policy", "small"], "small: tree .* has the token id .*, and the model only 50 tokens"),
    ],
)
def test_what_the_user_has_to_change_is_said(options, problem, folder, trees, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    for name in ("trees.jsonl", "sampler", "policy"):
        (tmp_path / name).symlink_to(folder / name)
    write_trees("elsewhere.jsonl", [replace(trees[0], origin={"model": "org/model"})])
    large = replace(trees[0].nodes[0], ids=[*trees[0].nodes[0].ids[:-1], 99999])
    write_trees("large.jsonl", [replace(trees[0], nodes=[large, *trees[0].nodes[1:]])])
    nodes = [replace(node, logps=None, entropy=None) for node in trees[0].nodes]
    write_trees("given.jsonl", [replace(trees[0], nodes=nodes)])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    small = Qwen3Config(vocab_size=50, num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(small).save_pretrained("small")
    with pytest.raises(InputError, match=problem):
        view(*options)
    assert not list(tmp_path.glob("*.html*"))


def test_the_page_asks_for_nothing_and_runs_nothing_that_a_tree_says(browser, folder, trees):
    text = (folder / "trees.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and not re.search(r"https?:|//\w+\.\w|@import|url\(", text)
    browser.requests.clear()
    page = browser.open(folder / "trees.html", "color=class&search=strange")
    page.wait("document.querySelector('.head h2').textContent.startsWith('strange')")
    assert page.texts(".head h2") == [trees[2].id] and page.texts(".prompt pre") == [HOSTILE]
    first, second = page.texts(".row .text")
    assert HOSTILE in first and "<b>Kölń 👍</b>" in second.replace("·", "") and HOSTILE in second
    page.point(".row:nth-child(2) .t.wrong")
    assert HOSTILE in page.texts("#hover .error")[-1]
    assert page("[window.owned, document.querySelectorAll('img, b b, #hover script').length]") == [None, 0]
    assert [address.split("#")[0] for address in browser.requests] == [(folder / "trees.html").as_uri()]
    assert not browser.problems
    # and what would run or load elsewhere is stopped here
    page("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))")
    page("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')")
    page.wait("document.querySelector('img').complete")
    assert page("window.owned") is None
    assert len(browser.problems) == 3 and all("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


def test_the_name_of_the_file_is_text_too(browser, tokenizer, trees, tmp_path):
    (tmp_path / "page.html").write_text(html_page(recorder_of(tokenizer, trees), title=HOSTILE, facts=FACTS))
    page = browser.open(tmp_path / "page.html")
    assert page.texts("h1") == [HOSTILE] and page("document.title") == f"{HOSTILE} - ttpa"
    assert page("[window.owned, document.querySelectorAll('img').length]") == [None, 0] and not browser.problems


def test_a_row_for_each_leaf_in_which_what_it_shares_is_faint(page, trees, tokenizer):
    tree = trees[0]
    rows = page("[...document.querySelectorAll('.row')].map((row) => row.querySelector('.number').textContent)")
    order = sorted(range(len(tree.leaves)), key=lambda leaf: tree.leaves[leaf].node)
    assert rows == list(map(str, order))
    for at, leaf in enumerate(order, start=1):
        row = f".row:nth-child({at})"
        shown = "".join(page.texts(f"{row} .t")).replace("↵", "\n")
        faint = page.texts(f"{row} .t.shared")
        whole = tokenizer.decode(tree.completion_ids(leaf))
        assert shown[-30:] == whole[-30:] and shown.replace("\n", "") in whole.replace("\n", "")
        if at > 1:
            above = [tokenizer.decode(tree.completion_ids(other)) for other in order[: at - 1]]
            common = max(num_shared(whole, other) for other in above)
            assert whole[:common].replace("\n", "↵").endswith("".join(faint)) and faint
            assert page.texts(f"{row} .t.fork") == [whole[common]]
    assert page("document.querySelectorAll('.row:nth-child(2) .graph .into').length") == 1


def test_a_long_shared_beginning_is_folded_until_it_is_asked_for(browser, tokenizer, tmp_path):
    answers = [("trunk", "word " * 60 + "a"), ("branch", "word " * 60 + "b")]
    recorder = recorder_of(tokenizer, [make_tree(tokenizer, "long", *answers, city="Rome")])
    (tmp_path / "long.html").write_text(html_page(recorder, title="long", facts=FACTS))
    page = browser.open(tmp_path / "long.html")
    assert page.texts(".row:nth-child(2) .fold") == ["276 shared tokens …"]
    assert len(page.texts(".row:nth-child(2) .t")) == 25 and len(page.texts(".row:nth-child(1) .t")) == 301
    page.point(".fold", click=True)
    assert len(page.texts(".row:nth-child(2) .t")) == 301 and not page.texts(".fold")


def test_errors_are_marked_at_their_tokens_and_explained_under_the_pointer(page, trees):
    errors = trees[0].leaves[1].errors
    places = {place for error in errors for place in range(*error["tokens"])}
    row = "[...document.querySelectorAll('.row')].find((row) => row.querySelector('.number').textContent === '1')"
    marked = page(f"[...{row}.querySelectorAll('.t.wrong')].map((token) => Number(token.dataset.place))")
    assert set(marked) == places
    page(f"{row}.id = 'wrong'")
    page.point("#wrong .t.wrong:not(.shared)")
    assert page('document.getElementById("hover").hidden') is False
    assert page.texts("#hover .error b") == ["value.type"] and page.texts("#hover .error > code") == ["/days"]
    assert page.texts("#hover .values code") == ['{"type":"integer"}', '"2"']
    facts = dict(zip(page.texts("#hover dt"), page.texts("#hover dd"), strict=True))
    assert facts["class"] == "argument value" and facts["entropy"].endswith(" nats") and "log-ratio" in facts
    page.point("#wrong .notes .error")
    lit = page("[...document.querySelectorAll('#wrong .t.lit')].map((token) => Number(token.dataset.place))")
    assert lit == list(range(*errors[0]["tokens"]))


def test_a_selected_pair_stands_out_with_its_weights_and_margins(page, trees):
    tree = trees[0]
    assert page.texts("#modes label") == ["entropy", "class", "weight", "log-ratio", "none"]
    page.point(".pairlist tbody tr:nth-child(2)", click=True)
    pair = tree.pairs[1]
    assert page.texts(".row.chosen .number") == [str(pair.chosen)]
    assert page.texts(".row.rejected .number") == [str(pair.rejected)]
    assert len(page.texts(".row.faded")) == len(tree.leaves) - 2
    page.point("#modes label:nth-child(3)", click=True)
    fork = num_shared(*map(tree.completion_ids, (pair.chosen, pair.rejected)))
    colored = page("[...document.querySelectorAll('.row.rejected .t.hue')].map((token) => Number(token.dataset.place))")
    assert colored == [fork]
    assert page.texts(".row.chosen .t.hue.green") and not page.texts(".row.chosen .t.shared.hue")
    cells = page.texts(".pairlist tr.current td")
    assert cells[3] == f"+{pair.margin:.3f}"
    assert re.fullmatch(r"[+−]?\d+\.\d{3}", cells[4]) and cells[4] != cells[5]
    page.press("Escape")
    assert page.texts(".row.chosen .number"), "weights are never without a pair"


def test_colours_say_what_they_are_asked_for(page, trees):
    strengths = (
        "[...document.querySelectorAll('.row:first-child .t')].map((t) => t.style.getPropertyValue('--strength'))"
    )
    assert set(page(strengths)) == {""}
    page.point("#modes label:nth-child(1)", click=True)
    shown = [float(strength) for strength in page(strengths)]
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] > 0.5, "the entropy of this trunk rises"
    page.point("#modes label:nth-child(2)", click=True)
    assert "".join(page.texts(".row:first-child .t.violet")).strip() == '"weather"'
    page.point("#modes label:nth-child(4)", click=True)
    assert page.texts(".row .t.blue") and page.texts(".row .t.red")
    assert "nats against" in page.texts("#legend")[0]


def test_the_keyboard(page):
    place = "document.querySelector('.head h2').textContent"
    for key, there in (("j", "alone"), ("k", "rome"), ("k", "rome")):
        page.press(key)
        assert page(place) == there
    page.press("n", "n")
    assert page.texts(".pairlist tr.current button") == ["1"]
    page.press("p", "p")
    assert page.texts(".pairlist tr.current button") == [str(len(page.texts(".pairlist tbody tr")) - 1)]
    page.press("Escape")
    assert not page.texts(".pairlist tr.current")
    page.press("c")
    assert page("document.querySelector('#modes :checked').value") == "entropy"
    page.press("/", "c")
    assert page("document.getElementById('search').value") == "c"
    page.press("Escape", "c")
    assert page("document.querySelector('#modes :checked').value") == "class"
    page.press("?")
    assert page("document.getElementById('help').open") is True


WANTED = [
    ("search=OSLO", ["rome"]),
    ("search=weather value.type", ["rome"]),
    ("search=cannot", ["alone"]),
    ("search=cannot oslo", []),
    ("code=no_call", ["alone", "strange"]),
    ("kind=gold", ["rome"]),
    ("kind=gold&code=value.wrong", []),
    ("kind=branch&code=value.wrong", ["rome"]),
    ("low=0.3&high=0.6", ["rome"]),
    ("low=1", ["rome", "strange"]),
    ("kind=trunk&low=1", ["strange"]),
    ("paired=no", ["alone"]),
    ("paired=yes&high=0", ["strange"]),
]


def test_search_and_filters(page):
    for wanted, found in WANTED:
        page(f"location.hash = {wanted!r}")
        page.wait(f"location.hash.includes('color=') && document.querySelectorAll('.tree').length === {len(found)}")
        assert [id.split()[0] for id in page.texts(".tree .id")] == found, wanted
        assert page.texts("#count") == [f"{len(found)} of 3 trees"]
        assert page.texts(".head h2") if found else page.texts("#main .empty") == ["No tree fits the search."]


def test_the_address_brings_back_what_was_seen(browser, folder, page):
    page.press("n", "c", "c")
    page(
        "(() => { const kind = document.getElementById('kind'); kind.value = 'gold';"
        "kind.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    fragment = page("location.hash.slice(1)")
    again = browser.open(folder / "trees.html", fragment)
    assert again.texts(".head h2") == ["rome"] and again.texts(".pairlist tr.current button") == ["0"]
    assert again("document.querySelector('#modes :checked').value") == "class" and again.texts("#count") == [
        "1 of 3 trees"
    ]


def test_light_and_dark(page):
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate(scheme)
        seen[scheme] = page(
            "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
            ".map((color) => color.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0))"
        )
    assert seen["light"][0] > 600 > 200 > seen["light"][1] and seen["dark"][0] < 200 < 600 < seen["dark"][1]


def test_a_page_of_five_thousand_trees_shows_those_that_are_in_sight(browser, tokenizer, trees, tmp_path):
    recorder = recorder_of(tokenizer, trees[:1])
    (line,), (row,) = recorder.lines, recorder.rows
    recorder.lines = [line.replace('"id":"rome"', f'"id":"rome {i}"') for i in range(5000)]
    recorder.rows = [{**row, "id": f"rome {i}"} for i in range(5000)]
    (tmp_path / "many.html").write_text(html_page(recorder, title="many", facts=FACTS))
    page = browser.open(tmp_path / "many.html", "tree=rome 4321")
    assert page.texts("#count") == ["5,000 trees"] and page.texts(".head h2") == ["rome 4321"]
    assert "rome 4321" in page.texts("#rows .id") and len(page.texts("#rows .id")) < 50
    page("document.getElementById('list').scrollTop = 1e9")
    page.wait("[...document.querySelectorAll('#rows .id')].at(-1).textContent === 'rome 4999'")
    page(
        "(() => { const search = document.getElementById('search'); search.value = 'rome 2345';"
        "search.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert page.texts("#count") == ["1 of 5,000 trees"]
