"""Verifiers, generated problems with their solvers, and the user's own problem files."""

from __future__ import annotations

import itertools
import json
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.data.reasoning import (
    ArithmeticChain,
    KnightsAndKnaves,
    draw_problems,
    read_problems,
    split_problems,
)
from stillhouse.data.verifiers import (
    AllOf,
    ExactMatch,
    Judgement,
    Numeric,
    final_answer,
    judged,
    last_number,
    verifier_named,
)

# -- answers in texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4 is 7 #### 7", "7"),
        ("# 1 # 2", "2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{3} # 4", "4"),  # the marker comes first
        (r"cut short \boxed{1", None),
        ("nothing marked", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,234.5 then", Fraction("1234.5")),
        ("about -3.", Fraction(-3)),
        ("2/3", Fraction(2, 3)),
        ("40%", Fraction(2, 5)),
        ("5e-2", Fraction(1, 20)),
        ("first 7, then 1/0", Fraction(7)),  # no number: division by zero; the one before it counts
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_exact_and_numeric_matches():
    record = {"answer": "0.50"}
    assert Numeric()("the half: # 1/2", record).correct and not Numeric()("# 0.51", record).correct
    assert Numeric(tolerance=0.03)("# 0.51", record).correct
    assert not Numeric()("no number", record).correct
    assert not ExactMatch()("# 1/2", record).correct and ExactMatch()("#  0.50 ", record).correct
    assert ExactMatch()("Yes", {"answer": "yes"}).correct
    assert not ExactMatch(ignore_case=False)("Yes", {"answer": "yes"}).correct
    with pytest.raises(ConfigError, match="no number"):
        Numeric()("# 1", {"answer": "a pear"})


@pytest.mark.parametrize(
    ("said", "expected"),
    [(True, 1.0), (0.25, 0.25), ((1, "well"), 1.0), (Judgement(0.5, "so"), 0.5)],
)
def test_any_function_is_a_verifier(said, expected):
    found = judged(lambda text, record: said, "x", {})
    assert found.reward == expected and found.correct == (expected >= 0.5)


@pytest.mark.parametrize("said", ["good", None, float("nan"), (1, 2, 3)])
def test_but_it_must_say_a_number(said):
    with pytest.raises(ConfigError, match="must return a number"):
        judged(lambda text, record: said, "x", {})


def test_all_must_agree():
    both = AllOf((ExactMatch(), lambda text, record: (0.0, "too short") if len(text) < 5 else 1.0))
    assert both("#    7", {"answer": "7"}).correct
    assert both("# 7", {"answer": "7"}) == Judgement(0.0, "too short")


def test_verifiers_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def even(text, record):\n    return int(text) % 2 == 0\n")
    assert judged(verifier_named(f"{file}:even"), "4", {}).correct
    both = verifier_named(f"numeric+{file}:even", marker="#")
    assert judged(both, "4", {"answer": "4"}).correct and not judged(both, "3", {"answer": "3"}).correct
    assert judged(verifier_named("operator:eq"), "a", "a").correct  # type: ignore[arg-type]
    for name in ("exakt", f"{file}:odd", "no.such.module:f", f"{tmp_path}/none.py:f"):
        with pytest.raises(ConfigError, match="verifier="):
            verifier_named(name)


# -- arithmetic -----------------------------------------------------------------------------------------------------

PUZZLES = [
    ArithmeticChain(),
    ArithmeticChain(operands=2, operators="*", modulus=5),
    ArithmeticChain(operands=4, operators="+-*", modulus=None),
    KnightsAndKnaves(people=2),
    KnightsAndKnaves(people=3),
]


@pytest.mark.parametrize("puzzle", PUZZLES, ids=repr)
def test_traces_are_right_and_flawed_ones_wrong(puzzle):
    rng = random.Random(1)
    for _ in range(60):
        problem = puzzle.draw(rng)
        assert puzzle(problem["trace"], problem).correct
        assert final_answer(problem["trace"]) == problem["answer"]
        assert not puzzle(problem["flawed"], problem).correct
        assert not puzzle("", problem).correct
        assert ExactMatch()(problem["trace"], problem).correct  # the reference says the same as the solver


@given(st.lists(st.integers(0, 9), min_size=2, max_size=7), st.data())
@settings(max_examples=60, deadline=None)
def test_chains_against_python(numbers, data):
    """Left to right, without precedence: what Python computes with brackets."""
    signs = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    modulus = data.draw(st.sampled_from([None, 5, 7]))
    expression = str(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        expression = f"({expression}{sign}{number})"
    value = eval(expression)
    chain = ArithmeticChain(operands=len(numbers), operators="+-*", modulus=modulus)
    problem = chain.problem(numbers, signs, random.Random(0))
    assert problem["answer"] == str(value % modulus if modulus else value)
    assert chain.solve(problem["prompt"]) == int(problem["answer"])
    assert chain.steps_right(problem["trace"], problem["prompt"])
    assert not chain.steps_right(problem["flawed"], problem["prompt"])


def test_the_mistake_is_systematic():
    """A flawed trace of a sum is the right trace of the same chain without one operand."""
    chain, rng = ArithmeticChain(), random.Random(0)
    for _ in range(40):
        problem = chain.draw(rng)
        numbers = [int(number) for number in problem["prompt"][:-1].split("+")]
        shorter = [numbers[:i] + numbers[i + 1 :] for i in range(1, len(numbers))]
        traces = [chain.problem(one, "+" * (len(one) - 1), rng)["trace"] for one in shorter]
        assert problem["flawed"] in traces or set(numbers[1:]) == {0}


# -- knights and knaves ---------------------------------------------------------------------------------------------


def test_a_puzzle_by_hand():
    """A: B is a knave. B: A and C are alike. If A is a knight, B lies, so C differs from A: knight, knave, knave."""
    puzzle = KnightsAndKnaves(people=3)
    prompt = "A says B is a knave. B says A and C are alike. C says A is a knave."
    assert puzzle.solutions(puzzle.parse(prompt)) == [(True, False, False)]
    assert puzzle("# knight knave knave", {"prompt": prompt}).correct
    for wrong in ("# knight knave knight", "# knave", "knight knave knave", ""):
        assert not puzzle(wrong, {"prompt": prompt}).correct


def test_the_solver_against_truth_tables():
    words = {
        "is a knight": lambda k, a, b: k[a],
        "is a knave": lambda k, a, b: not k[a],
        "are alike": lambda k, a, b: k[a] == k[b],
        "differ": lambda k, a, b: k[a] != k[b],
        "are knights": lambda k, a, b: k[a] and k[b],
        "or": lambda k, a, b: k[a] or k[b],
    }
    puzzle, rng = KnightsAndKnaves(people=3), random.Random(3)
    for _ in range(40):
        problem = puzzle.draw(rng)
        fitting = []
        for way in itertools.product([True, False], repeat=3):
            knight = dict(zip("ABC", way, strict=True))
            fits = True
            for sentence in problem["prompt"].rstrip(".").split(". "):
                speaker, _, said = sentence.partition(" says ")
                people = [word for word in said.split() if len(word) == 1 and word.isupper()]
                kind = "or" if " or " in said else next(w for w in words if said.endswith(w))
                fits &= words[kind](knight, people[0], people[-1]) == knight[speaker]
            if fits:
                fitting.append(" ".join("knight" if k else "knave" for k in way))
        assert fitting == [problem["answer"]]


@pytest.mark.parametrize("prompt", ["A says hello. B says A is a knave.", "A says B is a knave.", ""])
def test_other_texts_are_no_puzzles(prompt):
    with pytest.raises(DataError):
        KnightsAndKnaves(people=2).parse(prompt)


# -- drawing and splitting ------------------------------------------------------------------------------------------


def test_problems_are_different_and_repeatable():
    puzzle = ArithmeticChain()
    held_out = draw_problems(puzzle, 50, seed="held out")
    train = draw_problems(puzzle, 200, seed=("train", 0), without=held_out)
    prompts = [problem["prompt"] for problem in held_out + train]
    assert len(set(prompts)) == 250
    assert train == draw_problems(puzzle, 200, seed=("train", 0), without=held_out)
    assert train != draw_problems(puzzle, 200, seed=("train", 1), without=held_out)
    with pytest.raises(DataError, match="fewer than 100 different"):
        draw_problems(ArithmeticChain(operands=2, modulus=7), 100, seed=0)


def test_the_user_s_problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": i + 1, "level": "easy"} for i in range(10)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    problems = read_problems(str(file), prompt="question")
    assert problems[0] == {**rows[0], "prompt": "0 + 1?", "answer": "1"}
    train, test = split_problems(problems, share=0.2)
    assert (len(train), len(test)) == (8, 2)
    again = split_problems(list(reversed(problems)), share=0.2)[1]
    assert {p["prompt"] for p in test} == {p["prompt"] for p in again}  # whatever the order
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "problems.parquet")
    assert read_problems(str(tmp_path / "problems.parquet"), prompt="question") == problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{broken', "line 2: not JSON"),
        ('{"prompt": "a"}', "line 1: no 'answer'"),
        ('["a", "b"]', "line 1: must be an object"),
        ("", "no problem in it"),
        ('{"prompt": "", "answer": "b"}', "line 1: no 'prompt'"),
    ],
)
def test_bad_problem_files(tmp_path, text, message):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_problems(str(file))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_problems(str(tmp_path / "none.jsonl"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_problems(str(tmp_path / "p.parquet"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_problems(str(tmp_path / "latin.jsonl"))
    with pytest.raises(DataError, match="at least two"):
        split_problems([{"prompt": "a", "answer": "b"}], share=0.5)


def test_zero_is_an_answer(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1-1", "answer": 0}')
    assert read_problems(str(tmp_path / "p.jsonl"))[0]["answer"] == "0"
