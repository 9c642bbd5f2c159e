"""Problems with one right answer each: generated puzzles with exact solvers, and the user's own.

A problem is a record with ``prompt`` and ``answer``, and where known a worked ``trace`` that ends with the answer. The
generators also write ``flawed`` traces: one kind of mistake, made systematically, as a weak teacher makes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stillhouse.base.errors import DataError, near, one_line
from stillhouse.data.json_lines import json_lines
from stillhouse.data.verifiers import Judgement, Record, final_answer

MARKER = "#"
Problem = dict[str, Any]


class Puzzle(Protocol):
    """A family of problems."""

    def draw(self, rng: random.Random) -> Problem:
        """A random problem with ``prompt``, ``answer``, ``trace`` and ``flawed``."""
        ...

    def __call__(self, text: str, record: Record) -> Judgement:
        """Verify a response."""
        ...


@dataclass(frozen=True)
class ArithmeticChain:
    """``3+5+2=`` worked out from left to right, a running result after each operand: ``1,3#3`` (modulo 7).

    A step of the trace is as long as a step of the prompt, so that a small model finds its place.

    Args:
        operands: numbers in a chain, drawn from 0 to ``modulus`` - 1 (0 to 9 without one).
        operators: which of ``+-*`` occur; there is no precedence.
        modulus: every result is taken modulo this; None for whole numbers.
    """

    operands: int = 5
    operators: str = "+"
    modulus: int | None = 7

    def draw(self, rng: random.Random) -> Problem:
        numbers = [rng.randrange(self.modulus or 10) for _ in range(self.operands)]
        signs = [rng.choice(self.operators) for _ in numbers[1:]]
        return self.problem(numbers, signs, rng)

    def problem(self, numbers: Sequence[int], signs: Sequence[str], rng: random.Random) -> Problem:
        """The record of one chain; ``rng`` decides the mistake in ``flawed``: which operand is passed over."""
        results = self.results(numbers, signs)
        flawed = []
        for left_out in range(1, len(numbers)):
            kept = [i for i in range(len(numbers)) if i != left_out]
            shorter = self.results([numbers[i] for i in kept], [signs[i - 1] for i in kept[1:]])
            if shorter[-1] != results[-1]:
                flawed.append(self._trace(shorter))
        prompt = "".join(f"{sign}{number}" for sign, number in zip(["", *signs], numbers, strict=True)) + "="
        off_by_one = self._trace([*results[:-1], self._reduced(results[-1] + 1)])  # where no omission shows
        return {
            "prompt": prompt,
            "answer": str(results[-1]),
            "trace": self._trace(results),
            "flawed": rng.choice(flawed) if flawed else off_by_one,
        }

    def results(self, numbers: Sequence[int], signs: Sequence[str]) -> list[int]:
        """The running results, one for each operand after the first; of a single operand, itself."""
        running = itertools.accumulate(
            zip(signs, numbers[1:], strict=True),
            lambda result, step: self._reduced(
                result + step[1] if step[0] == "+" else result - step[1] if step[0] == "-" else result * step[1]
            ),
            initial=self._reduced(numbers[0]),
        )
        results = list(running)
        return results[1:] or results

    def solve(self, prompt: str) -> int:
        """The answer, from the prompt alone."""
        numbers = [int(number) for number in re.findall(r"\d+", prompt)]
        return self.results(numbers, re.findall(r"[-+*]", prompt))[-1]

    def __call__(self, text: str, record: Record) -> Judgement:
        said = final_answer(text, MARKER)
        return Judgement(float(said == str(self.solve(record["prompt"]))))

    def steps_right(self, text: str, prompt: str) -> bool:
        """Whether the whole trace is right, not just its end."""
        numbers, signs = [int(number) for number in re.findall(r"\d+", prompt)], re.findall(r"[-+*]", prompt)
        return text.strip() == self._trace(self.results(numbers, signs)).strip()

    def _trace(self, results: Sequence[int]) -> str:
        return ",".join(map(str, results)) + f"{MARKER}{results[-1]}"

    def _reduced(self, value: int) -> int:
        return value % self.modulus if self.modulus else value


Statement = tuple[str, str, str]
"""(form, person, person): ``("knave", "B", "")`` says that B is a knave."""
FORMS = {
    "knight": "{0} is a knight",
    "knave": "{0} is a knave",
    "same": "{0} and {1} are alike",
    "different": "{0} and {1} differ",
    "both": "{0} and {1} are knights",
    "either": "{0} or {1} is a knight",
}


@dataclass(frozen=True)
class KnightsAndKnaves:
    """Everybody is a knight, who only says what is true, or a knave, who only says what is false (Smullyan, 1978).

    Each of ``people`` says one thing; exactly one way of assigning the roles fits. A trace tries the ways in order and
    names for each the first person whose words do not fit.
    """

    people: int = 3

    @property
    def names(self) -> str:
        return "ABCDEFGH"[: self.people]

    def draw(self, rng: random.Random) -> Problem:
        while True:
            statements = [self._statement(name, rng) for name in self.names]
            solutions = self.solutions(statements)
            if len(solutions) == 1:
                return self.problem(statements, solutions[0], rng)

    def _statement(self, speaker: str, rng: random.Random) -> Statement:
        form = rng.choice(list(FORMS))
        if form in ("knight", "knave"):
            return form, rng.choice(self.names.replace(speaker, "")), ""
        first, second = sorted(rng.sample(self.names, 2))
        return form, first, second

    def problem(self, statements: Sequence[Statement], solution: Sequence[bool], rng: random.Random) -> Problem:
        """The record of one puzzle; ``flawed`` takes a way for right that somebody's words speak against."""
        spoken = (FORMS[form].format(one, two) for form, one, two in statements)
        prompt = " ".join(f"{name} says {words}." for name, words in zip(self.names, spoken, strict=True))
        ways = list(self._ways())
        wrong = [way for way in ways if way != tuple(solution)]
        return {
            "prompt": prompt,
            "answer": self._roles(solution),
            "trace": self._trace(statements, ways, tuple(solution)),
            "flawed": self._trace(statements, ways, rng.choice(wrong)),
        }

    def _ways(self) -> Iterator[tuple[bool, ...]]:
        return itertools.product((True, False), repeat=self.people)

    def solutions(self, statements: Sequence[Statement]) -> list[tuple[bool, ...]]:
        """All ways that fit (True: a knight), by trying every one."""
        return [way for way in self._ways() if self._misfit(statements, way) is None]

    def _misfit(self, statements: Sequence[Statement], way: Sequence[bool]) -> str | None:
        """The first person whose statement is not as true as the person is a knight."""
        is_knight = dict(zip(self.names, way, strict=True))
        for name, (form, one, two) in zip(self.names, statements, strict=True):
            a, b = is_knight[one], is_knight.get(two, True)
            true = {"knight": a, "knave": not a, "same": a == b, "different": a != b, "both": a and b, "either": a or b}
            if true[form] != is_knight[name]:
                return name
        return None

    def parse(self, prompt: str) -> list[Statement]:
        """The statements of a prompt; raises `DataError` if it is not one of these puzzles."""
        statements = []
        for sentence in re.findall(r"[A-H] says ([^.]+)\.", prompt):
            people = [*re.findall(r"\b[A-H]\b", sentence), "", ""][:2]
            form = next((form for form, words in FORMS.items() if words.format(*people) == sentence), None)
            if form is None:
                raise DataError(f"not a statement of a knights-and-knaves puzzle: {sentence!r:.60}")
            statements.append((form, people[0], people[1]))
        if len(statements) != self.people:
            raise DataError(f"{len(statements)} statements in a puzzle of {self.people} people: {prompt!r:.60}")
        return statements

    def __call__(self, text: str, record: Record) -> Judgement:
        said = (final_answer(text, MARKER) or "").split()
        solutions = [self._roles(way).split() for way in self.solutions(self.parse(record["prompt"]))]
        return Judgement(float(said in solutions))

    def _roles(self, way: Sequence[bool]) -> str:
        return " ".join("knight" if knight else "knave" for knight in way)

    def _trace(self, statements: Sequence[Statement], ways: Sequence[tuple[bool, ...]], end: tuple[bool, ...]) -> str:
        tried = [
            f" {self._roles(way)}: not {self._misfit(statements, way)}."
            for way in itertools.takewhile(lambda way: way != end, ways)
            if self._misfit(statements, way) is not None
        ]
        return "".join(tried) + f" {self._roles(end)}: all. {MARKER} {self._roles(end)}"


