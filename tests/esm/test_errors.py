from ttpa.esm.errors import FATAL, MAJOR, MINOR, PENALTY, Error


def test_every_code_has_one_of_three_penalties():
    assert set(PENALTY.values()) == {FATAL, MAJOR, MINOR} and FATAL == 1.0 > MAJOR > MINOR > 0.0


def test_the_record_of_a_leaf():
    assert Error("value.wrong", 1, "/a", 1, 2, span=(3, 4), tokens=(5, 6)).to_leaf() == {
        "code": "value.wrong",
        "call": 1,
        "pointer": "/a",
        "tokens": [5, 6],
    }
    assert Error("no_call", 0).to_leaf()["tokens"] is None
