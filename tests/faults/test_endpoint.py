"""A teacher behind an endpoint: what endpoints do wrong, kills, budgets; nothing lost, nothing asked twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import _endpoint as fault
import pyarrow.parquet as pq
import pytest
from _endpoint import Endpoint, serving
from pydantic import BaseModel, Field

from stillhouse import Run
from stillhouse.base.errors import ConfigError, Interrupted, RunError
from stillhouse.core.stage import Generate
from stillhouse.runs import split_values
from stillhouse.systems import get_system
from stillhouse.teachers import Answer, AnswerStore, Budget, EndpointTeacher, Request, Retry, Sampling
from stillhouse.teachers.client import retry_after

QUICK = Retry(attempts=4, first=0.01, longest=0.02)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def teacher(endpoint: Endpoint | str, **options: Any) -> EndpointTeacher:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return EndpointTeacher(url, "teacher", **{"retry": QUICK, "timeout": 5.0, "concurrency": 4, **options})


def requests(count: int) -> list[Request]:
    return [Request.of(f"question {i}") for i in range(count)]


def texts(answers: list[Answer]) -> list[str | None]:
    return [answer.text for answer in answers]


def good(count: int) -> list[str]:
    return [f"answer to question {i}" for i in range(count)]


# -- what passes ----------------------------------------------------------------------------------------------------


def test_plain_answers():
    with serving(Endpoint()) as endpoint:
        answers = teacher(endpoint, sampling=Sampling(max_tokens=7, seed=3, stop=("\n",))).ask(requests(9))
    assert texts(answers) == good(9)
    assert {(a.prompt_tokens, a.completion_tokens, a.finish_reason, a.estimated) for a in answers} == {
        (10, 5, "stop", False)
    }
    first = endpoint.bodies[0]
    assert {name: first[name] for name in ("model", "max_tokens", "temperature", "seed", "stop")} == {
        "model": "teacher",
        "max_tokens": 7,
        "temperature": 0.0,
        "seed": 3,
        "stop": ["\n"],
    }
    assert endpoint.busiest <= 4


@pytest.mark.parametrize(
    "trouble",
    [
        fault.drop,
        fault.half,
        fault.too_short,
        fault.broken_json,
        fault.html,
        fault.other_json,
        fault.no_choices,
        fault.gateway,
        fault.status(500),
        fault.status(503),
        fault.status(429),
        fault.status(408),
    ],
    ids=lambda trouble: getattr(trouble, "__name__", "status"),
)
def test_trouble_that_passes(trouble):
    """Everything goes wrong twice, for every second request; then it goes well."""
    bad = {f"question {i}" for i in (0, 2, 4)}
    with serving(Endpoint(lambda prompt, nth: trouble if prompt in bad and nth <= 2 else None)) as endpoint:
        assert texts(teacher(endpoint).ask(requests(5))) == good(5)
    assert endpoint.asked == {f"question {i}": 3 if i % 2 == 0 else 1 for i in range(5)}


@pytest.mark.parametrize("trouble", [fault.slow_loris, fault.too_long], ids=lambda trouble: trouble.__name__)
def test_replies_that_never_end(trouble):
    """No single read takes long, so only a limit on the whole helps."""
    with serving(Endpoint(lambda prompt, nth: trouble if nth == 1 else None)) as endpoint:
        begun = time.monotonic()
        assert texts(teacher(endpoint, timeout=0.4).ask(requests(3))) == good(3)
        assert time.monotonic() - begun < 30
    assert set(endpoint.asked.values()) == {2}


def test_trouble_that_does_not_pass_is_a_record_of_its_error(tmp_path):
    reactions = {
        "question 1": fault.status(400, "this prompt is too long"),
        "question 3": fault.status(500, "boom"),
        "question 5": fault.slow_loris,
        "question 6": fault.reply(None, refusal="I would rather not"),
        "question 7": fault.status(403, "flagged"),
    }
    said: list[str] = []
    with serving(Endpoint(lambda prompt, nth: reactions.get(prompt))) as endpoint:
        asked = teacher(endpoint, timeout=0.3, say=said.append, store=tmp_path / "store.jsonl")
        answers = asked.ask(requests(9))
        assert [a.text for i, a in enumerate(answers) if f"question {i}" not in reactions] == [
            good(9)[i] for i in (0, 2, 4, 8)
        ]
        errors = {i: a.error for i, a in enumerate(answers) if a.error}
        assert errors.keys() == {1, 3, 5, 6, 7}
        assert errors[1] == "status 400: this prompt is too long"
        assert "boom" in errors[3] and errors[3].endswith("(4 tries)")
        assert "within 0.3 s" in errors[5]
        assert "I would rather not" in errors[6]
        assert "flagged" in errors[7]
        assert said == [f"5 of 9 requests failed for good; first: {next(a.error for a in failed(asked, said))}"]
        counts = endpoint.asked
        assert (counts["question 1"], counts["question 3"], counts["question 7"]) == (1, 4, 1)
        reactions.clear()  # what has failed is asked again next time, what was answered is not
        assert texts(asked.ask(requests(9))) == good(9)
        assert endpoint.asked["question 1"] == 2 and endpoint.asked["question 0"] == 1


def failed(asked: EndpointTeacher, said: list[str]) -> list[Answer]:
    """The failures in a teacher's store, in the order in which they were noted."""
    lines = map(json.loads, asked.store.read_text().splitlines())
    return [Answer(**line["answer"]) for line in lines if line["answer"]["error"]]


