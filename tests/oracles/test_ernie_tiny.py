"""ERNIE-Tiny (card 012): latent loss against loops, limits, gradients; phases; what is handed on."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from watching import watched

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import Progress
from stillhouse.losses.attention_scores import attention_scores
from stillhouse.models.encoder_layers import EncoderLayers, layer_map
from stillhouse.models.text_classifier import smaller_config
from stillhouse.models.word_replacement import WordReplacer
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.objectives.encoders import LatentMatch, SoftTargets
from stillhouse.systems.language.ernie_tiny import ErnieTiny
from stillhouse.tasks.phases import PROJECTION, Phase, parse_phases

SMALL = {"vocab_size": 40, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}


def bert(layers: int = 2, seed: int = 0, **changes: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(**{**SMALL, "num_hidden_layers": layers, "num_labels": 3, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) if padded else torch.ones(2, 5, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}


def test_layer_maps():
    assert layer_map(4, 12) == [3, 6, 9, 12]
    assert layer_map(6, 12) == [2, 4, 6, 8, 10, 12]
    with pytest.raises(ModelError, match="no multiple"):
        layer_map(5, 12)


def test_scores_are_those_the_model_attends_by():
    model = bert()
    model.set_attn_implementation("eager")
    found = EncoderLayers.of(model)
    observed = Observed(model, frozen=True)
    q, k = observed.tap(found.queries[1])(batch(False)), observed.tap(found.keys[1])(batch(False))
    with torch.no_grad():
        attended = model(input_ids=batch()["input_ids"], output_attentions=True).attentions[1]
    torch.testing.assert_close(attention_scores(q, k, heads=3).softmax(-1), attended)


def test_latent_loss_against_loops():
    """Layer 1 of one learns from layer 2 of two, and the embeddings from the embeddings; padding is 0 on both sides."""
    student, teacher = bert(1, 1, hidden_size=6), bert(2, 2)
    term = LatentMatch(Observed(student), Observed(teacher, frozen=True))
    data = batch()
    states = {}
    for name, model in (("s", student), ("t", teacher)):
        with torch.no_grad():
            states[name] = model(
                input_ids=data["input_ids"], attention_mask=data["attention_mask"], output_hidden_states=True
            ).hidden_states
    expected = 0.0
    projection = term.projection.weight.detach()
    for own, theirs in ((0, 0), (1, 2)):
        for b in range(2):
            for t in range(int(data["attention_mask"][b].sum())):
                difference = projection @ states["s"][own][b, t] - states["t"][theirs][b, t]
                expected += float(difference.square().sum()) / (2 * 5 * 12)
    s, t = student.bert.encoder.layer[0].attention.self, teacher.bert.encoder.layer[1].attention.self
    for b in range(2):
        real = int(data["attention_mask"][b].sum())
        for head in range(3):
            for i in range(real):
                for j in range(real):
                    scores = []
                    for layer, hidden, d in ((s, states["s"][0], 2), (t, states["t"][1], 4)):
                        part = slice(head * d, head * d + d)
                        scores.append((layer.query(hidden[b, i])[part] @ layer.key(hidden[b, j])[part]).item() / d**0.5)
                    expected += (scores[0] - scores[1]) ** 2 / (2 * 3 * 5 * 5)
    assert float(term(data)) == pytest.approx(expected, rel=1e-4)


def test_equal_models_and_an_identity_map_lose_nothing():
    model = bert()
    term = LatentMatch(Observed(model), Observed(bert(), frozen=True))
    with torch.no_grad():
        assert float(term(batch())) > 0.1
        term.projection.weight.copy_(torch.eye(12))
        assert float(term(batch())) == pytest.approx(0.0, abs=1e-10)


def test_padding_has_no_part_in_it():
    term = LatentMatch(Observed(bert(1, 1)), Observed(bert(2, 2), frozen=True))
    one, other = batch(), batch()
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][1, 3:] = 7
    assert float(term(one)) == pytest.approx(float(term(other)), rel=1e-5)


def test_equal_teachers_make_gd_and_ged_one_objective():
    """A head has no part in the latent loss."""
    other = bert(2, 2)
    with torch.no_grad():
        other.classifier.weight.add_(5.0)
    values = []
    for teacher in (bert(2, 2), other):
        torch.manual_seed(0)
        values.append(float(LatentMatch(Observed(bert(1, 1)), Observed(teacher, frozen=True))(batch())))
    assert values[0] == values[1]


def test_soft_labels():
    student, teacher = bert(1, 1), bert(2, 2)
    s, t = Observed(student), Observed(teacher, frozen=True)
    logits = s.output("logits")(batch()).detach()
    p = t.output("logits")(batch()).softmax(-1)
    q = logits.clone().requires_grad_()
    loss = SoftTargets(s.output("logits"), t.output("logits")).compute(student=q, teacher=p.log())
    (gradient,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(gradient, (logits.softmax(-1) - p) / 2)
    entropy = float(-(p * p.log()).sum(-1).mean())
    assert float(loss) > entropy
    same = SoftTargets(s.output("logits"), t.output("logits"), temperature=3.0).compute(
        student=p.log(), teacher=p.log()
    )
    softer = (p.log() / 3).softmax(-1)
    assert float(same) == pytest.approx(9 * float(-(softer * softer.log()).sum(-1).mean()), rel=1e-5)


def test_the_plan_changes_one_thing_at_a_time():
    for lines in (ErnieTiny.phases, ErnieTiny.demo["phases"]):
        gd, ged, tad, tsd = parse_phases(lines, ())
        assert (gd.changes(ged), ged.changes(tad), tad.changes(tsd)) == (["teacher"], ["data"], ["loss"])
        assert (gd.teacher, gd.data, gd.loss) == ("pretrained", "general", "latent")
        assert tsd.losses == {"latent", "soft", "hard"}


def test_phases_are_skipped_and_refused():
    left = parse_phases(ErnieTiny.phases, ("ged", "tad"))
    assert [phase.name for phase in left] == ["gd", "tsd"]
    assert Phase.parse("x: fine-tuned task soft steps=7 lr=0.1") == Phase(
        "x", "fine-tuned", "task", "soft", 3.0, 7, 0.1
    )
    with pytest.raises(ConfigError, match="no phase 'gde'; did you mean"):
        parse_phases(ErnieTiny.phases, ("gde",))
    for line, said in (
        ("gd: tuned general latent", "teacher 'tuned'"),
        ("gd: pretrained general hard", "no labels"),
        ("gd: pretrained task soft", "no classes"),
        ("gd: pretrained general", "write NAME"),
        ("gd: pretrained general latent step=3", "write epochs=3"),
    ):
        with pytest.raises(ConfigError, match=said):
            Phase.parse(line)


def test_the_papers_student_has_14_5_million_parameters():
    config = smaller_config(BertConfig(), "layers=4,hidden_size=312,intermediate_size=1200")
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in BertForSequenceClassification(config).bert.parameters())
    assert count / 1e6 == pytest.approx(14.35, abs=0.05)  # without the pooler 14.25


def test_other_encoders_and_those_that_cannot_be():
    torch.manual_seed(0)
    xlm = XLMRobertaForSequenceClassification(XLMRobertaConfig(**SMALL, num_hidden_layers=2))
    distil = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=40, dim=12, n_layers=2, n_heads=3, hidden_dim=20, dropout=0.0, attention_dropout=0.0
        )
    )
    for model in (xlm, distil):
        found = EncoderLayers.of(model)
        assert len(found.layers) == len(found.queries) == 2 and found.heads == 3
        assert math.isfinite(float(LatentMatch(Observed(bert(1)), Observed(model.eval(), frozen=True))(batch())))
    deberta = DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, num_hidden_layers=1))
    with pytest.raises(ModelError, match="not built like BERT"):
        EncoderLayers.of(deberta)
    with pytest.raises(ModelError, match="as many"):
        LatentMatch(Observed(bert(1)), Observed(bert(2, num_attention_heads=2), frozen=True))


def test_words_are_replaced_by_those_that_fit():
    """A head that likes one word at every place: replaced words become it, at the rate asked for."""
    tokenizer = word_tokenizer(["one", "two", "three", "four"])
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**{**SMALL, "vocab_size": len(tokenizer)}, num_hidden_layers=1)).eval()
    with torch.no_grad():
        model.cls.predictions.bias[tokenizer.convert_tokens_to_ids("four")] = 50.0
        model.cls.predictions.bias[tokenizer.cls_token_id] = 99.0  # a special token is no word
    draw = random.Random(0)
    changed = WordReplacer(model, tokenizer, candidates=1, rate=0.4)("one two three", 300, draw)
    words = [word for text in changed for word in text.split()]
    assert {tuple(text.split())[i] for text in changed for i in range(3)} == {"one", "two", "three", "four"}
    assert words.count("four") / len(words) == pytest.approx(0.4, abs=0.06)
    assert WordReplacer(model, tokenizer, candidates=1, rate=0.0)("one two", 2, draw) == ["one two"] * 2


# -- what each phase is given ---------------------------------------------------------------------------------------

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PLAN = (
    "gd: pretrained general latent steps=2 lr=1e-2",
    "ged: fine-tuned general latent steps=2 lr=2e-2",
    "tad: fine-tuned task latent steps=1 lr=3e-2",
    "tsd: fine-tuned task latent+soft+hard steps=1 lr=4e-2",
)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A BERT, 64 different lines of general text, 30 labelled ones."""
    folder = tmp_path_factory.mktemp("ernie")
    tokenizer = word_tokenizer(WORDS)
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    lines = [" ".join(words) for words in itertools.product(WORDS, WORDS)]
    (folder / "general.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    rows = [{"text": " ".join(words), "label": words[0]} for words in itertools.product(WORDS[:2], WORDS, WORDS[:2])]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "teacher": str(folder / "teacher"),
        "corpus": str(folder / "general.jsonl"),
        "data": str(folder / "task.jsonl"),
        "length": "8",
    }


