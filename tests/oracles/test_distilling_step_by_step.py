"""Distilling step-by-step (card 071): two tasks and their weights, empty rationales, padding, parsing, prediction."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.objective import Objective, Term
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.rationales import Example, cot_prompt, parse_cot, spoilt
from stillhouse.models.text_to_text import TextToText, load_text_to_text
from stillhouse.models.tokenizers import train_bpe
from stillhouse.objectives.sequence import rationale_multitask, sequence_cross_entropy
from stillhouse.systems import get_system
from stillhouse.tasks.reasoning_text import (
    MEANING,
    NUMBERS,
    Tasks,
    curve_mean,
    demo_questions,
    demo_rule,
    demo_student,
    extract_traces,
    load_examples,
    spoilt_traces,
)
from stillhouse.teachers import Answer, Request
from stillhouse.workflow import run_system

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from _endpoint import Endpoint, serving

LENGTHS = {"max_source": 40, "max_label": 4, "max_rationale": 16}
ROWS = [
    {"input": "sevvn thrue", "predict": "4", "explain": "7 and 3"},
    {"input": "one nine", "predict": "8", "explain": "1 and 9"},
    {"input": "two xwo", "predict": "0", "explain": "2 and 2"},
]


def causal(seed: int = 0) -> TextToText:
    tokenizer = train_bpe([], vocab_size=258, special_tokens=("<|endoftext|>", "<|padding|>"))
    tokenizer.pad_token = "<|padding|>"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    torch.manual_seed(seed)
    return TextToText(LlamaForCausalLM(config), tokenizer)


STUDENTS = pytest.mark.parametrize("make", [demo_student, causal], ids=["t5", "causal"])


def tasks(student: TextToText, *names: str) -> Tasks:
    return Tasks.of(student, names or ("predict", "explain"), **LENGTHS)


def gradients(student: TextToText, objective: Objective, batch: Any) -> dict[str, Tensor]:
    student.model.zero_grad()
    objective(batch, 0.0).backward()
    return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}


def observed(student: TextToText) -> Observed:
    return Observed(student.model.train(), name="student", options={"use_cache": False})


# -- the loss -------------------------------------------------------------------------------------------------------


@STUDENTS
def test_each_task_is_the_loss_that_transformers_computes(make):
    """Token-mean cross-entropy; both tasks are forwards of the same model."""
    student = make(0)
    batch = tasks(student).batch(ROWS)
    for entry in ("predict", "explain"):
        fed = dict(batch[entry])
        labels = fed.pop("labels")
        logits = student.model(**fed).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        term = sequence_cross_entropy(observed(student), entry)
        torch.testing.assert_close(term(batch, 0.0), expected)
        if student.encoder_decoder:
            reference = student.model(fed["input_ids"], fed["attention_mask"], labels=labels).loss
            torch.testing.assert_close(expected, reference)


@STUDENTS
def test_targets_are_the_text_and_its_end(make):
    student = make(0)
    fed = tasks(student).batch(ROWS)["explain"]
    for row, labels in zip(ROWS, fed["labels"].tolist(), strict=True):
        ids = [token for token in labels if token != -100]
        assert student.tokenizer.decode(ids[:-1]) == row["explain"] and ids[-1] == student.tokenizer.eos_token_id
    text = student.tokenizer.decode(fed["input_ids"][0][fed["attention_mask"][0].bool()])
    assert text.startswith("explain: sevvn thrue")
    if not student.encoder_decoder:  # what precedes the target is read, not learnt
        first = next(place for place, token in enumerate(fed["labels"][0].tolist()) if token != -100)
        assert student.tokenizer.decode(fed["input_ids"][0][: first + 1]) == "explain: sevvn thrue\n"
        assert fed["input_ids"][0][first + 1] == fed["labels"][0][first]


class Fixed(Term):
    """A loss of a given size for a parameter."""

    def __init__(self, model: Observed, value: float) -> None:
        super().__init__(weight=model.parameter("weight"))
        self.value = value

    def compute(self, *, weight: Tensor, **_: Any) -> Tensor:
        return self.value * weight.sum()


def test_both_forms_of_the_loss(monkeypatch):
    """L_label = 2, L_rationale = 4: the code's form with alpha = 0.5 gives 3, the paper's with lambda = 1 gives 6."""
    from stillhouse.objectives import sequence

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    sizes = {"predict": 2.0, "explain": 4.0}
    student = Observed(model)
    monkeypatch.setattr(sequence, "sequence_cross_entropy", lambda student, entry: Fixed(student, sizes[entry]))
    batch = {"inputs": torch.ones(1, 1)}

    def loss(**form: Any) -> float:
        return rationale_multitask(student, **form)(batch, 0.0).item()

    assert loss() == 6.0
    assert loss(rationale_weight=0.25) == 3.0
    assert loss(rationale_weight=None, alpha=0.5) == 3.0
    assert loss(rationale_weight=None, alpha=0.75) == 2.5
    assert loss(rationale_weight=None, alpha=1.0) == loss(rationale_weight=0.0) == 2.0
    assert loss(rationale_weight=None, alpha=0.0) == 4.0
    objective = rationale_multitask(student, rationale_weight=0.5)
    weights = [value.weight for value in objective.evaluate(Turn(objective.signals()), batch, Progress(0, 1))]
    assert weights == [1.0, 0.5]


@STUDENTS
def test_the_forms_have_the_same_direction(make):
    """alpha = 0.5 is the paper's form at half the size; alpha = 1 is fine-tuning on labels, to the bit."""
    student = make(0)
    batch = tasks(student).batch(ROWS)
    paper = gradients(student, rationale_multitask(observed(student)), batch)
    code = gradients(student, rationale_multitask(observed(student), rationale_weight=None, alpha=0.5), batch)
    label = gradients(student, sequence_cross_entropy(observed(student), "predict"), batch)
    alone = gradients(student, rationale_multitask(observed(student), rationale_weight=None, alpha=1.0), batch)
    for name in label:
        torch.testing.assert_close(2 * code[name], paper[name])
        assert torch.equal(alone[name], label[name])
    assert any(not torch.allclose(paper[name], label[name]) for name in label)  # the rationale does something


