"""How different the responses to one prompt are."""

from __future__ import annotations

import math

import pytest

from stillhouse.metrics.bleu import bleu
from stillhouse.metrics.diversity import distinct, diversity, self_bleu


def test_distinct_by_hand():
    assert distinct(["abab", "ab"], 1) == pytest.approx(2 / 6)
    assert distinct(["abab", "ab"], 2) == pytest.approx(2 / 4)  # ab, ba of ab, ba, ab, ab
    assert distinct(["abc", "def"], 2) == 1.0 and distinct(["a", "b"], 2) == 1.0


def test_self_bleu_of_two_is_the_mean_of_their_bleus():
    one, other = list("acbdacb"), list("acdbacbba")
    expected = (bleu([one], [other]) + bleu([other], [one])) / 2
    assert self_bleu([one, other]) == pytest.approx(expected)


def test_self_bleu_against_an_independent_count():
    """With three, n-grams may be found in any other, at most as often as one other has them."""
    responses = ["aab", "abb", "aaaa"]
    # of aab: a a b all known (aaaa has four a, abb one b); aa in aaaa, ab in abb; aab nowhere: 1/2 of one
    first = math.exp((math.log(1) + math.log(1) + math.log(1 / 2)) / 3)
    # of abb: a, b known, the second b not (one in aab): 2/3; ab known, bb not: 1/2; abb nowhere: 1/2
    second = math.exp((math.log(2 / 3) + math.log(1 / 2) + math.log(1 / 2)) / 3)
    # of aaaa: two a's known: 2/4; aa once: 1/3; aaa nowhere: 1/2 of two; aaaa nowhere: 1/4 of one; longer than others
    third = math.exp((math.log(2 / 4) + math.log(1 / 3) + math.log(1 / 2 / 2) + math.log(1 / 4 / 1)) / 4)
    assert self_bleu(responses) == pytest.approx((first + second + third) / 3)
    assert self_bleu(["ab", "abcd"]) == pytest.approx((math.exp(1 - 4 / 2) + bleu(["abcd"], ["ab"])) / 2)


def test_the_ends():
    same, apart = [["abcdef"] * 4], [["abcd", "efgh", "ijkl"]]
    assert diversity(same).self_bleu == 1.0 and diversity(same).different == 0.25
    assert diversity(apart).self_bleu == 0.0 and diversity(apart).different == 1.0
    assert diversity(apart).distinct == {1: 1.0, 2: 1.0, 4: 1.0}
    assert diversity(same).distinct[2] == pytest.approx(1 / 4)
    assert self_bleu(["", "a"]) == 0.0 and self_bleu(["", ""]) == 1.0


def test_prompts_are_kept_apart():
    """What differs from prompt to prompt is no diversity."""
    groups = [["ab", "ab"], ["cd", "cd"], ["ef", "gh"]]
    found = diversity(groups)
    assert found.different == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found.distinct[1] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found.self_bleu == pytest.approx(2 / 3)
    assert math.isnan(diversity([["ab"]]).self_bleu)  # one response says nothing