def test_retry_after_is_obeyed_by_all():
    """While the server asks for a rest, nobody goes on asking."""
    with serving(Endpoint()) as endpoint:
        endpoint.react = lambda prompt, nth: fault.status(429, Retry_After="0.5") if len(endpoint.times) == 1 else None
        assert texts(teacher(endpoint, concurrency=1).ask(requests(3))) == good(3)
        assert endpoint.times[1] - endpoint.times[0] >= 0.5
        endpoint.times.clear()
        endpoint.bodies.clear()
        endpoint.react = lambda prompt, nth: fault.status(503, Retry_After_Ms="400") if nth == 1 else None
        assert texts(teacher(endpoint, concurrency=2).ask(requests(6)[4:])) == good(6)[4:]
        assert sorted(endpoint.times)[2] - min(endpoint.times) >= 0.4


def test_retry_after_in_all_its_forms():
    date = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert retry_after(date, now=1445412470.0) == pytest.approx(10.0)
    assert retry_after(date) == 0.0
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": "inf"}):
        assert retry_after(nothing) is None


def test_waits_grow_and_are_spread():
    retry = Retry(first=1.0, longest=30.0)
    waits = [[retry.wait(n, None) for _ in range(50)] for n in range(8)]
    for n, drawn in enumerate(waits):
        most = min(30.0, 2.0**n)
        assert most / 2 <= min(drawn) < max(drawn) <= most
    assert all(retry.wait(0, 5.0) >= 5.0 for _ in range(20))


# -- what cannot get better -----------------------------------------------------------------------------------------


def end_of(endpoint: Endpoint | str, count: int = 40, **options: Any) -> str:
    """The one line with which a job ends."""
    with pytest.raises(RunError) as caught:
        teacher(endpoint, **options).ask(requests(count))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_a_dead_endpoint():
    begun = time.monotonic()
    said = end_of(f"http://127.0.0.1:{fault.free_port()}/v1", retry=Retry(first=60.0))
    assert "cannot connect" in said and "is the server running?" in said and "nothing was answered" in said
    assert time.monotonic() - begun < 30  # it did not wait


def test_an_endpoint_that_dies(tmp_path):
    store = tmp_path / "store.jsonl"
    with serving(Endpoint(delay=lambda prompt: 0.02)) as endpoint:
        asked = teacher(endpoint, store=store, concurrency=2)
        coming = asked.answers(asked.keyed(requests(30)))
        first = [next(coming) for _ in range(6)]
    with pytest.raises(RunError, match=r"cannot connect .* \(4 tries\); \d+ answers are kept; run the same again"):
        list(coming)
    kept = AnswerStore(store).answers
    assert kept.keys() >= {key for key, _ in first} and len(kept) < 30
    with serving(Endpoint()) as again:
        assert texts(teacher(again, store=store).ask(requests(30))) == good(30)
        assert len(again.bodies) == 30 - len(kept)


