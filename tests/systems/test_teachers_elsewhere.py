"""The family of divergences with teachers that are not run beside the student: kept on disk, or behind an endpoint.

The server does what vLLM documents for ``prompt_logprobs``, completions of prompts given as tokens, and chats.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import helpers
import pyarrow.parquet as pq
import pytest
import torch

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.runs import stage_artifacts
from stillhouse.systems import get_system
from stillhouse.workflow import resume, run_system


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


class Served:
    """A causal LM behind HTTP, with what it was asked."""

    def __init__(self, folder: Path, url: str = "") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lock, self.url, self.most, self.asked = threading.Lock(), url, 1000, []  # type: ignore[var-annotated]

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        if path.endswith("/chat/completions"):
            said = "the river sees " + body["messages"][-1]["content"].split()[0]
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            return {"choices": [choice], "usage": usage}
        ids = torch.tensor([body["prompt"]])
        if "prompt_logprobs" not in body:
            written = self.model.generate(
                input_ids=ids, do_sample=False, max_new_tokens=body["max_tokens"], pad_token_id=0
            )
            text = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
            return {"choices": [{"index": 0, "text": text, "finish_reason": "length"}], "usage": usage}
        k = min(self.most, body["prompt_logprobs"])
        with torch.no_grad():
            log_p = self.model(input_ids=ids).logits[0].float().log_softmax(-1)
        scored: list[Any] = [None]
        for place, token in zip(log_p[:-1], body["prompt"][1:], strict=True):
            best = dict.fromkeys([*place.topk(k).indices.tolist(), token])
            scored.append({str(one): {"logprob": float(place[one]), "rank": 1, "decoded_token": "x"} for one in best})
        return {
            "choices": [{"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": scored}],
            "usage": usage,
        }


@pytest.fixture
def served(materials) -> Iterator[Served]:
    teacher = Served(materials.teacher)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with teacher.lock:
                said = json.dumps(teacher.reply(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    teacher.url = f"http://127.0.0.1:{server.server_port}/v1#teacher"
    yield teacher
    server.shutdown()
    server.server_close()


def run(name: str, materials: helpers.Materials, folder: Path, **fields: Any) -> dict[str, Any]:
    """A student that is the teacher's twin with other weights, so that it needs no teacher to be described."""
    student = folder.parent / "student"
    if not student.exists():
        from transformers import AutoConfig, AutoTokenizer

        from stillhouse.models import new_causal_lm

        new_causal_lm(AutoConfig.from_pretrained(materials.teacher), seed=5).save_pretrained(student)
        AutoTokenizer.from_pretrained(materials.teacher).save_pretrained(student)
    small = helpers.small_values(get_system(name), materials)
    run_system(name, {**small, "student": str(student), "steps": 8, **fields}, output=folder, quiet=True)
    artifacts = stage_artifacts(folder)
    return {"weights": helpers.weights(artifacts["student"].path), "figures": artifacts["evaluation"].metrics}