@STUDENTS
def test_both_tasks_in_one_step(make):
    """The gradient is the sum of the two tasks' own, and each task is one forward."""
    student = make(0)
    batch = tasks(student).batch(ROWS)
    forwards = []
    hook = student.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    both = gradients(student, rationale_multitask(observed(student), rationale_weight=0.3), batch)
    assert len(forwards) == 2
    hook.remove()
    label = gradients(student, sequence_cross_entropy(observed(student), "predict"), batch)
    rationale = gradients(student, sequence_cross_entropy(observed(student), "explain"), batch)
    for name in both:
        torch.testing.assert_close(both[name], label[name] + 0.3 * rationale[name], rtol=1e-4, atol=1e-6)


@STUDENTS
def test_an_empty_rationale_contributes_nothing(make):
    student = make(0)
    empty = [{**row, "explain": ""} for row in ROWS]
    batch = tasks(student).batch(empty)
    assert (batch["explain"]["labels"] == -100).all()
    assert sequence_cross_entropy(observed(student), "explain")(batch, 0.0).item() == 0.0
    both = gradients(student, rationale_multitask(observed(student)), batch)
    label = gradients(student, sequence_cross_entropy(observed(student), "predict"), batch)
    for name in label:
        torch.testing.assert_close(both[name], label[name], rtol=0, atol=0)
    some = tasks(student).batch([{**ROWS[0], "explain": ""}, *ROWS[1:]])  # the others count as if it were not there
    others = tasks(student).batch(ROWS[1:])
    term = sequence_cross_entropy(observed(student), "explain")
    torch.testing.assert_close(term(some, 0.0), term(others, 0.0))


@STUDENTS
def test_padding_changes_nothing(make):
    """A long neighbour pads the short ones; their losses stay what they are alone."""
    student = make(0)
    term = sequence_cross_entropy(observed(student), "explain")
    long = {"input": "eight eight", "predict": "0", "explain": "8 and 8, a b c"}

    def total(rows: list[dict[str, str]]) -> float:
        batch = tasks(student).batch(rows)
        count = int((batch["explain"]["labels"] != -100).sum())
        return term(batch, 0.0).item() * count

    short = {"input": "two x", "predict": "0", "explain": "2"}
    assert total([short, long]) == pytest.approx(total([short]) + total([long]), rel=1e-5)