@pytest.mark.parametrize("key", [None, "sk-secret-0123456789"])
def test_a_refused_key(key, monkeypatch, tmp_path):
    if key:
        monkeypatch.setenv("MY_KEY", key)
    with serving(Endpoint(lambda prompt, nth: fault.status(401, f"Incorrect API key provided: {key}"))) as endpoint:
        said = end_of(endpoint, api_key_env="MY_KEY", store=tmp_path / "store.jsonl")
    assert ("refuses the key in MY_KEY" if key else "wants a key: set MY_KEY") in said
    assert "secret" not in said
    assert len(endpoint.bodies) <= 4  # those on their way; nothing is tried again
    assert endpoint.keys[0] == f"Bearer {key or 'none'}"


def test_an_unknown_model():
    with serving(Endpoint(lambda prompt, nth: fault.status(404), models=("teachers", "llama"))) as endpoint:
        said = end_of(endpoint)
        assert "does not know the model 'teacher'; did you mean 'teachers'?" in said
        assert len(endpoint.bodies) <= 4
        endpoint.models = ("teacher",)
        assert "does not take chats" in end_of(endpoint)
        assert "most end in /v1" in end_of(endpoint.url.removesuffix("/v1"))


def test_no_credit_left():
    with serving(Endpoint(lambda prompt, nth: fault.status(429, code="insufficient_quota"))) as endpoint:
        assert "no credit left" in end_of(endpoint)
        assert len(endpoint.bodies) <= 4


def test_a_long_rest_stops_the_job(tmp_path):
    with serving(Endpoint()) as endpoint:
        endpoint.react = lambda prompt, nth: fault.status(429, Retry_After="86400") if "3" in prompt else None
        with pytest.raises(Interrupted, match=r"come back in 86,400 s \(429\); 3 answers are kept"):
            teacher(endpoint, concurrency=1, store=tmp_path / "store.jsonl").ask(requests(6))


def test_an_endpoint_that_fails_at_everything():
    with serving(Endpoint(lambda prompt, nth: fault.gateway)) as endpoint:
        said = end_of(endpoint, retry=Retry(attempts=2, first=0.01, in_a_row=5))
    assert "5 requests in a row failed for good" in said and "502" in said
    assert len(endpoint.bodies) < 25  # of 80


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http:///v1", "http://host:port/v1"])
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match="is not the URL of an endpoint"):
        EndpointTeacher(url, "teacher")


def test_keys_have_no_place_but_the_environment(monkeypatch):
    for wrong in ("sk-secret", "secret key", ""):
        with pytest.raises(ConfigError) as caught:
            EndpointTeacher("http://localhost/v1", "teacher", api_key_env=wrong)
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        EndpointTeacher("http://me:secret@localhost/v1", "teacher")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("BAD_KEY", "sécret\nkey")
    with pytest.raises(ConfigError, match="characters that no key has"):
        EndpointTeacher("http://localhost/v1", "teacher", api_key_env="BAD_KEY")


# -- as a stage: kills and resumes ----------------------------------------------------------------------------------