def texts(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in batch["input_ids"]]


def test_each_phase_gets_its_teacher_its_text_its_losses_and_what_the_one_before_left(materials, tmp_path):
    read: dict[str, list[tuple[int, ...]]] = {}
    given: list[tuple[str, str, str, set[str], float]] = []

    def look(stage: Any, left: dict[str, Artifact]) -> None:
        name = "tsd" if stage.name == "student" else stage.name
        if name not in ("gd", "ged", "tad", "tsd"):
            return
        player = stage.players
        student, teacher = player.trained[0].module, player.objective.observed()
        (teacher,) = [one.module for one in teacher if one is not player.trained[0]]
        tuned = load_file(left["teacher"].path / "model.safetensors")
        plain = load_file(f"{materials['teacher']}/model.safetensors")
        weights = {key: value for key, value in teacher.state_dict().items() if ".layer." in key}
        who = [
            kind
            for kind, known in (("pretrained", plain), ("fine-tuned", tuned))
            if all(torch.equal(value, known[key]) for key, value in weights.items())
        ]
        state = stage.source.state_dict()
        read[name] = [row for _ in range(stage.steps * stage.accumulate) for row in texts(next(stage.source))]
        stage.source.load_state_dict(state)
        kind = "general" if all(len(row) == 4 for row in read[name]) else "task"  # two words and two marks, or five
        terms = getattr(player.objective, "terms", [player.objective])
        (rate,) = {group["lr"] for group in player.optimizer([{"params": list(student.parameters())}]).param_groups}
        given.append((name, *who, kind, {term.name for term in terms}, rate))
        (latent,) = [term for term in terms if term.name == "Latent"]
        assert (stage.accumulate, player.lr(Progress(stage.steps, stage.steps))) == (2, 0.0)
        order = ["gd", "ged", "tad", "tsd"]
        if name == "gd":
            return
        before = left[order[order.index(name) - 1]]
        for key, value in load_file(before.path / "model.safetensors").items():
            assert torch.equal(student.state_dict()[key], value), key
        assert torch.equal(latent.projection.weight, load_file(before.path / PROJECTION)["weight"])

    system = ErnieTiny.make(
        **materials, phases=PLAN, augment=1, candidates=3, batch_size=8, accumulate=2, steps=2, lr=1e-2,
        student="layers=1,hidden_size=6,intermediate_size=12", keep="best", eval_examples=4, validation=0.2, warmup=0.0,
    )  # fmt: skip
    seen, left = watched(system, tmp_path / "run", look)
    assert given == [
        ("gd", "pretrained", "general", {"Latent"}, 0.01),
        ("ged", "fine-tuned", "general", {"Latent"}, 0.02),
        ("tad", "fine-tuned", "task", {"Latent"}, 0.03),
        ("tsd", "fine-tuned", "task", {"Latent", "Soft", "Hard"}, 0.04),
    ]
    assert len({*read["gd"], *read["ged"]}) == 64  # four batches of eight each: no sentence comes twice
    assert not (left["student"].path / PROJECTION).exists()  # dropped with the last phase
    # A head that nothing has trained is no reason to keep a state: there the last one stays.
    assert [seen[name].best for name in ("gd", "ged", "tad", "student")] == [None, None, None, "selection_loss"]
    assert seen["teacher"].best == "selection_loss"


def test_phases_go_through_the_task_s_text_too(materials, tmp_path):
    read = {}

    def look(stage: Any, left: dict[str, Artifact]) -> None:
        if stage.name in ("one", "student"):
            state = stage.source.state_dict()
            read[stage.name] = sorted(texts(next(stage.source)))
            stage.source.load_state_dict(state)

    plan = ("one: fine-tuned task latent steps=1", "two: fine-tuned task soft steps=1")
    system = ErnieTiny.make(
        **materials, phases=plan, augment=0, batch_size=8, steps=2, student="layers=1,hidden_size=6", validation=0.2
    )
    watched(system, tmp_path / "run", look, until="student")
    assert not set(read["one"]) & set(read["student"])