def test_lengths_are_limits():
    student = demo_student(0)
    fed = tasks(student).batch([{"input": "x" * 200, "predict": "123456789", "explain": "y" * 100}])
    assert fed["predict"]["input_ids"].shape[1] == 40
    assert fed["predict"]["labels"].shape[1] == 4 and fed["explain"]["labels"].shape[1] == 16
    assert fed["explain"]["labels"][0, -1] == student.tokenizer.eos_token_id


# -- in use ---------------------------------------------------------------------------------------------------------


@STUDENTS
def test_prediction_writes_the_label_alone(make):
    """A student that has learnt both tasks writes as many tokens as the label has, its end included."""
    student = make(0)
    work = tasks(student)
    objective = rationale_multitask(observed(student))
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=2e-2)
    batch = work.batch(ROWS)
    for _ in range(60):
        optimizer.zero_grad()
        objective(batch, 0.0).backward()
        optimizer.step()
    examples = [Example(row["input"], row["predict"]) for row in ROWS]
    found, tokens = work.labels(examples)
    assert found == ["4", "8", "0"] and tokens == 2.0
    assert [text for text, _ in student.write(["explain: one nine"], max_source=40, max_target=16)] == ["1 and 9"]
    alone = [student.write([f"predict: {e.input}"], max_source=40, max_target=4)[0] for e in examples]
    assert [text for text, _ in alone] == found  # a batch, padded, gives what each gives alone
    assert student.model.training


def test_a_single_task_student_writes_its_reason_first():
    student = demo_student(0)
    work = tasks(student, "cot")
    rows, _ = extract_traces(
        [Example("one nine", "8")], [Answer(text="1 and 9 So the answer is 8.")], label_source="gold"
    )
    assert rows[0]["cot"] == "1 and 9 So the answer is 8."
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-2)
    objective = sequence_cross_entropy(observed(student), "cot")
    for _ in range(60):
        optimizer.zero_grad()
        objective(work.batch(rows), 0.0).backward()
        optimizer.step()
    found, tokens = work.labels([Example("one nine", "8")])
    assert found == ["8"]
    assert tokens == len(student.tokenizer(rows[0]["cot"])["input_ids"]) + 1 == 10


# -- extraction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is so because A. So the answer is B.", ("It is so because A.", "B")),
        ("Because A. Therefore, the answer is: (c)", ("Because A.", "(c)")),
        ("The answer is not easy. So the answer is **3.5**.", ("The answer is not easy.", "3.5")),
        ("A: 2 + 2 = 4. so the answer is 4.\n\nQ: next?\nA: no. So the answer is 5.", ("2 + 2 = 4.", "4")),
        ("Two lines\nof it. So the answer is yes.\nThat is all.", ("Two lines\nof it.", "yes")),
        ("So the answer is 7.", ("", "7")),
        ("I do not know.", None),
        ("So the answer is", None),
        ("So the answer is .", None),
        ("", None),
    ],
)
def test_parsing(text, expected):
    assert parse_cot(text) == expected


@given(
    rationale=st.text(alphabet="abc ,.\n", min_size=1).map(str.strip).filter(bool),
    label=st.text(alphabet="abc123", min_size=1),
)
def test_a_prompt_s_own_form_is_parsed_back(rationale, label):
    prompt = cot_prompt([Example("x", label, rationale)], "y")
    shown = prompt.split("A: ", 1)[1].split("\n\nQ: y")[0]
    assert parse_cot(shown) == (rationale, label)


def test_the_prompt_shows_the_exemplars_and_asks():
    prompt = cot_prompt([Example("a b", "1", "why.")], "c d", instruction="Explain.")
    assert prompt == "Explain.\n\nQ: a b\nA: why. So the answer is 1.\n\nQ: c d\nA:"