def test_killed_and_gone_on_with(tmp_path, monkeypatch):
    """SIGKILL at some moment, twice: what was on disk is not asked again, and all answers are there at the end."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    count, folder = 60, tmp_path / "run"
    flaky = itertools.cycle([None, None, None, fault.drop, None, fault.status(429, "wait", Retry_After="0.05")])
    with serving(Endpoint(delay=lambda prompt: 0.03)) as endpoint:
        endpoint.react = lambda prompt, nth: next(flaky) if nth == 1 else None
        on_disk: list[set[str]] = []
        for more in (15, 20):
            child = fault.child(endpoint.url, folder, count)
            goal = len(endpoint.answered) + more
            while len(endpoint.answered) < goal:
                assert child.is_alive()
                time.sleep(0.005)
            child.kill()
            child.join()
            on_disk.append(set(AnswerStore(folder / "answers.jsonl").answers))
            assert len(endpoint.answered) - len(on_disk[-1]) <= 4 * len(on_disk)  # at most those on their way
        assert on_disk[0] < on_disk[1]
        key_of = {r.messages[0]["content"]: key for key, r in teacher(endpoint).keyed(requests(count)).items()}
        before = endpoint.asked
        fault.job(endpoint.url, folder, count)
        after = endpoint.asked
    assert {p for p in after if after[p] > before[p]} == {p for p, key in key_of.items() if key not in on_disk[1]}
    rows = pq.read_table(folder / "stages/01-answers/artifact/data.parquet").to_pylist()
    assert [row["text"] for row in rows] == good(count)  # all, once, in order
    assert [row["key"] for row in rows] == list(key_of.values())
    for file in folder.rglob("*"):
        assert file.is_dir() or b"sk-secret" not in file.read_bytes()


def test_a_stage_goes_through_the_journal(tmp_path):
    """The order of rows is that of the requests, whichever answer came first; a changed stage asks nothing again."""
    with serving(Endpoint(delay=lambda prompt: 0.2 if prompt == "question 0" else 0.0)) as endpoint:
        asked = teacher(endpoint, store=tmp_path / "run/answers.jsonl")
        keyed = asked.keyed([*requests(8), *requests(3)])  # equal requests are one
        stage = Generate("answers", keyed, asked.answers, together=True)
        artifact = Run(tmp_path / "run", quiet=True).execute([stage])["answers"]
        rows = pq.read_table(artifact.data_file()).to_pylist()
        assert [row["text"] for row in rows] == good(8)
        assert artifact.metrics == {"records": 8, "dropped": 0}
        journal = [json.loads(line) for line in (artifact.path.parent / "records.jsonl").read_text().splitlines()]
        assert {line["key"] for line in journal} == set(keyed) and journal[0]["key"] != next(iter(keyed))
        again = Run(tmp_path / "run", quiet=True, fresh=True).execute([stage])["answers"]
        assert pq.read_table(again.data_file()).to_pylist() == rows
        assert len(endpoint.bodies) == 8


def test_a_half_written_answer_is_asked_for_again(tmp_path):
    store = tmp_path / "store.jsonl"
    with serving(Endpoint()) as endpoint:
        teacher(endpoint, store=store).ask(requests(3))
        store.write_text(store.read_text()[:-20])
        assert texts(teacher(endpoint, store=store).ask(requests(3))) == good(3)
        assert len(endpoint.bodies) == 4
        assert len([json.loads(line) for line in store.read_text().splitlines()]) == 3


def test_a_store_has_one_writer(tmp_path):
    store = tmp_path / "store.jsonl"
    with serving(Endpoint(delay=lambda prompt: 0.01)) as endpoint:
        asked = teacher(endpoint, store=store)
        coming = asked.answers(asked.keyed(requests(9)))
        next(coming)
        with pytest.raises(RunError, match="in use by another process"):
            teacher(endpoint, store=store).ask(requests(3))
        coming.close()
        assert texts(teacher(endpoint, store=store).ask(requests(9))) == good(9)


def test_what_identifies_a_request():
    one = Request.of("question")
    keys = {
        next(iter(asked.keyed([request])))
        for asked, request in [
            (teacher("http://a/v1"), one),
            (teacher("http://a/v1"), Request.of("question", sample=1)),
            (teacher("http://a/v1"), Request.of("question", system="be brief")),
            (teacher("http://a/v1", sampling=Sampling(temperature=0.7)), one),
            (teacher("http://a/v1", sampling=Sampling(temperature=None)), one),
            (teacher("http://a/v1", sampling=Sampling(max_tokens=8)), one),
            (teacher("http://a/v1", sampling=Sampling(top_logprobs=2)), one),
            (teacher("http://a/v1", schema={"type": "object"}), one),
            (EndpointTeacher("http://a/v1", "other"), one),
        ]
    }
    assert len(keys) == 9
    assert teacher("http://b:1/v1", concurrency=1).keyed([one]) == teacher("http://a/v1").keyed([one])


def test_leaving_early_stops_asking():
    with serving(Endpoint(delay=lambda prompt: 0.01)) as endpoint:
        asked = teacher(endpoint, concurrency=2)
        coming = asked.answers(asked.keyed(requests(200)))
        next(coming)
        coming.close()
        done = len(endpoint.bodies)
        assert done < 100
        assert not [thread for thread in threading.enumerate() if thread.name == "endpoint"]
        time.sleep(0.1)
        assert len(endpoint.bodies) <= done + 2


def test_it_works_inside_a_running_loop():
    """Notebooks run one."""

    async def cell() -> list[Answer]:
        return teacher(endpoint).ask(requests(2))

    with serving(Endpoint()) as endpoint:
        assert texts(asyncio.run(cell())) == good(2)


# -- budgets and prices ---------------------------------------------------------------------------------------------


def test_a_budget_is_never_overspent_and_can_be_raised(tmp_path):
    """15 tokens an answer. Only what surely fits is sent, however many could be on their way."""
    store = tmp_path / "store.jsonl"
    options = {"store": store, "sampling": Sampling(max_tokens=5), "concurrency": 8}
    with serving(Endpoint(delay=lambda prompt: 0.01)) as endpoint:
        with pytest.raises(Interrupted, match=r"budget of 100 tokens .*; 6 of 20 answers are kept.*larger budget"):
            teacher(endpoint, budget=Budget(tokens=100), **options).ask(requests(20))
        assert len(endpoint.bodies) == 6  # 90 tokens used; the next might need more than 10
        with pytest.raises(Interrupted, match="6 of 20"):  # the budget is the job's, not the sitting's
            teacher(endpoint, budget=Budget(tokens=100), **options).ask(requests(20))
        assert len(endpoint.bodies) == 6
        money = Budget(cost=1e-4, price_in=0.5, price_out=1.0)  # 1e-5 an answer
        with pytest.raises(Interrupted, match=r"budget of 0\.0001 in money .*0\.0001 in money used\); 10 of 20"):
            teacher(endpoint, budget=money, **options).ask(requests(20))
        assert texts(teacher(endpoint, budget=Budget(tokens=10_000), **options).ask(requests(20))) == good(20)
        assert set(endpoint.asked.values()) == {1}
    assert AnswerStore(store).prompt_tokens == 200 and AnswerStore(store).completion_tokens == 100


def test_a_budget_covers_answers_that_are_sent_back(tmp_path):
    with serving(Endpoint(write=lambda prompt: "no JSON")) as endpoint:
        asked = teacher(
            endpoint,
            schema=POINT,
            budget=Budget(tokens=400),
            sampling=Sampling(max_tokens=5),
            store=tmp_path / "store.jsonl",
            concurrency=1,
        )
        with pytest.raises(Interrupted):
            asked.ask(requests(9))
    store = AnswerStore(asked.store)  # failures have their price too
    assert store.prompt_tokens + store.completion_tokens == 15 * len(endpoint.bodies) <= 400
    assert len(endpoint.bodies) >= 3 and not store.answers


def test_a_cost_budget_needs_prices():
    with pytest.raises(ConfigError, match="price_in and price_out"):
        Budget(cost=1.0)


class Words:
    """A tokenizer: a token a word."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


