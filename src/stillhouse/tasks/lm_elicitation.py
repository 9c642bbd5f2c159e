"""A few problems with answers, many prompts without, and what a language model may be asked for about them.

On the embedded task the problems are the reasoning task's. The teacher is a tiny model that has learnt three
instructions in miniature, through the very templates that any teacher is asked with: answer a problem; write a new one
like those shown; write one on a topic. The student has learnt the same problems at a smaller size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from pydantic import Field

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Context, Evaluate, Generate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.elicited import (
    Beside,
    Elicited,
    Form,
    Ranked,
    Written,
    answered,
    best_and_worst,
    coded,
    demonstrations,
    in_order,
    invented,
    plain,
    whole_lists,
)
from stillhouse.data.reasoning import read_problems
from stillhouse.data.responses import Row, filled, pack_rows, response_tokens
from stillhouse.data.sources import Batches, steps_in
from stillhouse.data.verifiers import final_answer
from stillhouse.losses.preference import sums_by_row
from stillhouse.models.causal_lm import load_causal_lm, parameter_count
from stillhouse.models.reward import new_reward_model
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.objectives.ranked_responses import RewardOrder
from stillhouse.objectives.responses import response_logprobs
from stillhouse.rl.rewards import RewardModel, read_as
from stillhouse.rl.rollouts import RolloutSource
from stillhouse.rl.sampling import resting
from stillhouse.tasks.black_box import STORE
from stillhouse.tasks.embedded_lm import save_pretrained
from stillhouse.tasks.instructed_lm import BeginnerCorpus, InstructedCorpus, topics_of
from stillhouse.tasks.language import endpoint_of
from stillhouse.tasks.reasoning import DEMO, ReasoningSystem, ReasoningTask, coder_of, pretrain
from stillhouse.teachers.answers import Request, Sampling, read_answers, request_keys
from stillhouse.teachers.endpoint import Budget, EndpointTeacher
from stillhouse.teachers.in_process import LocalTeacher
from stillhouse.teachers.scorer import EndpointScorer

TOGETHER = 64  # requests that a model in this process answers at one time
Ask = Literal["none", "labelling", "expansion", "curation", "feature", "feedback", "self-knowledge"]
Learn = Literal["sft", "divergence", "pairwise", "dpo", "rrhf", "pro", "reward"]
WAYS: dict[str, tuple[Learn, ...]] = {
    **dict.fromkeys(("none", "labelling", "expansion", "curation", "self-knowledge"), ("sft",)),
    "feature": ("divergence",),
    "feedback": ("dpo", "pairwise", "rrhf", "pro", "reward"),
}
"""What can be learnt from each way of asking; the first by default."""


@dataclass(kw_only=True)
class AskingSystem(ReasoningSystem):
    """Fields of every system whose language model begins with a few answers and asks for more."""

    teacher: Annotated[
        str,
        "directory or hub id of a causal LM; URL#MODEL: behind an OpenAI-compatible endpoint, for all but "
        "ask=feature; 'demo': a tiny one",
    ] = DEMO
    labelled: Annotated[int, "seeds: problems whose answers are known, drawn by the seed", Ge(1)] = 100
    pool: Annotated[
        Literal["others", "seeds"], "prompts to ask about, without their answers: those that are no seeds, or the seeds"
    ] = "others"
    prompts: Annotated[str | None, "file of further prompts for the pool; they need no answers"] = None
    asked: Annotated[int, "prompts of the pool to ask about, or new problems to ask for", Ge(1)] = 1000
    teacher_temperature: Annotated[float, "at which the teacher writes; 0 takes the most likely", Ge(0)] = 0.7
    demonstrations: Annotated[int, "expansion: seeds that a request for a new problem shows", Ge(1)] = 4
    topics: Annotated[tuple[str, ...], "curation: what new problems are to be about; the embedded task has some"] = ()
    answer_template: Annotated[str, "asks the teacher for an answer: {prompt}, {marker}"] = (
        "Solve this problem step by step, and end with its answer after {marker}.\n\n{prompt}"
    )
    expansion_template: Annotated[str, "asks for a new problem: {demonstrations}, {marker}"] = (
        "Here are some problems with their answers.\n\n{demonstrations}\n\nWrite one more of the same kind, different "
        "from all of these, with its answer, in the same form."
    )
    curation_template: Annotated[str, "asks for a problem on a topic: {topic}, {marker}"] = (
        "Write one problem about {topic}, and its answer, worked out and after {marker}, in this form:\n\n"
        "Problem: ...\nAnswer: ..."
    )
    example_template: Annotated[str, "a problem with its answer, as demonstrations show it: {prompt}, {response}"] = (
        "Problem: {prompt}\nAnswer: {response}"
    )
    example_pattern: Annotated[str, "regular expression with two groups that finds both in what was written"] = (
        r"(?s)Problem:\s*(.+?)\s*Answer:\s*(.+)"
    )
    votes: Annotated[
        int | None, "answers to a prompt, of which most count; by default 1, the student's own 8", Ge(1)
    ] = None
    confidence: Annotated[float, "self-knowledge: share of the answers that must agree", Gt(0), Le(1)] = 0.5
    guesses: Annotated[int, "feedback: the student's guesses at each prompt", Ge(2)] = 4
    max_new_tokens: Annotated[int, "longest response", Ge(1)] = 1024
    batch_size: Annotated[int, "seeds in a batch, and as many responses, pairs or lists beside them", Ge(1)] = 32
    seed_epochs: Annotated[float, "passes over the seeds before anybody is asked", Gt(0)] = 3.0
    epochs: Annotated[float, "passes over what was elicited", Gt(0)] = 3.0
    steps: Annotated[int | None, "steps of the last stage; by default as many as the epochs need", Ge(1)] = None
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 1e-5
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0)] = 0.05
    teacher_steps: Annotated[int, "steps in which the embedded teacher is made", Ge(1)] = 600
    token_budget: Annotated[int | None, "most tokens, prompts and answers, to use at the endpoint", Ge(1)] = None
    api_key_env: Annotated[
        str, "environment variable that holds the endpoint's key", Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    ] = "OPENAI_API_KEY"
    concurrency: Annotated[int, "requests on their way to the endpoint at one time", Ge(1)] = 16

    demo: ClassVar[dict[str, Any]] = {
        **ReasoningSystem.demo,
        "problems": 416,
        "labelled": 16,
        "asked": 400,
        "demonstrations": 2,
        "answer_template": "{prompt}",
        "expansion_template": "like:\n\n{demonstrations}\n\nnew:",
        "curation_template": "about {topic}:",
        "example_template": "{prompt}|{response}",
        "example_pattern": r"(?s)(.+?)\|(.+)",
        "pretrain": 200,
        "max_new_tokens": 32,
        "batch_size": 16,
        "seed_epochs": 30.0,
        "steps": 200,
        "lr": 1e-3,
        "eval_samples": 4,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "problems": 30,
        "labelled": 10,
        "pretrain": 20,
        "teacher_steps": 20,
        "max_new_tokens": 12,
        "batch_size": 8,
        "seed_epochs": 4.0,
        "steps": 10,
        "eval_problems": 8,
        "eval_samples": 2,
    }


@dataclass(frozen=True)
class Asking:
    """The seeds of a task, the pool beside them, a teacher, and the stages in which it is asked and learnt from.

    Attributes:
        seeds: problems with known responses.
        pool: prompts; their answers are not in here, so nobody can read them.
        teacher: where it is; None if nobody asks it.
    """

    system: AskingSystem
    run: Run
    task: ReasoningTask
    seeds: list[tuple[str, str]]
    pool: list[str]
    form: Form
    teacher: str | None = None
    topics: list[str] = field(default_factory=list)
    vocabulary: int | None = None  # teacher's and student's, where they are compared token by token

    @staticmethod
    def prepare(system: AskingSystem, run: Run, ask: Ask) -> Generator[Stage, Artifact, Asking]:
        """Read the data and find the teacher; with ``demo`` models this yields the stages that make them."""
        teacher = system.teacher if ask not in ("none", "self-knowledge") else None
        form = Form(system.example_template, system.example_pattern, system.marker)
        if teacher == DEMO and system.data != DEMO:
            raise ConfigError("teacher=demo knows the problems of data=demo only; for your own data pass a teacher")
        if teacher is not None and endpoint_of(teacher) and ask == "feature":
            raise ConfigError("ask=feature looks into the teacher: give its directory or hub id, not an endpoint")
        if ask == "curation" and system.data != DEMO and not system.topics:
            raise ConfigError("ask=curation needs topics=...: what the teacher is to write problems about")
        if ask == "labelling" and system.teacher_temperature == 0 and (system.votes or 1) > 1:
            raise ConfigError("votes: at teacher_temperature=0 all answers are the same; raise it, or ask once")
        taught = InstructedCorpus(
            steps=system.teacher_steps,
            answer=system.answer_template,
            expansion=system.expansion_template,
            curation=system.curation_template,
            example_form=system.example_template,
            demonstrations=system.demonstrations,
        )
        task = yield from ReasoningTask.prepare(
            system, run, BeginnerCorpus(steps=system.pretrain, hidden_size=48, teacher=taught)
        )
        if teacher == DEMO:
            assert task.puzzle is not None
            teacher = str((yield pretrain("teacher", task.puzzle, task.held_out, taught)).path)
        seeds, pool = Asking._parts(system, run, task)
        if not pool and ask in ("labelling", "feature", "feedback", "self-knowledge"):
            raise ConfigError(
                "no prompts besides the seeds: lower labelled, give prompts=FILE or more data, or pool=seeds"
            )
        form = replace(form, marked=all(final_answer(response, system.marker) for _, response in seeds))
        topics = list(system.topics) or ([] if task.puzzle is None else topics_of(task.puzzle))
        vocabulary = None
        if ask == "feature" and teacher is not None:
            vocabulary = check_same_tokenizer(coder_of(teacher, system).tokenizer, task.coder.tokenizer)
        return Asking(system, run, task, seeds, pool, form, teacher, topics, vocabulary)

    @staticmethod
    def _parts(system: AskingSystem, run: Run, task: ReasoningTask) -> tuple[list[tuple[str, str]], list[str]]:
        """The seeds, and the prompts of the pool: each once, and none that is held out."""
        problems = task.train_problems
        if system.labelled > len(problems):
            raise DataError(
                f"labelled={system.labelled}: there are {len(problems)} problems beside those held out; lower it, or "
                "give more"
            )
        chosen = sorted(random.Random(f"seeds {system.seed}").sample(range(len(problems)), system.labelled))
        seeds = [(problems[at]["prompt"], problems[at].get("trace") or problems[at]["answer"]) for at in chosen]
        if system.pool == "seeds":
            return seeds, [prompt for prompt, _ in seeds]
        others = [problem["prompt"] for at, problem in enumerate(problems) if at not in set(chosen)]
        if system.prompts is not None:
            column = system.prompt_field
            others += [one["prompt"] for one in read_problems(system.prompts, prompt=column, answer=column)]
        taken = {plain(problem["prompt"]) for problem in task.held_out} | {plain(prompt) for prompt, _ in seeds}
        pool = []
        for prompt in others:
            if plain(prompt) not in taken:
                taken.add(plain(prompt))
                pool.append(prompt)
        if len(pool) < len(others):
            run.say(f"pool: {len(others) - len(pool)} of {len(others)} prompts are held out, seeds, or come twice")
        return seeds, pool

    # -- asking -----------------------------------------------------------------------------------------------------

    def writing(
        self, name: str, requests: Sequence[Request], *, by: str | Artifact, temperature: float
    ) -> tuple[list[str], Generate]:
        """The stage in which a model answers, and the key of each request."""
        system, own = self.system, vars(self.system)  # how an endpoint is asked changes no answer: nothing is redone
        where = by if isinstance(by, str) else str(by.path)
        limits: dict[str, Any] = {"max_tokens": system.max_new_tokens, "temperature": temperature}
        there = endpoint_of(where)
        # Servers would give the same answer to every sample of a request with the same seed; here the key counts too.
        sampling = Sampling(**limits) if there else Sampling(**limits, seed=system.seed)
        who = there[1] if there else name
        keys = [next(iter(request_keys(who, sampling, None, [request]))) for request in requests]
        keyed = dict(zip(keys, requests, strict=True))
        if there:
            teacher = EndpointTeacher(
                *there,
                sampling=sampling,
                api_key_env=own["api_key_env"],
                concurrency=own["concurrency"],
                budget=Budget(tokens=own["token_budget"]),
                store=self.run.folder / STORE,
                say=self.run.say,
            )
            return keys, Generate(name, keyed, teacher.answers, together=True)

        def write(left: Mapping[str, Request]) -> Iterator[tuple[str, dict[str, Any]]]:
            model, tokenizer = load_causal_lm(where, trust_remote_code=system.trust_remote_code)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            if system.chat is False:
                tokenizer.chat_template = None
            model.to(self.run.fabric.device)
            local = LocalTeacher(who, model, tokenizer, sampling=sampling, batch_size=TOGETHER)
            yield from local.answers(left, everything=keyed)

        return keys, Generate(name, keyed, write, together=True)

    def elicit(self, ask: Ask, student: Artifact) -> Generator[Stage, Artifact, Artifact | None]:
        """The stages in which the teacher, or the ``student`` of the seeds, is asked; the artifact of the last."""
        system = self.system
        if ask == "none":
            return None
        if ask == "feedback":
            return (yield from self.rank(student, guesses=system.guesses))
        if ask == "self-knowledge":
            own = {"temperature": 1.0, "least": system.confidence}
            return (yield from self.label(student, votes=system.votes or 8, **own))
        assert self.teacher is not None
        if ask in ("expansion", "curation"):
            return (yield from self.invent(ask))
        how = {"temperature": system.teacher_temperature}
        return (yield from self.label(self.teacher, votes=system.votes or 1, **how))

    def label(
        self, by: str | Artifact, *, votes: int, temperature: float, least: float = 0.0
    ) -> Generator[Stage, Artifact, Artifact]:
        """``votes`` answers to prompts of the pool; the teacher is instructed, a student gets the prompt alone."""
        prompts = self.pool[: self.system.asked]
        asked = [self.question(prompt) if by == self.teacher else prompt for prompt in prompts]
        requests = [Request.of(text, sample=vote) for text in asked for vote in range(votes)]
        keys, stage = self.writing("answers", requests, by=by, temperature=temperature)
        written = yield stage

        def read() -> Elicited:
            said = _said(written, keys)
            several = [said[start : start + votes] for start in range(0, len(said), votes)]
            return answered(prompts, several, self.form, least=least)

        return (yield self._parsed(read))

    def invent(self, ask: Ask) -> Generator[Stage, Artifact, Artifact]:
        """New problems with answers: like the seeds that a request shows (expansion), or on a topic (curation)."""
        assert self.teacher is not None
        system, marker = self.system, self.system.marker
        if ask == "expansion":
            drawn = demonstrations(self.seeds, system.demonstrations, system.asked, seed=system.seed)
            shown = (self.form.shown(pairs) for pairs in drawn)
            asked = [filled(system.expansion_template, demonstrations=text, marker=marker) for text in shown]
        else:
            topics = [self.topics[number % len(self.topics)] for number in range(system.asked)]
            asked = [filled(system.curation_template, topic=topic, marker=marker) for topic in topics]
        requests = [Request.of(text, sample=number) for number, text in enumerate(asked)]
        keys, stage = self.writing("problems", requests, by=self.teacher, temperature=system.teacher_temperature)
        written = yield stage

        def read() -> Elicited:
            known = [problem["prompt"] for problem in self.task.held_out] + [prompt for prompt, _ in self.seeds]
            return invented(_said(written, keys), self.form, known={plain(prompt) for prompt in known})

        return (yield self._parsed(read))

    def rank(self, by: Artifact, *, guesses: int) -> Generator[Stage, Artifact, Artifact]:
        """The student's guesses at prompts of the pool, ordered by how likely the teacher finds a token of theirs."""
        prompts = self.pool[: self.system.asked]
        requests = [Request.of(prompt, sample=guess) for prompt in prompts for guess in range(guesses)]
        keys, stage = self.writing("guesses", requests, by=by, temperature=1.0)
        said = _said((yield stage), keys)
        lists: dict[str, dict[str, Any]] = {}
        for number, prompt in enumerate(prompts):
            several = [one for one in said[number * guesses : (number + 1) * guesses] if one.text]
            texts, cut = [one.text for one in several], [not one.finished for one in several]
            if several:
                lists[str(number)] = {"prompt": prompt, "texts": texts, "cut": cut}
        opinions = yield Generate("opinions", lists, self._opinions, together=True)

        def order(context: Context) -> dict[str, Any]:
            import pyarrow.parquet as pq

            scores = {row["key"]: row["scores"] for row in pq.read_table(opinions.data_file()).to_pylist()}
            found = [in_order(one["prompt"], one["texts"], one["cut"], scores[key]) for key, one in lists.items()]
            ranked = [vars(one) for one in found if one is not None]
            context.results |= {"kept": len(ranked), "dropped": len(prompts) - len(ranked)}
            self.run.say(f"elicited: {len(ranked)} of {len(prompts)} prompts kept; the guesses at the others are alike")
            if not ranked:
                raise DataError("all guesses at each prompt are alike, so there is nothing to rank; raise guesses")
            return {"ranked": ranked}

        return (yield Transform("elicited", order))

    def question(self, prompt: str) -> str:
        """What the teacher reads where it is to answer a prompt."""
        return filled(self.system.answer_template, prompt=prompt, marker=self.system.marker)

    def _opinions(self, left: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The mean log-probability of a guess's tokens under the teacher, given the instruction to answer."""
        assert self.teacher is not None
        there, own, items = endpoint_of(self.teacher), vars(self.system), list(left.items())
        coder = self.task.coder if there else coder_of(self.teacher, self.system)
        if there:
            line = {"api_key_env": own["api_key_env"], "concurrency": own["concurrency"]}
            scorer = EndpointScorer(*there, k=1, **line)
        else:
            teacher = self.observed_teacher()
            teacher.module.to(self.run.fabric.device)
            head = head_of(teacher)

        def logprobs(batch: dict[str, Any]) -> torch.Tensor:
            if there:
                return scorer.score_batch(batch)["given"][response_tokens(batch)[0]]
            with resting(teacher.module), self.run.fabric.autocast():
                return response_logprobs(head, self.run.fabric.to_device(batch)).float().cpu()

        # A model here reads the guesses at one prompt at a time, so that a kill changes no score.
        together = own["concurrency"] if there else 1
        for start in range(0, len(items), together):
            part = items[start : start + together]
            rows = [
                coded(coder, self.question(one["prompt"]), text, cut=cut)
                for _, one in part
                for text, cut in zip(one["texts"], one["cut"], strict=True)
            ]
            batch = coder.batch(rows)
            row_N = response_tokens(batch)[2]
            mean_B = sums_by_row(logprobs(batch), row_N, len(rows)) / torch.bincount(row_N, minlength=len(rows))
            scores = mean_B.split([len(one["texts"]) for _, one in part])
            yield from ((key, {"scores": own_B.tolist()}) for (key, _), own_B in zip(part, scores, strict=True))

    def _parsed(self, read: Callable[[], Elicited]) -> Transform:
        """The stage that reads what was written; what cannot be used is dropped and counted."""

        def parse(context: Context) -> dict[str, Any]:
            found = read()
            context.results |= found.figures()
            self.run.say(f"elicited: {found}")
            if not found.pairs:
                raise DataError(f"elicited: {found}; look at what was written, and at the templates and patterns")
            return {"pairs": found.pairs}

        return Transform("elicited", parse)

    # -- learning ---------------------------------------------------------------------------------------------------

    def first(self, name: str) -> Train:
        """The stage in which the student learns the seeds, before anybody is asked anything."""
        steps = steps_in(self.system.seed_epochs, len(self.seeds), batch_size=self.system.batch_size, accumulate=1)
        return self._trained(name, self.task.base, None, lambda _: self._text(), steps)

    def train(
        self,
        name: str,
        start: Artifact,
        learn: Learn,
        elicited: Artifact | None,
        objective: Callable[[Observed], Objective],
        *,
        reward: Artifact | None = None,
        group: int = 4,
    ) -> Train:
        """The stage that goes on with the seeds, and beside them with what was elicited, by ``objective``.

        ``reward``: what writes ``group`` responses to a prompt are judged by; then the student's text is its own.
        """
        size, seed = self.system.batch_size, self.system.seed + 1
        if elicited is None:
            steps = self.system.steps or self._steps(len(self.seeds))
            return self._trained(name, start, None, lambda _: self._text(), steps)
        if reward is not None:
            each = max(1, size // group)
            problems = [{"prompt": prompt} for prompt in self.pool[: self.system.asked]]
            judge = RewardModel(
                str(reward.path), device=self.run.fabric.device, trust_remote_code=self.system.trust_remote_code
            )

            def rollouts(student: Observed) -> Any:
                writer = self.task.sampler(student.module, sharded=[student.tapped])
                how: dict[str, Any] = {"prompts": each, "group": group, "advantage": "leave-one-out", "seed": seed}
                return Beside(RolloutSource(writer, self.task.coder, problems, judge, **how), self._text())

            steps = self.system.steps or steps_in(self.system.epochs, len(problems), batch_size=each, accumulate=1)
            return self._trained(name, start, objective, rollouts, steps)
        items, collate = self._items(learn, elicited)
        batches = Batches(items, size, seed=seed, collate=collate)
        steps = self.system.steps or self._steps(len(items))
        return self._trained(name, start, objective, lambda _: Beside(batches, self._text()), steps)

    def _items(self, learn: Learn, elicited: Artifact) -> tuple[list[Any], Callable[[Any], Any]]:
        """What batches are made of, and how. The teacher's own knowledge is asked about the seeds' text as well."""
        coder, found = self.task.coder, elicited.json()
        if "ranked" in found:
            lists = [Ranked(one["prompt"], tuple(one["texts"]), tuple(one["cut"])) for one in found["ranked"]]
            return lists, partial(whole_lists if learn in ("rrhf", "pro") else best_and_worst, coder)
        pairs = [(prompt, response) for prompt, response in found["pairs"]]
        return self.task.rows([*self.seeds, *pairs] if learn == "divergence" else pairs), coder.batch

    def reward(self, name: str, start: Artifact, elicited: Artifact) -> Train:
        """The stage in which a reward model, which begins as the student, learns the ranking: best against worst."""
        system, coder = self.system, self.task.coder
        found = elicited.json()["ranked"]

        def pairs(lists: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            both = [(one["prompt"], one["texts"][at]) for at in (0, -1) for one in lists]
            rows: list[Row] = [(read_as(coder.tokenizer, *pair)["input_ids"], []) for pair in both]
            return pack_rows(rows, coder.pad)

        trust = system.trust_remote_code
        model = new_reward_model(str(start.path), pad=coder.pad, trust_remote_code=trust)
        judge = Observed(model.to(self.run.fabric.device), name=name, options={"use_cache": False})
        optimizer = adamw(system.lr, weight_decay=system.weight_decay)
        course = linear(1.0, 0.0, warmup=system.warmup)
        player = Player(
            name, judge, RewardOrder(judge.output("logits")), optimizer=optimizer, lr=course, clip=system.clip
        )
        source = Batches(found, system.batch_size, seed=system.seed + 2, collate=pairs)
        save = partial(save_pretrained, tokenizer=coder.tokenizer)
        return Train(name, player, source=source, steps=self._steps(len(found)), save=save)

    def frozen(self, model: Artifact, name: str) -> Observed:
        """A model that is only asked."""
        return Observed(self.task.load(model), frozen=True, name=name, options={"use_cache": False})

    def observed_teacher(self) -> Observed:
        """The frozen teacher."""
        assert self.teacher is not None
        model, _ = load_causal_lm(self.teacher, trust_remote_code=self.system.trust_remote_code)
        return Observed(model, frozen=True, name="teacher", options={"use_cache": False})

    def _steps(self, items: int) -> int:
        return steps_in(self.system.epochs, items, batch_size=self.system.batch_size, accumulate=1)

    def _text(self) -> Batches:
        """Batches of the seeds."""
        rows, coder = self.task.rows(self.seeds), self.task.coder
        return Batches(rows, self.system.batch_size, seed=self.system.seed, collate=coder.batch)

    def _trained(
        self,
        name: str,
        start: str | Artifact,
        elicited: Callable[[Observed], Objective] | None,
        source: Callable[[Observed], Any],
        steps: int,
    ) -> Train:
        student = Observed(self.task.load(start), name=name, options={"use_cache": False})
        objective: Objective = TokenCrossEntropy(head_of(student), name="seeds")
        if elicited is not None:
            seeds = TokenCrossEntropy(head_of(student.view("text")), entry="text", name="seeds")
            objective = seeds + elicited(student)
        course = linear(1.0, 0.0, warmup=self.system.warmup)
        often = max(1, steps // 3)
        return self.task.train(
            name, student, objective, source=source(student), steps=steps, schedule=course, eval_every=often
        )

    # -- measuring --------------------------------------------------------------------------------------------------

    def evaluation(self, models: Mapping[str, Artifact], elicited: Artifact | None) -> Evaluate:
        """The final table, and how many examples were elicited; a teacher in this process is asked as it was before."""
        common = self.task.evaluation(models)

        def measure(context: Context) -> tuple[Table, dict[str, Any]]:
            table, files = common.function(context)
            kept = elicited.metrics["kept"] if elicited is not None else 0
            dropped = elicited.metrics["dropped"] if elicited is not None else 0
            context.results |= {"elicited": kept, "dropped": dropped}
            table.notes.append(f"{len(self.seeds)} seeds; {kept} examples elicited, {dropped} dropped.")
            if self.teacher is not None and not endpoint_of(self.teacher):
                own, n = self.task.speaking_as(self.teacher), self.system.eval_samples
                model = self.observed_teacher().module.to(self.run.fabric.device)
                asked = [{**one, "asked": self.question(one["prompt"])} for one in self.task.test_problems]
                right = own.answers(model, samples=n, problems=asked, prompt="asked")
                row: dict[str, Any] = {"name": "teacher", "parameters": parameter_count(model)}
                row["accuracy"] = sum(map(sum, right)) / (n * len(right))
                table.rows.append(row)
                context.results |= {f"teacher/{key}": row[key] for key in ("parameters", "accuracy")}
            return table, files

        return Evaluate("evaluation", measure)


def _said(written: Artifact, keys: Sequence[str]) -> list[Written]:
    """What was written to each request, by its key."""
    answers = read_answers(written)
    found = []
    for key in keys:
        answer = answers.get(key)
        text = None if answer is None or answer.error else answer.text
        found.append(Written(text, finished=answer is not None and answer.finish_reason != "length"))
    return found
