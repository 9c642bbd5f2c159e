"""A teacher behind an endpoint that scores text: its likeliest tokens at every place of what others wrote.

vLLM's ``prompt_logprobs`` of ``POST {url}/completions``. Shapes: B rows, T tokens, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Observed
from stillhouse.teachers.client import Client, Refused, Retry, checked_url, key_in, side_by_side, streamed

GIVEN = "teacher"  # the entry of a batch that holds what the teacher said of it


class _Said(BaseModel):
    logprob: float


class _Choice(BaseModel):
    prompt_logprobs: list[dict[int, _Said] | None]


class _Reply(BaseModel):
    """What is read of a completion; everything else in it is ignored."""

    choices: list[_Choice] = Field(min_length=1)


def _score(line: Any, *, model: str, ids: Sequence[int], k: int) -> Any:
    extra = {"prompt_logprobs": k}
    return line.completions.with_raw_response.create(model=model, prompt=list(ids), max_tokens=1, extra_body=extra)


class EndpointScorer:
    """Asks an endpoint for the ``k`` likeliest tokens after every token of a row.

    Args:
        url, model: the endpoint, and the name it knows the teacher by; its vocabulary must be the student's.
        api_key_env: environment variable that holds the key.
        concurrency: rows on their way at one time.

    Raises:
        ModelError: a row got no score, in one line.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        k: int,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 600.0,
        retry: Retry | None = None,
    ) -> None:
        self.url, self.model, self.k, self.concurrency = checked_url(url), model, k, concurrency
        self._client = Client(
            self.url,
            model,
            key_in(api_key_env),
            retry or Retry(),
            timeout,
            ending=self._failed,
            so_far=lambda: "run the same again to go on",
            key_name=api_key_env,
            takes="completions",
        )

    def score(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> dict[str, Tensor]:
        """``tokens`` and ``log_p`` (B, T - 1, K), ``log_rest`` (B, T - 1) after each token; padding gets zeros.

        ``given`` (B, T - 1) is the log-probability of the token that does come next.
        """
        B, T = input_ids_BT.shape
        lengths = [T] * B if attention_mask_BT is None else attention_mask_BT.sum(-1).tolist()
        rows = [row[:length] for row, length in zip(input_ids_BT.tolist(), lengths, strict=True)]
        found: dict[int, list[dict[int, _Said]]] = {}
        todo = iter(enumerate(rows))

        async def worker(put: Callable[[Any], None]) -> None:
            for place, ids in todo:
                put((place, await self._row(ids)))
                self._client.answered += 1

        async def work(put: Callable[[Any], None]) -> None:
            async with self._client.open():
                await side_by_side(lambda: worker(put), min(self.concurrency, B))

        found.update(streamed(work))
        tokens_BTK = torch.zeros(B, T - 1, self.k, dtype=torch.long)
        log_p_BTK = torch.full((B, T - 1, self.k), -torch.inf)
        given_BT = torch.zeros(B, T - 1)
        for place, said in found.items():
            for t, alternatives in enumerate(said):
                best = sorted(alternatives.items(), key=lambda item: -item[1].logprob)[: self.k]
                tokens_BTK[place, t] = torch.tensor([token for token, _ in best])
                log_p_BTK[place, t] = torch.tensor([one.logprob for _, one in best])
                given_BT[place, t] = alternatives[rows[place][t + 1]].logprob
        rest_BT = (1 - log_p_BTK.double().exp().sum(-1)).clamp(min=0)
        return {"tokens": tokens_BTK, "log_p": log_p_BTK, "log_rest": rest_BT.log().float(), "given": given_BT}

    def score_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`score` of a batch's rows."""
        return self.score(batch["input_ids"], batch.get("attention_mask"))

    async def _row(self, ids: Sequence[int]) -> list[dict[int, _Said]]:
        try:
            reply = await self._client.reply(partial(_score, model=self.model, ids=ids, k=self.k), _Reply)
        except Refused as refused:
            raise self._failed(str(refused)) from None
        said = reply.choices[0].prompt_logprobs
        places = [one for one in said[1:] if one is not None and len(one) >= self.k]
        if len(places) != len(ids) - 1:
            raise self._failed(
                f"{len(places)} places with {self.k} log-probabilities for {len(ids)} tokens; it must allow "
                f"prompt_logprobs={self.k} (vLLM: --max-logprobs {self.k})"
            )
        if any(token not in place for token, place in zip(ids[1:], places, strict=True)):
            raise self._failed("it scored other tokens than it was sent; its tokenizer must be the student's")
        return places

    def _failed(self, reason: str) -> ModelError:
        return ModelError(f"{self.url}: no score from {self.model!r} ({reason})")


class Scored:
    """A source whose batches bring what a teacher behind an endpoint says of them, as the entry `GIVEN`."""

    def __init__(self, source: Any, scorer: EndpointScorer) -> None:
        self.source = source
        self.scorer = scorer

    @property
    def epoch(self) -> int:
        return int(self.source.epoch)

    @property
    def shard(self) -> tuple[int, int]:
        rank, world = self.source.shard
        return rank, world

    @shard.setter
    def shard(self, value: tuple[int, int]) -> None:
        self.source.shard = value

    def __next__(self) -> dict[str, Any]:
        batch = next(self.source)
        return {**batch, GIVEN: self.scorer.score_batch(batch)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.source.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


class _Given(nn.Module):
    def forward(self, teacher: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return teacher


def given_teacher() -> Observed:
    """A teacher whose outputs the batch brings along: see `Scored`."""
    return Observed(_Given(), frozen=True, name="teacher")