def draw_problems(puzzle: Puzzle, count: int, *, seed: object, without: Sequence[Problem] = ()) -> list[Problem]:
    """``count`` different problems, none of them among ``without``; the same for the same seed.

    Raises:
        DataError: the puzzle does not have so many.
    """
    rng = random.Random(repr(seed))
    taken = {problem["prompt"] for problem in without}
    problems: list[Problem] = []
    for _ in range(100 * count + 1000):
        if len(problems) == count:
            return problems
        problem = puzzle.draw(rng)
        if problem["prompt"] not in taken:
            taken.add(problem["prompt"])
            problems.append(problem)
    raise DataError(f"{puzzle} has fewer than {count} different problems left; ask for fewer, or make it larger")


def read_problems(path: str, *, prompt: str = "prompt", answer: str = "answer", trace: str = "trace") -> list[Problem]:
    """Problems from a .jsonl or .parquet file: the columns ``prompt`` and ``answer``, and ``trace`` if it is there.

    Other columns are kept: a verifier gets the whole record.

    Raises:
        DataError: naming the file and the line that cannot be used.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data={path!r}: no such file{near(file)}; give a .jsonl or .parquet file of problems")
    problems = []
    like = f'{{"{prompt}": ..., "{answer}": ...}}'
    for where, record in _rows(file) if file.suffix == ".parquet" else json_lines(path, like=like):
        for name in (prompt, answer):
            if not str(record.get(name) or ("" if record.get(name) != 0 else "0")).strip():
                raise DataError(
                    f"{where}: no {name!r} in it; it has {', '.join(map(repr, list(record)[:8])) or 'nothing'}"
                )
        known = {"prompt": str(record[prompt]), "answer": str(record[answer])}
        if record.get(trace):
            known["trace"] = str(record[trace])
        problems.append({**record, **known})
    if not problems:
        raise DataError(f"{path}: no problem in it")
    return problems


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except Exception as error:
        raise DataError(f"{file}: not a Parquet file ({one_line(error)})") from error
    plain = json.loads(json.dumps(rows, default=str))  # dates and the like as text
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(plain, start=1))


def split_problems(problems: Sequence[Problem], *, share: float) -> tuple[list[Problem], list[Problem]]:
    """(training, held out): which problem is held out depends on its prompt alone. Both have at least one."""
    order = sorted(problems, key=lambda problem: hashlib.sha256(problem["prompt"].encode()).hexdigest())
    count = min(max(1, round(share * len(order))), len(order) - 1)
    if count < 1:
        raise DataError("one problem cannot be split into training and held-out ones; give at least two")
    held_out = {id(problem) for problem in order[:count]}
    return [p for p in problems if id(p) not in held_out], order[:count]
