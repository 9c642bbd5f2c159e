"""Teacher hacking (card 019): who writes, who teaches whom and what is measured, asked of the system's own stages."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow.parquet as pq
import pytest
import staged
import torch

from stillhouse.base.errors import ConfigError
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import Coder
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.symbol_tokenizer import symbol_tokenizer
from stillhouse.rl.sampling import LiveSampler
from stillhouse.systems import get_system
from stillhouse.systems.language import teacher_hacking
from stillhouse.tasks.oracle_language import (
    END,
    LETTERS,
    PROMPT,
    OracleLanguage,
    drawn_prompts,
    oracle_network,
    oracle_task,
)

SMALL = OracleLanguage(prompts=60, selection=8, validation=12)
VALUES = {"oracle_texts": 40, "prompts": 16, "begin_steps": 3, "batch_size": 8, "steps": 20, "own_prompts": 12}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> staged.Walked:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_hacking, "oracle_task", partial(oracle_task, recipe=SMALL))
        system = get_system("teacher-hacking").make(**VALUES)
        return staged.walk(system, tmp_path_factory.mktemp("hacking"))


@pytest.fixture(scope="module")
def oracle() -> Any:
    return oracle_network(OracleLanguage(), seed=0)


@pytest.fixture(scope="module")
def teacher(walked: staged.Walked) -> Any:
    return load_causal_lm(str(walked.artifacts["teacher"].path))[0].eval()


def records(walked: staged.Walked, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = pq.read_table(walked.artifacts[name].data_file()).to_pylist()
    return [(tuple(row["prompt"]), tuple(row["response"])) for row in rows]


def rows_of(source: Any, count: int = 20) -> set[tuple[int, ...]]:
    found = set()
    for _ in range(count):
        batch = next(source)
        ends = batch["attention_mask"].sum(-1).tolist()
        found |= {tuple(row[:end]) for row, end in zip(batch["input_ids"].tolist(), ends, strict=True)}
    return found


def test_the_stages(walked):
    names = ["oracle-text", "teacher", "begin", "teacher-text", "student", "evaluation", "hacking"]
    assert list(walked.stages) == names


@pytest.mark.parametrize(("name", "count"), [("oracle-text", 40), ("teacher-text", 16)])
def test_the_oracle_writes_for_the_teacher_and_the_teacher_for_the_student(walked, oracle, teacher, name, count):
    found = records(walked, name)
    coder = Coder(symbol_tokenizer(LETTERS))
    prompts = [prompt for prompt, _ in found][:32]
    said = {
        who: [one.ids for one in LiveSampler(model, coder, 6).write(prompts, seed=0)]
        for who, model in (("oracle-text", oracle), ("teacher-text", teacher))
    }
    assert len(found) == count and [response for _, response in found[:32]] == said[name]
    assert said["oracle-text"] != said["teacher-text"]


def test_who_reads_what(walked):
    """Teacher and beginner the oracle's text, the student the teacher's, to prompts that neither of them has seen."""
    told, taught = records(walked, "oracle-text"), records(walked, "teacher-text")
    assert not {prompt for prompt, _ in told} & {prompt for prompt, _ in taught}
    of_oracle, of_teacher = ({(*prompt, *response) for prompt, response in rows} for rows in (told, taught))
    for name, rows in (("teacher", of_oracle), ("begin", of_oracle), ("student", of_teacher)):
        found = rows_of(walked.train(name).source)
        assert found <= rows and len(found) > len(rows) // 2


def test_text_that_is_written_anew(walked, teacher, tmp_path):
    """fresh: the teacher answers the same prompts at every visit in other words; on_policy: the student writes."""
    fixed = {(*prompt, *response) for prompt, response in records(walked, "teacher-text")}
    prompts = {prompt for prompt, _ in records(walked, "teacher-text")}
    length = len(next(iter(prompts)))
    for values, writer in (({"fresh": True}, "teacher"), ({"on_policy": 1.0}, "student")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher_hacking, "oracle_task", partial(oracle_task, recipe=SMALL))
            system = get_system("teacher-hacking").make(**VALUES, **values)
            stage = staged.walk(system, tmp_path / writer).train("student")
        source: Any = stage.source
        found = rows_of(source)
        assert {row[:length] for row in found} <= prompts and not found <= fixed and len(found) > 2 * len(fixed)
        model = source.writer.model
        if writer == "student":
            assert model is staged.model(stage)
        else:
            state = model.state_dict()
            assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())


def test_who_begins_where(walked):
    begun, _ = load_causal_lm(str(walked.artifacts["begin"].path))
    student = staged.model(walked.train("student")).state_dict()
    assert all(torch.equal(student[name], value) for name, value in begun.state_dict().items())
    widths = {name: staged.model(walked.train(name)).config.hidden_size for name in ("teacher", "begin", "student")}
    assert widths == {"teacher": 64, "begin": 32, "student": 32}


def test_the_budget_and_the_course(walked):
    assert [walked.train(name).steps for name in ("teacher", "begin", "student")] == [40, 3, 20]  # 8 passes of 40 / 8
    student = walked.train("student")
    assert student.eval_every == 1 and student.best is None
    assert {staged.player(student).lr(Progress(step, 20)) for step in (0, 7, 19)} == {1.0}


def test_the_student_learns_from_the_teachers_distributions(walked, oracle, teacher):
    stage = walked.train("student")
    batch = next(stage.source)
    q = staged.log_probabilities(staged.model(stage), batch)
    mask = batch["loss_mask"][:, 1:].bool()
    kl = {}
    for name, model in (("teacher", teacher), ("oracle", oracle)):
        p = staged.log_probabilities(model, batch)
        kl[name] = float((p.exp() * (p - q)).sum(-1)[mask].mean())
    assert staged.objective(stage)(batch).item() == pytest.approx(kl["teacher"], rel=1e-4)
    assert abs(kl["oracle"] / kl["teacher"] - 1) > 0.01


def test_the_proxy_is_the_distance_to_the_teacher_and_the_golden_one_that_to_the_oracle(walked, oracle, teacher):
    """Whoever stands in the student's place: the teacher has no proxy, the oracle no golden distance."""
    watched: Any = walked.train("student").evaluate
    assert watched.args == (staged.model(walked.train("student")),)
    at_teacher, at_oracle = watched.func(teacher), watched.func(oracle)
    assert at_teacher["proxy"] == pytest.approx(0, abs=1e-5) and at_teacher["golden"] > 0.01
    assert at_oracle["golden"] == pytest.approx(0, abs=1e-5) and at_oracle["proxy"] > 0.01
    student = watched()
    assert student["proxy"] > 0.01 and student["golden"] > 0.01 and student["proxy"] != student["golden"]
    evaluation: Any = walked.stages["evaluation"]
    measured = next(part for part in evaluation.function.args if callable(part))
    at_teacher, at_oracle = measured(teacher), measured(oracle)
    assert at_teacher["proxy_js"] == pytest.approx(0, abs=1e-5) and at_teacher["golden_js"] > 1e-3
    assert at_oracle["golden_js"] == pytest.approx(0, abs=1e-5) and at_oracle["proxy_js"] > 1e-3
    golden = at_teacher["golden"]  # before the teacher teaches, only this is watched: of the teacher, and of a beginner
    for name in ("teacher", "begin"):
        early: Any = walked.train(name).evaluate
        assert early.args == (walked.train(name),) and set(early()) == {"golden"}
    assert watched.func(teacher)["golden"] == pytest.approx(golden)


