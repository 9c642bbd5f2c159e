"""Responses from a server that fails now and then: nothing is lost, and one line says why it ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import _endpoint as fault
import pyarrow.parquet as pq
import pytest
from _endpoint import Endpoint, serving

from stillhouse import Run
from stillhouse.base.errors import ConfigError, Interrupted, ModelError
from stillhouse.core.stage import Generate
from stillhouse.data.responses import Coder
from stillhouse.models import train_bpe
from stillhouse.rl.sampling import Response, ServerSampler
from stillhouse.teachers import Retry

QUICK = Retry(attempts=4, first=0.01, longest=0.02)
PROMPTS = ["ab", "b", "cab", "ddd", "ea", "eb"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def coder() -> Coder:
    return Coder(train_bpe(["abcde"], vocab_size=257))


def sampler(endpoint: Endpoint | str, coder: Coder, **options: Any) -> ServerSampler:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    how: dict[str, Any] = {"retry": QUICK, "timeout": 60.0, "concurrency": 3, **options}
    return ServerSampler(url, "teacher", coder, 7, **how)


def echoed(coder: Coder, prompt: str, count: int) -> list[Response]:
    text = f"answer to {coder.prompt(prompt)}"
    return [Response(tuple(coder.response(text)), text, True)] * count


TROUBLES = [fault.drop, fault.half, fault.too_short, fault.broken_json, fault.html, fault.other_json, fault.no_choices]
TROUBLES += [fault.gateway, fault.status(500), fault.status(429), fault.status(408)]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: getattr(trouble, "__name__", "status"))
def test_trouble_that_passes(coder, trouble):
    """Everything goes wrong twice, for two prompts; the responses are those of the prompts, in their order."""
    bad = {str(coder.prompt(prompt)) for prompt in ("b", "ddd")}
    with serving(Endpoint(lambda prompt, nth: trouble if prompt in bad and nth <= 2 else None)) as endpoint:
        found = sampler(endpoint, coder).sample(PROMPTS, n=2, seed=5)
    assert found == [echoed(coder, prompt, 2) for prompt in PROMPTS]
    assert endpoint.asked == {str(coder.prompt(p)): 3 if p in ("b", "ddd") else 1 for p in PROMPTS}
    seeds = {str(body["prompt"]): body["seed"] for body in endpoint.bodies}
    assert seeds == {str(coder.prompt(prompt)): 5 + place for place, prompt in enumerate(PROMPTS)}
    assert endpoint.busiest <= 3


def test_prompts_go_out_side_by_side_but_not_all(coder):
    meeting = threading.Barrier(2)  # nobody is answered before a second one is there
    with serving(Endpoint(delay=lambda prompt: 0.0 * meeting.wait(timeout=30))) as endpoint:
        sampler(endpoint, coder, concurrency=2).sample(PROMPTS, n=1, seed=0)
    assert endpoint.busiest == 2 and len(endpoint.bodies) == len(PROMPTS)


def test_a_server_that_writes_one_at_a_time(coder):
    """What is missing is asked for, with other seeds."""
    with serving(Endpoint(most=2)) as endpoint:
        (found,) = sampler(endpoint, coder).sample(["ab"], n=5, seed=8)
    assert found == echoed(coder, "ab", 5)
    assert [(body["n"], body["seed"]) for body in endpoint.bodies] == [(5, 8), (3, 10), (1, 12)]


def test_replies_that_never_end(coder):
    with serving(Endpoint(lambda prompt, nth: fault.slow_loris if nth == 1 else None)) as endpoint:
        begun = time.monotonic()
        assert sampler(endpoint, coder, timeout=0.4).sample(["ab"], n=1, seed=0) == [echoed(coder, "ab", 1)]
        assert time.monotonic() - begun < 30


def line_of(expected: type[Exception], endpoint: Endpoint | str, coder: Coder, **options: Any) -> str:
    with pytest.raises(expected) as caught:
        sampler(endpoint, coder, **options).sample(PROMPTS, n=1, seed=0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not [thread for thread in threading.enumerate() if thread.name == "endpoint"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("react", "tries", "said"),
    [
        (fault.status(400, "too long"), 1, "status 400: too long"),
        (fault.status(500, "boom"), 4, "status 500: boom (4 tries)"),
        (fault.status(404), 1, "does not know the model 'teacher'; did you mean 'teachers'?"),
        (fault.status(401, "Incorrect API key: secret-key"), 1, "refuses the key in MY_KEY (Incorrect API key: ***)"),
    ],
)
def test_what_does_not_pass_is_one_line(coder, react, tries, said):
    with serving(Endpoint(lambda prompt, nth: react, models=("teachers",))) as endpoint:
        line = line_of(ModelError, endpoint, coder, concurrency=1, key="secret-key", key_name="MY_KEY")
    assert said in line and "no completion from 'teacher'" in line and "secret" not in line
    assert len(endpoint.bodies) == tries


def test_a_dead_server(coder):
    """Before the first answer there is nothing to wait for; after one it may be restarting."""
    begun = time.monotonic()
    assert "is the server running?" in line_of(
        ModelError, f"http://127.0.0.1:{fault.free_port()}/v1", coder, retry=Retry(first=60.0)
    )
    assert time.monotonic() - begun < 30
    with serving(Endpoint()) as endpoint:
        asks = sampler(endpoint, coder)
        asks.sample(["ab"], n=1, seed=0)
    with pytest.raises(ModelError, match=r"cannot connect .* \(4 tries\)"):
        asks.sample(["ab"], n=1, seed=0)


def test_a_long_wait_is_said(coder):
    with serving(Endpoint(lambda prompt, nth: fault.status(429, Retry_After="4000"))) as endpoint:
        assert "come back in 4,000 s" in line_of(Interrupted, endpoint, coder, concurrency=1)


def test_an_unusable_url(coder):
    with pytest.raises(ConfigError, match="not the URL of an endpoint"):
        sampler("localhost:8000", coder)


def test_traces_of_a_server_that_dies_are_kept(coder, tmp_path: Path):
    """Each is on disk as it comes in: the next sitting asks for the others alone."""
    asked = {str(place): (prompt, place) for place, prompt in enumerate(PROMPTS)}

    def stage(endpoint: Endpoint) -> Generate:
        asks = sampler(endpoint, coder, concurrency=1)

        def write(left: Any) -> Any:
            for key, (one,) in asks.written(left, n=1):
                yield key, {"text": one.text}

        return Generate("traces", asked, write, together=True)

    broken = Endpoint(lambda prompt, nth: fault.status(400) if prompt == str(coder.prompt("ddd")) else None)
    with serving(broken), pytest.raises(ModelError):
        Run(tmp_path, quiet=True).execute([stage(broken)])
    assert len(broken.answered) == 3
    with serving(Endpoint()) as endpoint:
        made = Run(tmp_path, quiet=True).execute([stage(endpoint)])["traces"]
    assert len(endpoint.bodies) == 3
    texts = [row["text"] for row in pq.read_table(made.data_file()).to_pylist()]
    assert texts == [echoed(coder, prompt, 1)[0].text for prompt in PROMPTS]