def test_prices_are_known_before(tmp_path):
    options: dict[str, Any] = {"sampling": Sampling(max_tokens=100), "budget": Budget(price_in=2.0, price_out=10.0)}
    store = tmp_path / "store.jsonl"
    with serving(Endpoint()) as endpoint:
        table = teacher(endpoint, tokenizer=Words(), store=store, **options).price(requests(50))
        assert table.row("still to ask, at most") == {
            "name": "still to ask, at most",
            "requests": 50,
            "prompt": 50 * (2 + 4 + 3),
            "completion": 5000,
            "cost": pytest.approx((450 * 2.0 + 5000 * 10.0) / 1e6),
        }
        assert "counted with the tokenizer" in table.notes[0]
        assert not store.exists() and endpoint.bodies == []
        teacher(endpoint, store=store, **options).ask(requests(10))
        table = teacher(endpoint, store=store, **options).price(requests(50))
        assert "estimated" in table.notes[0]
        assert table.row("used so far")["completion"] == 50
        assert table.row("still to ask, with answers as long as so far")["completion"] == 200
        assert table.row("still to ask, at most")["requests"] == 40
        assert len(endpoint.bodies) == 10
        unpriced = teacher(endpoint).price(requests(2))
        assert "cost" not in [column.key for column in unpriced.columns] and "price_in" in unpriced.notes[1]


def test_servers_that_do_not_count():
    with serving(Endpoint(usage=False)) as endpoint:
        (answer,) = teacher(endpoint).ask(requests(1))
    assert answer.estimated and answer.prompt_tokens > 0 and answer.completion_tokens > 0


# -- what servers may lack ------------------------------------------------------------------------------------------


class Point(BaseModel):
    x: int = Field(ge=0)
    y: int = 0