def close(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return all(torch.allclose(one["weights"][name], two["weights"][name], atol=2e-4) for name in one["weights"])


@pytest.mark.parametrize("name", ["gkd", "distillm"])
def test_a_teacher_behind_an_endpoint_teaches_what_the_same_teacher_here_does(name, materials, served, tmp_path):
    """All tokens asked for, on data and own text: the same weights; a few: others."""
    fields = {"on_policy": 0.5, "divergence": "jsd", "own_divergence": "reverse-kl"}
    here = run(name, materials, tmp_path / "here", **fields)
    there = run(name, materials, tmp_path / "there", teacher=served.url, teacher_topk=10_000, **fields)
    few = run(name, materials, tmp_path / "few", teacher=served.url, teacher_topk=2, **fields)
    assert close(here, there) and not close(here, few)
    assert "student/kl" in here["figures"] and "student/kl" not in there["figures"]
    assert there["figures"]["student/val_loss"] == pytest.approx(here["figures"]["student/val_loss"], abs=1e-3)


def test_minillm_with_a_teacher_behind_an_endpoint_is_minillm_with_the_same_teacher_here(materials, served, tmp_path):
    fields = {"teacher_share": 0.0, "rollouts": 4, "inner_epochs": 2}
    here = run("minillm", materials, tmp_path / "here", **fields)
    there = run("minillm", materials, tmp_path / "there", teacher=served.url, teacher_topk=10_000, **fields)
    asked = len(served.asked)
    few = run("minillm", materials, tmp_path / "few", teacher=served.url, teacher_topk=2, **fields)
    assert close(here, there) and not close(here, few)
    assert 0 < asked <= 8 * 4 / 2 + 4  # a response is scored once, though it is used twice
    for wrong, line in {"teacher_share": (0.2, "set teacher_share=0"), "long": (False, "is gkd")}.items():
        with pytest.raises(ConfigError, match=line[1]):
            run("minillm", materials, tmp_path / wrong, teacher=served.url, **{**fields, wrong: line[0]})


def test_guesses_are_ranked_over_an_endpoint_as_by_the_same_teacher_here(materials, served, tmp_path):
    """Whatever the number of guesses: the texts, and how likely each of them is."""
    words = helpers.WORDS
    records = [{"prompt": f"the {a} sees {b}", "answer": f" and # {a}"} for a in words[:5] for b in words[5:9]]
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    fields = {"model": str(materials.teacher), "data": str(data), "labelled": 6, "batch_size": 4, "steps": 2}
    fields |= {"max_new_tokens": 6, "asked": 8, "ask": "feedback", "learn": "dpo", "guesses": 3, "eval_samples": 1}
    found = []
    for name, teacher in {"here": str(materials.teacher), "there": served.url}.items():
        done = run_system("elicitation-lm", {**fields, "teacher": teacher}, output=tmp_path / name, quiet=True)
        table = pq.read_table(done.artifacts["opinions"].data_file()).to_pylist()
        found.append({row["key"]: row["scores"] for row in table})
    assert len(found[0]) > 4 and found[0].keys() == found[1].keys()
    for key, scores in found[0].items():
        assert found[1][key] == pytest.approx(scores, abs=1e-4)


def test_a_teacher_that_is_kept_teaches_the_same(materials, tmp_path):
    here = run("gkd", materials, tmp_path / "here", on_policy=0.0)
    assert close(here, run("gkd", materials, tmp_path / "kept", on_policy=0.0, teacher_topk=10_000))
    with pytest.raises(ConfigError, match="teacher_topk keeps what the teacher says of the data's text"):
        run("gkd", materials, tmp_path / "own", on_policy=0.5, teacher_topk=5)


def test_text_of_a_teacher_behind_an_endpoint(materials, served, tmp_path):
    run("seqkd", materials, tmp_path / "run", teacher=served.url, teacher_texts=12)
    assert len(served.asked) == 12 and all(len(body["prompt"]) == 6 for body in served.asked)


def test_a_chat_model_answers_the_training_conversations_only(materials, served, tmp_path):
    records = [{"prompt": f"old cat {number}", "completion": "sees a dog and then never hears"} for number in range(40)]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    fields = {"teacher": served.url, "data": str(data), "window": 64}
    run("seqkd", materials, tmp_path / "run", **fields)
    asked = {body["messages"][-1]["content"] for body in served.asked}
    assert 20 < len(asked) == len(served.asked) < 40  # a quarter or so is held out
    written = pq.read_table(stage_artifacts(tmp_path / "run")["teacher-text"].data_file()).to_pylist()
    assert {json.loads(record["turns"])[-1]["content"] for record in written} == {"the river sees old"}


def test_what_cannot_be_done_is_said(materials, served, tmp_path):
    with pytest.raises(ConfigError, match="nothing of the teacher can be kept"):
        run("minillm", materials, tmp_path / "one", teacher_topk=5)
    with pytest.raises(ConfigError, match="kd needs the teacher's weights"):
        run("kd", materials, tmp_path / "two", teacher=served.url)
    with pytest.raises(ConfigError, match="write URL#MODEL"):
        run("gkd", materials, tmp_path / "three", teacher=served.url.partition("#")[0])
    with pytest.raises(ConfigError, match="give the student's directory"):
        run("gkd", materials, tmp_path / "four", teacher=served.url, student="scale:0.5")
    served.most = 3
    with pytest.raises(ModelError, match="it must allow prompt_logprobs=20"):
        run("gkd", materials, tmp_path / "five", teacher=served.url)


def test_adapters_are_killed_and_resumed(materials, tmp_path):
    """Only the adapters are trained; killed half way, a run ends with the same model and the same adapters."""
    small = {**helpers.small_values(get_system("gkd"), materials), "student": str(materials.teacher), "lora": 2}
    small |= {"divergence": "labels"}  # the student is the teacher: it has nothing else to learn
    whole = run_system("gkd", small, output=tmp_path / "whole", quiet=True)
    helpers.run_and_kill("gkd", small, tmp_path / "killed")
    done = resume(tmp_path / "killed", quiet=True)
    expected, found = (helpers.tensors(run.artifacts["student"].path) for run in (whole, done))
    assert any("lora_A" in name for name in expected) and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    before = helpers.weights(materials.teacher)
    after = helpers.weights(whole.artifacts["student"].path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("norm" in name or "embed" in name or "lm_head" in name for name in changed)


def test_packed_conversations_are_distilled(materials, tmp_path):
    records = [{"prompt": f"old cat {number}", "completion": "sees a dog " * (1 + number % 3)} for number in range(60)]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    small = {**helpers.small_values(get_system("kd"), materials), "data": str(data), "window": 96, "packing": True}
    kept = {**small, "teacher_topk": 10_000}
    live, cached = (run_system("kd", one, output=tmp_path / str(n), quiet=True) for n, one in enumerate((small, kept)))
    one, two = (helpers.weights(run.artifacts["student"].path) for run in (live, cached))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    with pytest.raises(ConfigError, match="no one prompt"):
        run_system("gkd", {**small, "on_policy": 0.5}, output=tmp_path / "own", quiet=True)