def test_what_cannot_be_parsed_is_dropped_and_counted():
    examples = [Example("a", "1"), Example("b", "2"), Example("c", "3"), Example("d", "4")]
    texts = ["r. So the answer is 1.", "no idea", None, "r. So the answer is 5."]
    answers = [Answer(text=text, error=None if text else "status 400") for text in texts]
    rows, figures = extract_traces(examples, answers, label_source="gold")
    assert [(row["input"], row["predict"], row["explain"]) for row in rows] == [("a", "1", "r."), ("d", "4", "r.")]
    assert figures == {"traces": 2, "failed": 1, "unparsable": 1, "teacher_accuracy": 0.5}
    rows, _ = extract_traces(examples, answers, label_source="teacher")
    assert [row["predict"] for row in rows] == ["1", "5"]
    unlabelled = [Example(e.input) for e in examples]
    rows, figures = extract_traces(unlabelled, answers, label_source="teacher")
    assert len(rows) == 2 and "teacher_accuracy" not in figures
    with pytest.raises(DataError, match="label_source=teacher"):
        extract_traces(unlabelled, answers, label_source="gold")
    with pytest.raises(DataError, match=r"none of 1 answers .* \(0 failed; first: 'no idea'\)"):
        extract_traces(examples[:1], [Answer(text="no idea")], label_source="gold")


# -- the embedded task ----------------------------------------------------------------------------------------------


def test_the_embedded_teacher_knows_all_words():
    words = [(word, number) for language in NUMBERS for number, word in enumerate(language.split())]
    assert all(len(language.split()) == 10 for language in NUMBERS)
    assert all(MEANING[word] == number for word, number in words)  # no word means two numbers
    assert len(MEANING) > 50
    questions = demo_questions()
    assert (len(questions.train), len(questions.validation), len(questions.test)) == (400, 200, 2000)
    assert demo_questions() == questions
    assert demo_rule(Request.of(cot_prompt(questions.exemplars, "sieben trois"))) == "7 and 3 So the answer is 4."
    for example in questions.test[:100]:
        assert parse_cot(demo_rule(Request.of(cot_prompt([], example.input)))) == (example.rationale, example.label)


def test_the_embedded_student_reads_a_word_at_a_time():
    student = demo_student(0)
    ids = student.tokenizer("predict: sieben trois")["input_ids"]
    assert [student.tokenizer.decode([token]) for token in ids][-2:] == [" sieben", " trois"]
    assert torch.equal(demo_student(0).model.shared.weight, student.model.shared.weight)
    assert not torch.equal(demo_student(1).model.shared.weight, student.model.shared.weight)


# -- the system -----------------------------------------------------------------------------------------------------

SMALL = {"steps": 3, "batch_size": 8, "trackers": []}