# -- the language -----------------------------------------------------------------------------------------------------


def test_no_prompt_comes_twice():
    count = 4640  # of the embedded language
    generator = torch.Generator().manual_seed(3)
    prompts = drawn_prompts(count, generator)
    assert len({tuple(prompt) for prompt in prompts}) == count
    assert all(len(prompt) == PROMPT and 0 <= min(prompt) <= max(prompt) < END for prompt in prompts)
    assert (
        prompts
        == drawn_prompts(count, torch.Generator().manual_seed(3))
        != drawn_prompts(count, torch.Generator().manual_seed(4))
    )
    shares = torch.tensor(prompts).flatten().bincount(minlength=END) / (count * PROMPT)
    assert shares.tolist() == pytest.approx([1 / END] * END, rel=0.1)  # every letter as often
    with pytest.raises(ConfigError, match="20,736 different"):
        drawn_prompts(END**PROMPT + 1, generator)


def test_no_measured_prompt_was_trained_on(tmp_path):
    from stillhouse.core.run import Run

    generator = oracle_task(
        get_system("teacher-hacking").make(), Run(tmp_path, quiet=True), OracleLanguage(validation=512, prompts=2000)
    )
    with pytest.raises(StopIteration) as done:
        next(generator)
    windows = done.value.value.windows
    train, selection, validation = (
        {tuple(row[:PROMPT]) for row in part[:]["input_ids"].tolist()}
        for part in (windows.train, windows.selection, windows.validation)
    )
    assert (len(train), len(selection), len(validation)) == (2000, 128, 512)
    assert not train & validation and not train & selection and not selection & validation


# -- fields that nothing reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"text": "teacher"}, "text=teacher"),
        ({"teacher_topk": 8}, "teacher_topk=8"),
        ({"teacher_texts": 50}, "teacher_texts=50"),
        ({"lm_weight": 0.5, "lm_data": "my.txt"}, "lm_weight=0.5, lm_data=my.txt"),
        ({"replay": 100, "on_policy": 0.5}, "replay=100"),
        ({"own_responses": 4}, "own_responses=4"),
        ({"baseline": True}, "baseline=True"),
        ({"keep": "best"}, "keep=best"),
        ({"own_divergence": "reverse-kl"}, "own_divergence=reverse-kl without on_policy"),
    ],
)
def test_fields_that_are_not_read_are_refused(values, said):
    with pytest.raises(ConfigError, match="teacher-hacking does not use") as found:
        next(get_system("teacher-hacking").make(**values).stages(None))  # type: ignore[arg-type]
    assert said in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("values", [{}, {"own_divergence": "reverse-kl", "on_policy": 0.5}, {"text": "data"}])
def test_fields_that_are_read_are_not(values):
    get_system("teacher-hacking").make(**values).refuse_unread()