POINT = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0}}, "required": ["x"]}


@pytest.mark.parametrize("schema", [POINT, Point])
def test_structured_output(schema):
    replies = {
        "question 0": ['{"x": 1}'],
        "question 1": ["Sure! x is 1.", '{"x": -1}', '```json\n{"x": 2}\n```'],
        "question 2": ["no", "no", "no", "no"],
    }
    with serving(Endpoint(lambda prompt, nth: fault.reply(replies[prompt][nth - 1]))) as endpoint:
        answers = teacher(endpoint, schema=schema, concurrency=1).ask(requests(3))
    assert texts(answers) == ['{"x": 1}', '{"x": 2}', None]
    assert "no valid answer in 3 tries: not JSON" in answers[2].error
    assert [a.completion_tokens for a in answers] == [5, 15, 15]  # what was thrown away was paid for
    assert endpoint.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["x"]["minimum"] == 0
    third = endpoint.bodies[3]["messages"]
    assert [m["role"] for m in third] == ["user", "assistant", "user"] and third[1]["content"] == '{"x": -1}'
    assert "minimum" in third[2]["content"] and "x" in third[2]["content"].split(":")[0] + third[2]["content"]


def test_a_wrong_schema():
    with pytest.raises(ConfigError, match=r"JSON schema is wrong at \$\.type"):
        teacher("http://a/v1", schema={"type": "number or so"})


def test_a_server_without_structured_output():
    """It refuses the field once for each request that is on its way; the answers are checked all the same."""
    said: list[str] = []

    def react(prompt: str, nth: int) -> Any:
        if "response_format" in endpoint.bodies[-1]:
            return fault.status(400, "Unknown field: response_format")
        return fault.reply('{"x": 1}')

    with serving(Endpoint(react)) as endpoint:
        answers = teacher(endpoint, schema=POINT, concurrency=1, say=said.append).ask(requests(5))
    assert texts(answers) == ['{"x": 1}'] * 5
    assert len(endpoint.bodies) == 6 and len(said) == 1 and "refuses response_format" in said[0]


def test_log_probabilities():
    sampling = Sampling(top_logprobs=2)
    with serving(Endpoint(logprobs=True)) as endpoint:
        (answer,) = teacher(endpoint, sampling=sampling).ask(requests(1))
        top = [{"token": "a", "logprob": 0.0}, {"token": "b", "logprob": -1.0}]
        assert answer.logprobs == [{"token": "a", "logprob": 0.0, "top": top}]
        assert endpoint.bodies[0]["top_logprobs"] == 2
        endpoint.react = lambda prompt, nth: (
            fault.status(422, "logprobs are not supported") if "logprobs" in endpoint.bodies[-1] else None
        )
        (answer,) = teacher(endpoint, sampling=sampling).ask(requests(1))
        assert answer.logprobs is None and answer.text == good(1)[0]


def test_the_newer_name_of_max_tokens():
    def react(prompt: str, nth: int) -> Any:
        message = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        return fault.status(400, message, param="max_tokens") if "max_tokens" in endpoint.bodies[-1] else None

    with serving(Endpoint(react)) as endpoint:
        assert texts(teacher(endpoint, concurrency=1, sampling=Sampling(max_tokens=9)).ask(requests(3))) == good(3)
    assert [body.get("max_completion_tokens") for body in endpoint.bodies] == [None, 9, 9, 9]


def test_the_code_in_the_documentation(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/endpoint-teachers.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "steps.yaml").write_text(recipe)
    from stillhouse.cli.recipe import read_recipe

    values = read_recipe(tmp_path / "steps.yaml")
    split_values(get_system(values.pop("system")), values)
    monkeypatch.chdir(tmp_path)
    with serving(Endpoint()) as endpoint:
        exec(compile(code.replace("http://localhost:8000/v1", endpoint.url), "page", "exec"), {})
    assert "What is 3 squared? -> answer to What is 3 squared?" in capsys.readouterr().out
    assert len(endpoint.bodies) == 20