def test_an_endpoint_and_a_user_s_data(tmp_path, monkeypatch):
    """Endpoint teacher, a causal student, files. A second run with another loss asks nothing again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    student = causal()
    student.model.save_pretrained(tmp_path / "student")
    student.tokenizer.save_pretrained(tmp_path / "student")
    lines = [{"question": f"is {n} even", "gold": "yes" if n % 2 == 0 else "no"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = {"question": "is 100 even", "gold": "yes", "rationale": "100 ends in 0."}
    (tmp_path / "shown.jsonl").write_text(json.dumps(shown))

    def write(prompt: str) -> str:
        assert "Q: is 100 even\nA: 100 ends in 0. So the answer is yes." in prompt
        number = prompt.rpartition("Q: is ")[2].split()[0]
        label = "yes" if int(number[-1]) % 2 == 0 else "no"
        return "hard to say" if number == "7" else f"It ends in {number[-1]}. So the answer is {label}."

    values = {
        **SMALL,
        "teacher": "teacher",
        "data": str(tmp_path / "data.jsonl"),
        "input_field": "question",
        "label_field": "gold",
        "exemplars": str(tmp_path / "shown.jsonl"),
        "student": str(tmp_path / "student"),
        "label_source": "teacher",
        "lr": 1e-2,
    }
    with serving(Endpoint(write=write)) as endpoint:
        values["endpoint"] = endpoint.url
        dry = run_system("distilling-step-by-step", {**values, "dry_run": True}, output=tmp_path / "run", quiet=True)
        assert dry.artifacts["price"].table().row("still to ask, at most")["requests"] == 36
        assert endpoint.bodies == []
        done = run_system("distilling-step-by-step", values, output=tmp_path / "run", quiet=True)
        assert set(endpoint.asked.values()) == {1} and len(endpoint.bodies) == 36
        run_system("distilling-step-by-step", {**values, "mode": "label-only"}, output=tmp_path / "run", quiet=True)
        assert len(endpoint.bodies) == 36
    rows = pq.read_table(done.artifacts["rationales"].data_file()).to_pylist()
    figures = done.artifacts["rationales"].metrics
    assert figures["failed"] == 0 and figures["unparsable"] + len(rows) == 36
    assert all(row["explain"].startswith("It ends in") for row in rows)
    loaded = load_text_to_text(str(done.artifacts["student"].path))
    assert not loaded.encoder_decoder


def test_a_teacher_in_this_process(tmp_path):
    """A local directory writes nothing that could be parsed here; that is said in one line."""
    teacher = causal()
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"input": f"q {n}", "label": "a"}) for n in range(8)))
    values = {
        **SMALL,
        "teacher": str(tmp_path / "teacher"),
        "data": str(tmp_path / "data.jsonl"),
        "student": "demo",
        "answer_tokens": 4,
    }
    with pytest.raises(DataError, match="none of 7 answers of the teacher can be used"):
        run_system("distilling-step-by-step", values, output=tmp_path / "run", quiet=True)
    answers = pq.read_table(tmp_path / "run/stages/01-answers/artifact/data.parquet").to_pylist()
    assert len(answers) == 7 and all(0 < row["completion_tokens"] <= 4 for row in answers)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": "data.jsonl"}, "teacher=demo only reads data=demo"),
        ({"endpoint": "http://127.0.0.1:1/v1"}, "endpoint needs teacher=MODEL"),
        ({"endpoint": "localhost", "teacher": "x"}, "is not the URL of an endpoint"),
        ({"dry_run": True}, "dry_run prices the requests to an endpoint"),
        ({"endpoint": "http://127.0.0.1:1/v1", "teacher": "x", "cost_budget": 1.0}, "price_in and price_out"),
        ({"api_key_env": "sk-1"}, "api_key_env='sk-1' is not allowed"),
        ({"mode": "both"}, "mode='both' is not allowed"),
    ],
)
def test_bad_values(values, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_system("distilling-step-by-step", {**SMALL, **values}, output=tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "x", "label": "y"}', "no column 'input'.*question"),
        ('{"input": "x"}\n{"input": ""}', "record 2: 'input' is ''"),
        ('{"input": 5}', "record 1: 'input' is 5"),
        ("not json", "cannot be read"),
    ],
)
def test_bad_data(content, said, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        load_examples(str(file))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        load_examples(str(tmp_path / "dato.jsonl"))


def test_the_paper_s_values_are_the_defaults():
    system = get_system("distilling-step-by-step")
    real = system.make(teacher="x", data="y")
    assert (real.lr, real.batch_size, real.steps, real.rationale_weight, real.alpha) == (5e-5, 64, 10_000, 1.0, 0.5)
    assert (real.max_source, real.max_rationale, real.max_label) == (1024, 256, 64)
    demo = system.make()
    assert demo.is_demo() and not real.is_demo() and demo.steps < 10_000
    central, half, curve, noise = (
        [dict(claim.variants[name][1]) for name in (claim.method, claim.baseline)] for claim in demo.claims()
    )
    assert [set(values) for values in central] == [{"mode"}, {"mode"}]  # nothing else differs
    assert half == [{"mode": "multi-task", "examples": 200}, {"mode": "label-only"}]
    for method, baseline in (curve, noise):
        assert {**method, "mode": ""} == {**baseline, "mode": ""} and method["mode"] != baseline["mode"]


# -- less data, worse rationales ------------------------------------------------------------------------------------

REASONS = [f"{first} and {second}" for first in range(10) for second in range(10)]
DIFFERENCES = [str(abs(first - second)) for first in range(10) for second in range(10)]


def test_noisy_words_come_from_the_same_place():
    """A word is another's with chance ``share``; a tenth of those are its like."""
    after = spoilt(REASONS * 50, DIFFERENCES * 50, "noisy", share=0.3)
    changed = [
        old.split()[place] != new.split()[place]
        for old, new in zip(REASONS * 50, after, strict=True)
        for place in (0, 2)
    ]
    assert sum(changed) / len(changed) == pytest.approx(0.27, abs=0.015)  # 0.3 * 9/10
    assert {text.split()[1] for text in after} == {"and"}
    assert spoilt(["a b c", "d"], ["x", "y"], "noisy", share=1.0)[0].split()[1:] == ["b", "c"]  # nobody has any there


