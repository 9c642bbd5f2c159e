"""Rollouts of a live policy: what a batch holds, that it sees current weights, and that a resume repeats nothing."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import Observed, Player, Run, Train, adamw
from stillhouse.base.errors import ModelError
from stillhouse.base.files import load_tree, save_tree
from stillhouse.data.responses import Coder, filled, pack_rows, response_tokens
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.objectives.language import head_of
from stillhouse.objectives.responses import PolicyGradient, response_logprobs
from stillhouse.rl.hints import Hints
from stillhouse.rl.rollouts import RolloutSource
from stillhouse.rl.sampling import LiveSampler, Response, ServerSampler, resting
from stillhouse.teachers import Retry

PROBLEMS = [{"prompt": text, "answer": text[0]} for text in ("ab", "b", "cab", "ddd", "ea")]


@pytest.fixture(scope="module")
def coder() -> Coder:
    return Coder(train_bpe(["abcde"], vocab_size=257))


def policy(coder: Coder, seed: int = 0, dropout: float = 0.0) -> Any:
    from transformers import LlamaConfig

    end = coder.tokenizer.eos_token_id
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=257,
        num_key_value_heads=2,
        attention_dropout=dropout,
        initializer_range=0.3,
        eos_token_id=end,
        bos_token_id=end,
        pad_token_id=end,
        **sizes,
    )
    return new_causal_lm(config, seed=seed)


def reward(text: str, record: Any) -> float:
    return float(len(text) % 2)


def source(coder: Coder, model: Any, **options: Any) -> RolloutSource:
    sampler = LiveSampler(model, coder, 5)
    return RolloutSource(sampler, coder, PROBLEMS, reward, **{"prompts": 2, "group": 3, "seed": 4, **options})


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# -- batches --------------------------------------------------------------------------------------------------------


def test_rows_and_masks():
    batch = pack_rows([([1, 2], [3]), ([4], [5, 6, 0])], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    at, label, row = response_tokens(batch)
    assert at.tolist() == [[False, True, False], [True, True, True]]
    assert (label.tolist(), row.tolist()) == ([3, 5, 6, 0], [0, 1, 1, 1])


def test_templates_are_filled_once():
    assert filled("{a} {b} {c} {", a="{b}", b="x") == "{b} x {c} {"


def test_a_batch_of_rollouts(coder):
    batch = next(source(coder, policy(coder)))
    assert batch["input_ids"].shape[0] == 6 and batch["rewards"].shape == (6,)
    advantages = batch["advantages"].view(2, 3)
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(2), atol=1e-5, rtol=0)
    for row in range(6):
        ids = batch["input_ids"][row][batch["loss_mask"][row].bool()].tolist()
        assert 1 <= len(ids) <= 5
        assert batch["rewards"][row] == reward(coder.text(ids), None)
        assert batch["finished"][row] == float(ids[-1] == coder.end)
    assert "old_logp" not in batch


def test_samples_follow_the_model_s_own_distribution(coder):
    """First tokens against softmax of the logits at the end of the prompt, left padding or not."""
    model = policy(coder).eval()
    with torch.no_grad():
        ids = torch.tensor([coder.prompt("ab")])
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    written = LiveSampler(model, coder, 1).sample(["ab", "ddd"], n=3000, seed=0)[0]
    found = torch.bincount(torch.tensor([one.ids[0] for one in written]), minlength=257) / 3000
    assert (found - expected).abs().max() < 4 * (expected.max() / 3000).sqrt()


def test_a_generation_config_of_the_model_s_own_does_not_bend_it(coder):
    plain, bent = policy(coder), policy(coder)
    bent.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0, top_p=0.1)
    one, two = (LiveSampler(model, coder, 4).sample(["ab"], n=20, seed=3) for model in (plain, bent))
    assert one == two and len({response.ids for response in one[0]}) > 5


def test_greedy(coder):
    written = LiveSampler(policy(coder), coder, 4, temperature=0.0).sample(["ab"], n=3, seed=0)[0]
    assert len({response.ids for response in written}) == 1


def test_it_leaves_the_model_and_the_random_state_as_they_were(coder):
    model = policy(coder, dropout=0.1)
    model.train()
    model.model.layers[0].eval()
    before, modes = torch.get_rng_state(), [part.training for part in model.modules()]
    LiveSampler(model, coder, 3).sample(["ab"], n=2, seed=0)
    assert torch.equal(before, torch.get_rng_state()) and modes == [part.training for part in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(KeyError), resting(model):
        raise KeyError
    assert modes == [part.training for part in model.modules()]


def test_the_source_sees_the_weights_as_they_are(coder):
    model = policy(coder)
    live, late = source(coder, model), source(coder, policy(coder, seed=1))
    first = next(live)
    model.load_state_dict(policy(coder, seed=1).state_dict())
    next(late)
    assert same(next(live), next(late))  # the second round, with the other weights
    assert not same(first, next(source(coder, model)))


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 1), (2, 3)])
def test_resumed_anywhere_it_goes_on_the_same(coder, tmp_path, epochs, minibatches):
    model = policy(coder)
    head = head_of(Observed(model))

    def score(batch: Any) -> torch.Tensor:
        with resting(model):
            return response_logprobs(head, batch)

    def new() -> RolloutSource:
        return source(coder, model, epochs=epochs, minibatches=minibatches, score=score)

    whole = new()
    batches = [next(whole) for _ in range(9)]
    for place in range(8):
        going = new()
        for _ in range(place):
            next(going)
        save_tree(tmp_path / str(place), going.state_dict())
        back = new()
        back.load_state_dict(load_tree(tmp_path / str(place)))
        assert [same(next(back), batch) for batch in batches[place:]] == [True] * (9 - place)
        assert back.epoch == whole.epoch


def test_several_passes_keep_the_probabilities_the_tokens_had(coder):
    model = policy(coder)
    head = head_of(Observed(model))
    rollouts = source(coder, model, epochs=2, minibatches=2, score=lambda batch: response_logprobs(head, batch))
    written = [next(rollouts) for _ in range(2)]
    expected = [response_logprobs(head, batch).detach() for batch in written]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = [next(rollouts) for _ in range(2)]
    for batch, logp in zip(written, expected, strict=True):
        torch.testing.assert_close(batch["old_logp"], logp)
    assert sorted(len(b["old_logp"]) for b in written + again)  # all there
    total = sum(b["old_logp"].sum() for b in written)
    torch.testing.assert_close(sum(b["old_logp"].sum() for b in again), total)
    moved = torch.cat([response_logprobs(head, batch).detach() - batch["old_logp"] for batch in again])
    assert moved.abs().max() > 1e-3
    with pytest.raises(ValueError, match="score="):
        source(coder, model, epochs=2)


def test_two_processes_write_different_responses_to_different_problems(coder):
    model, shares = policy(coder), []
    for rank in range(2):
        part = source(coder, model)
        part.shard = (rank, 2)
        shares.append(next(part))
    whole = next(source(coder, model))
    assert [len(share["rewards"]) for share in shares] == [3, 3] and len(whole["rewards"]) == 6


# -- in training ----------------------------------------------------------------------------------------------------


def test_a_player_learns_from_its_own_rollouts(coder, tmp_path):
    """Letters are rewarded, and become more. One player, no loop of its own."""
    model = policy(coder)
    student = Observed(model)
    prefer = lambda text, record: sum(sign.isascii() and sign.isalpha() for sign in text) / 5  # noqa: E731
    sampler = LiveSampler(model, coder, 5)
    rollouts = RolloutSource(sampler, coder, [{"prompt": "a"}], prefer, prompts=1, group=32, seed=0)
    player = Player("policy", student, PolicyGradient(head_of(student)), optimizer=adamw(2e-2, weight_decay=0.0))
    before = next(source(coder, model))  # an outsider's look changes nothing
    Run(tmp_path, quiet=True).execute([Train("policy", player, source=rollouts, steps=25, log_every=1)])
    lines = map(json.loads, Path(tmp_path, "stages/01-policy/metrics.jsonl").read_text().splitlines())
    values = [line["values"]["PolicyGradient.reward"] for line in lines if line["kind"] == "train"]
    assert sum(values[-5:]) / 5 > sum(values[:5]) / 5 + 0.1
    assert before["rewards"].shape == (6,)


def test_kl_to_a_reference_pulls_back(coder):
    model, reference = policy(coder), policy(coder, seed=1)
    student, fixed = Observed(model), Observed(reference, frozen=True)
    batch = next(source(coder, model))
    batch["advantages"] = torch.zeros(6)
    term = PolicyGradient(head_of(student), kl=0.5, reference=head_of(fixed), normalisation="token")
    loss = term(batch, 0.0)
    ours, theirs = (response_logprobs(head_of(o), batch).detach() for o in (student, fixed))
    expected = 0.5 * (torch.exp(theirs - ours) - 1 - (theirs - ours)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    same_model = PolicyGradient(head_of(student), kl=0.5, reference=head_of(Observed(policy(coder), frozen=True)))
    assert same_model(batch, 0.0).item() == pytest.approx(0.0, abs=1e-6)


# -- hints ----------------------------------------------------------------------------------------------------------


class Scripted:
    """Writes what it is told to."""

    def __init__(self, coder: Coder, texts: list[list[str]]) -> None:
        self.texts, self.coder = texts, coder

    def sample(self, prompts: Any, *, n: int, seed: int) -> list[list[Response]]:
        return [[Response(tuple(self.coder.response(t)), t, True) for t in group] for group in self.texts]


def scripted(coder: Coder, hints: Hints, texts: list[list[str]], verifier: Any) -> dict[str, Any]:
    rollouts = RolloutSource(
        Scripted(coder, texts),
        coder,
        [{"prompt": "p"}, {"prompt": "q"}],
        verifier,
        prompts=2,
        group=len(texts[0]),
        prepare=hints,
        collate=hints.collate,
    )
    return next(rollouts)


def hinted_texts(coder: Coder, batch: dict[str, Any]) -> list[str]:
    mask = batch["hinted"]["attention_mask"].bool() & ~batch["hinted"]["loss_mask"].bool()
    return [coder.text(ids[keep].tolist()) for ids, keep in zip(batch["hinted"]["input_ids"], mask, strict=True)]


def test_failed_responses_get_a_correct_sibling_as_their_hint(coder):
    right = lambda text, record: text.startswith("ok")  # noqa: E731
    batch = scripted(coder, Hints(coder, "{solution}|{prompt}"), [["no", "ok1", "ok2"], ["no", "bad", "no"]], right)
    assert batch["z_distil"].tolist() == [1, 0, 0, 0, 0, 0] and batch["z_group"].tolist() == [0, 1, 1, 1, 1, 1]
    (text,) = hinted_texts(coder, batch)
    assert text in ("ok1|p", "ok1|q")
    _, label, _ = response_tokens(batch["hinted"])
    assert label.tolist() == coder.response("no")  # the response itself is read again, word for word


def test_no_distilled_response_leaves_one_empty_row(coder):
    batch = scripted(coder, Hints(coder, "{solution}|{prompt}"), [["a", "b"], ["c", "d"]], lambda t, r: 0)
    assert batch["hinted"]["loss_mask"].sum() == 0 and len(batch["hinted"]["input_ids"]) == 1
    assert (batch["advantages"] == 0).all()


def test_feedback_is_used_where_no_sibling_is_right(coder):
    hints = Hints(coder, "{solution}|{prompt}", "{feedback}!{prompt}")
    batch = scripted(coder, hints, [["a", "b"], ["ok", "d"]], lambda t, r: (t == "ok", "why"))
    assert batch["z_distil"].tolist() == [1, 1, 0, 1]
    texts = hinted_texts(coder, batch)
    assert [text.partition("why!")[1] for text in texts] == ["why!", "why!", ""] and texts[2].startswith("ok|")


def test_corrupted_hints_come_from_another_problem(coder):
    hints = Hints(coder, "{solution}|{prompt}", corrupt=1.0)
    batch = scripted(coder, hints, [["x", "ok1"], ["y", "ok2"]], lambda t, r: t.startswith("ok"))
    assert batch["corrupted"].tolist() == [1, 0, 1, 0]
    first, second = (text.split("|")[0] for text in hinted_texts(coder, batch))
    assert first in ("y", "ok2") and second in ("x", "ok1")


# -- servers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Any:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **request})
            choices = [{"text": "ab", "finish_reason": "stop"}, {"text": "abc", "finish_reason": "length"}]
            body = json.dumps({"choices": choices} if request["model"] == "known" else {"error": "none"}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    thread.join()
    http.server_close()


def test_responses_from_a_server(coder, server):
    url, asked = server
    sampler = ServerSampler(url, "known", coder, 7, temperature=0.5, key="secret")
    ended, cut = sampler.sample(["ab"], n=2, seed=3)[0]
    assert ended == Response(tuple(coder.response("ab")), "ab", True)
    assert cut == Response(tuple(coder.response("abc")[:-1]), "abc", False)
    (request,) = asked
    assert request["path"] == "/v1/completions" and request["prompt"] == coder.prompt("ab")
    assert (request["n"], request["max_tokens"], request["temperature"], request["seed"]) == (2, 7, 0.5, 3)
    assert request["key"] == "Bearer secret"


def test_servers_that_do_not_answer(coder, server):
    url, _ = server
    with pytest.raises(ModelError, match="no completion from 'other'"):
        ServerSampler(url, "other", coder, 7, retry=Retry(attempts=2, first=0.01)).sample(["a"], n=1, seed=0)
    with pytest.raises(ModelError, match="OpenAI-compatible server runs there"):
        ServerSampler("http://127.0.0.1:9/v1", "known", coder, 7, timeout=2).sample(["a"], n=1, seed=0)


def test_a_tokenizer_without_an_end():
    class Endless:
        eos_token_id, pad_token_id, chat_template = None, None, None

    with pytest.raises(ModelError, match="no end-of-text token"):
        Coder(Endless())  # type: ignore[arg-type]