# -- a real server --------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    from transformers import LlamaConfig

    from stillhouse.models import new_causal_lm, train_bpe

    folder = tmp_path_factory.mktemp("served")
    tokenizer = train_bpe(["the cat sees a bird and the dog hears the river"] * 4, vocab_size=280)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_causal_lm(config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(model: Path) -> Any:
    """What ``transformers serve`` starts, in a thread; its URL."""
    from transformers.cli.serve import Serve

    port = fault.free_port()
    server = Serve(str(model), host="127.0.0.1", port=port, device="cpu", log_level="error", non_blocking=True)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()


def test_transformers_serve(served, model, tmp_path):
    from stillhouse.models import load_causal_lm
    from stillhouse.teachers import LocalTeacher

    url = served
    sampling = Sampling(max_tokens=6)
    asked = EndpointTeacher(url, str(model), sampling=sampling, store=tmp_path / "store.jsonl", retry=QUICK)
    answers = asked.ask(requests(4))
    assert all(answer.error is None and answer.text for answer in answers)
    assert all(0 < answer.completion_tokens <= 6 and not answer.estimated for answer in answers)
    network, tokenizer = load_causal_lm(str(model))
    assert [answer.prompt_tokens for answer in answers] == [
        EndpointTeacher(url, "x", tokenizer=tokenizer).count(request) for request in requests(4)
    ]
    local = LocalTeacher(str(model), network, tokenizer, sampling=sampling, batch_size=1)
    keyed = local.keyed(requests(4))
    written = dict(local.answers(keyed))
    assert [written[key]["text"] for key in keyed] == texts(answers)  # both are greedy
    assert [written[key]["completion_tokens"] for key in keyed] == [answer.completion_tokens for answer in answers]
    with pytest.raises(RunError) as caught:
        EndpointTeacher(url, "no-such-model", retry=Retry(attempts=2, first=0.01, in_a_row=3)).ask(requests(4))
    assert "no-such-model" in str(caught.value) and "\n" not in str(caught.value)


class Serving:
    """``transformers serve`` as a process of its own; ``served``: chats it has answered, by its access log."""

    def __init__(self, model: Path, log: Path, port: int) -> None:
        self.log = log
        program = str(Path(sys.executable).with_name("transformers"))
        command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        with log.open("w") as out:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while True:
            assert self.process.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)

    @property
    def served(self) -> int:
        return len(re.findall(r'"POST /v1/chat/completions HTTP/1\.1" 200', self.log.read_text()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_transformers_serve_is_killed_and_started_again(model, tmp_path, monkeypatch):
    """The real program, offline. Its death ends the job with one line; the next sitting asks for the rest alone."""
    from stillhouse.models import load_causal_lm
    from stillhouse.teachers import LocalTeacher

    port, count, sampling = fault.free_port(), 8, Sampling(max_tokens=6)
    url, store = f"http://127.0.0.1:{port}/v1", tmp_path / "run/answers.jsonl"
    asked = EndpointTeacher(url, str(model), sampling=sampling, store=store, retry=QUICK, concurrency=2)
    keyed = asked.keyed(requests(count))
    first = Serving(model, tmp_path / "first.log", port)

    add = AnswerStore.add

    def add_and_kill(self: AnswerStore, key: str, answer: Answer) -> None:
        add(self, key, answer)
        if len(self.answers) == 3:
            first.kill()

    stage = Generate("answers", keyed, asked.answers, together=True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(AnswerStore, "add", add_and_kill)
            with pytest.raises(RunError, match="run the same again to go on") as caught:
                Run(tmp_path / "run", quiet=True).execute([stage])
    finally:
        first.kill()
    assert "\n" not in str(caught.value)
    kept = AnswerStore(store).answers
    assert 3 <= len(kept) <= 4 and len(kept) <= first.served <= len(kept) + 1  # one more was on its way
    second = Serving(model, tmp_path / "second.log", port)
    try:
        made = Run(tmp_path / "run", quiet=True).execute([stage])["answers"]
    finally:
        second.kill()
    assert second.served == count - len(kept)
    journal = [json.loads(line)["key"] for line in (made.path.parent / "records.jsonl").read_text().splitlines()]
    assert sorted(journal) == sorted(keyed)
    network, tokenizer = load_causal_lm(str(model))
    local = LocalTeacher(str(model), network, tokenizer, sampling=sampling, batch_size=1)
    written = dict(local.answers(local.keyed(requests(count))))  # both are greedy
    assert [row["text"] for row in pq.read_table(made.data_file()).to_pylist()] == [
        one["text"] for one in written.values()
    ]