@pytest.mark.parametrize("kind", ["shuffled", "wrong"])
def test_other_examples_rationales(kind):
    after = spoilt(REASONS, DIFFERENCES, kind, share=0.5)
    moved = [place for place, text in enumerate(after) if text != REASONS[place]]
    assert 30 < len(moved) < 70 and set(after) <= set(REASONS)
    same_label = [place for place in moved if DIFFERENCES[REASONS.index(after[place])] == DIFFERENCES[place]]
    assert bool(same_label) is (kind == "shuffled")
    assert all(text != old for text, old in zip(spoilt(REASONS, DIFFERENCES, kind, share=1.0), REASONS, strict=True))


@given(st.sampled_from(["noisy", "shuffled", "wrong"]), st.floats(0, 1), st.integers(0, 9))
def test_what_spoiling_leaves_alone(kind, share, seed):
    rationales, labels = ["", "one two", "", "three four", "five"], ["a", "b", "a", "b", "b"]
    after = spoilt(rationales, labels, kind, share=share, seed=seed)
    assert after == spoilt(rationales, labels, kind, share=share, seed=seed)
    assert [not text for text in after] == [not text for text in rationales]
    assert kind != "wrong" or after == rationales  # all that have a rationale have one label
    assert spoilt(rationales, labels, kind, share=0.0, seed=seed) == rationales


def test_spoilt_traces_keep_their_labels():
    rows = [
        {"input": "x", "predict": label, "explain": reason, "cot": f"{reason} So the answer is {label}."}
        for reason, label in zip(REASONS, DIFFERENCES, strict=True)
    ]
    after, changed = spoilt_traces(rows, "wrong", share=1.0, seed=0)
    assert changed == len(rows)
    for row, old in zip(after, rows, strict=True):
        assert parse_cot(row["cot"]) == (row["explain"], old["predict"]) and row["predict"] == old["predict"]


def test_more_examples_begin_with_the_same():
    few, usual, many = (demo_questions(train=count) for count in (100, 400, 800))
    assert usual == demo_questions() and [len(q.train) for q in (few, many)] == [100, 800]
    assert few.train == usual.train[:100] and many.train[:400] == usual.train
    assert few.test == usual.test == many.test and few.validation == many.validation
    assert len({example.input for example in many.train[400:]} - {example.input for example in usual.train}) > 100


def test_a_curve_and_the_cost_of_noise(tmp_path):
    """A student for each size learns from the first examples; with a clean one, the cost is a difference."""
    values = {**SMALL, "examples": 60, "curve": "5,20", "noise": "wrong", "noise_share": 1.0, "noise_cost": True}
    done = run_system("distilling-step-by-step", values, output=tmp_path / "run", quiet=True)
    figures = done.artifacts["evaluation"].metrics
    assert figures["noise_cost"] == pytest.approx(figures["clean/accuracy"] - figures["student/accuracy"])
    points = [figures[f"{name}/accuracy"] for name in ("student", "student-5", "student-20")]
    assert curve_mean(figures) == pytest.approx(sum(points) / 3)
    noisy, clean = (
        pq.read_table(done.artifacts[name].data_file()).to_pylist() for name in ("rationales", "clean-rationales")
    )
    assert done.artifacts["rationales"].metrics["spoilt"] == 60 == len(clean)
    assert [row["predict"] for row in noisy] == [row["predict"] for row in clean]
    assert all(one["explain"] != other["explain"] for one, other in zip(noisy, clean, strict=True))
    words = [row["input"] for row in clean]
    assert words == [example.input for example in demo_questions().train[:60]]
    batch = next(tasks(demo_student(0)).batches(done.artifacts["rationales"], 8, seed=0, first=5))
    assert batch["predict"]["input_ids"].shape[0] == 5
    with pytest.raises(ConfigError, match="curve=80, but there are 60 examples"):
        run_system("distilling-step-by-step", {**values, "curve": "80"}, output=tmp_path / "run", quiet=True)
