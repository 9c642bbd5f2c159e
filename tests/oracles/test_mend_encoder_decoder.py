"""MEND (card 025) with an encoder that reads and a decoder that writes: T5, and BART, which counts places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from stillhouse import Observed
from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.in_context import UNSCORED, Item, collate_answers
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.models.demonstration_distiller import DemonstrationDistiller, EncodesDemonstrations, EncodesVectors
from stillhouse.models.encoder_decoders import (
    is_encoder_decoder,
    is_text_encoder,
    load_encoder_decoder,
    load_text_encoder,
    new_text_encoder,
)
from stillhouse.models.swiftkv import convert_swiftkv
from stillhouse.objectives.in_context import as_with_demonstrations

WORDS, WIDTH, START, END, PAD = 13, 16, 0, 12, 0
ITEMS = [Item((1, 7, 2, 8), (3,), (9,)), Item((4, 10, 5, 11, 1, 6), (2, 1), (7, 8)), Item((5, 6), (4,), (11, 9, 10))]


def t5_config(**changes: Any) -> T5Config:
    sizes = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    known = {"decoder_start_token_id": START, "pad_token_id": PAD, "eos_token_id": END, "dropout_rate": 0.0}
    return T5Config(**{**sizes, **known, **changes})


def reader(kind: str = "t5") -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        model: Any = T5ForConditionalGeneration(t5_config())
    else:
        layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        inner = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0}
        ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
        sizes = {"vocab_size": WORDS, "d_model": WIDTH, "max_position_embeddings": 64}
        model = BartForConditionalGeneration(BartConfig(**sizes, **layers, **inner, **ids))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model.eval()


def small(layers: int = 1) -> Any:
    return new_text_encoder(f"layers={layers},hidden_size=8", t5_config(), seed=3).eval()


def distiller(vectors: int = 3, lm: Any = None) -> DemonstrationDistiller:
    return DemonstrationDistiller(lm or small(), vectors=vectors, width=WIDTH)


def batch(items: Any = None) -> dict[str, Tensor]:
    return collate_answers(items or ITEMS, pad=PAD, start=START, end=END, demo_tokens=99)


every_kind = pytest.mark.parametrize("kind", ["t5", "bart"])


def test_a_batch():
    made = batch()
    assert made["demo_ids"][0].tolist() == [0, 0, 1, 7, 2, 8] and made["demo_mask"][2].tolist() == [0, 0, 0, 0, 1, 1]
    assert made["input_ids"].tolist() == [[3, 0], [2, 1], [4, 0]]
    assert made["attention_mask"].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert made["decoder_input_ids"].tolist() == [[0, 9, 0, 0], [0, 7, 8, 0], [0, 11, 9, 10]]
    no = UNSCORED
    assert made["targets"].tolist() == [[9, END, no, no], [7, 8, END, no], [11, 9, 10, END]]
    assert torch.equal(made["answer_mask"].bool(), made["targets"] != no)


@every_kind
@torch.no_grad()
def test_padding_changes_nothing(kind):
    """Each row alone, as the model itself reads it, has the logits it has in the batch."""
    lm, made = reader(kind), batch()
    vectors = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    demonstrations, with_vectors = EncodesDemonstrations(lm), EncodesVectors(lm)
    together = demonstrations(*(made[name] for name in demonstrations.needs))
    read = with_vectors(vectors, *(made[name] for name in with_vectors.needs))
    table = lm.get_input_embeddings()
    for row, item in enumerate(ITEMS):
        said = torch.tensor([[START, *item.answer]])
        size = said.shape[1]
        ids = torch.tensor([[*item.demonstrations, *item.question]])
        expected = lm(input_ids=ids, decoder_input_ids=said).logits[0]
        torch.testing.assert_close(together[row, :size], expected, atol=1e-4, rtol=1e-4)
        embedded = torch.cat([vectors[row], table(torch.tensor(item.question))])[None]
        expected = lm(inputs_embeds=embedded, decoder_input_ids=said).logits[0]
        torch.testing.assert_close(read[row, :size], expected, atol=1e-4, rtol=1e-4)
    own = distiller()
    vectors = own(made["demo_ids"], made["demo_mask"])
    for row, item in enumerate(ITEMS):
        alone = torch.tensor([item.demonstrations])
        torch.testing.assert_close(vectors[row], own(alone, torch.ones_like(alone))[0], atol=1e-5, rtol=1e-4)


class Identity(nn.Module):
    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(lm.get_input_embeddings().weight.detach().clone())
        self.scale = float(getattr(lm.get_input_embeddings(), "embed_scale", 1.0))

    def forward(self, demo_ids: Tensor, demo_mask: Tensor) -> Tensor:
        return self.table[demo_ids] * self.scale


@every_kind
def test_the_demonstrations_themselves_as_vectors_leave_nothing_to_learn(kind):
    lm = reader(kind)
    even = batch([ITEMS[0], Item((4, 10, 5, 11), (2,), (7, 3))])
    identity = Observed(Identity(lm))
    objective = as_with_demonstrations(identity, lm, labels=0.0, kl=1.0)
    assert objective(even).item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        identity.module.table.mul_(-0.5)
    assert objective(even).item() > 1e-3


def test_the_objective_by_hand():
    """KL and cross-entropy over what the decoder writes, its end included."""
    lm, own, made = reader(), distiller(), batch()
    kls, losses = [], []
    for row, item in enumerate(ITEMS):
        said, asked = torch.tensor([[START, *item.answer]]), torch.tensor([[*item.demonstrations, *item.question]])
        vectors = own(made["demo_ids"][row : row + 1], made["demo_mask"][row : row + 1])
        embedded = torch.cat([vectors, lm.get_input_embeddings()(torch.tensor([item.question]))], 1)
        t = lm(input_ids=asked, decoder_input_ids=said).logits[0].log_softmax(-1)
        s = lm(inputs_embeds=embedded, decoder_input_ids=said).logits[0].log_softmax(-1)
        kls.append((t.exp() * (t - s)).sum(-1))
        losses.append(-s.gather(1, torch.tensor([*item.answer, END])[:, None])[:, 0])
    kl, ce = torch.cat(kls).mean().item(), torch.cat(losses).mean().item()
    assert kl > 1e-3

    def value(**weights: float) -> float:
        return as_with_demonstrations(Observed(own), lm, **weights)(made).item()

    assert value(labels=0.0, kl=1.0) == pytest.approx(kl, rel=1e-3)
    assert value(labels=1.0, kl=0.0) == pytest.approx(ce, rel=1e-4)
    assert value(labels=1.0, kl=2.5) == pytest.approx(ce + 2.5 * kl, rel=1e-3)


def test_the_reader_passes_the_gradient_on_and_keeps_its_weights():
    lm, own = reader(), distiller()
    objective = as_with_demonstrations(Observed(own), lm, labels=1.0, kl=1.0)
    values = objective.evaluate(Turn(objective.signals()), batch(), Progress(0, 1))
    sum(value.weighted for value in values).backward()
    assert all(p.grad is None for p in lm.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters())


@torch.no_grad()
def test_vectors_are_the_last_states_of_the_encoder_mapped():
    own, ids = distiller(vectors=2), torch.tensor([[1, 7, 2, 8]])
    embedded = torch.cat([own.lm.get_input_embeddings()(ids), own.prompt[None]], 1)
    states = own.lm.encoder(inputs_embeds=embedded).last_hidden_state[:, -2:]
    torch.testing.assert_close(own(ids, torch.ones_like(ids)), own.adapter(states))
    causal = new_causal_lm(GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=64), seed=0)
    mixed = distiller(lm=causal.eval())  # a decoder may distil for an encoder
    objective = as_with_demonstrations(Observed(mixed), reader(), labels=1.0, kl=1.0)
    assert objective(batch()).item() > 0


def saved(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_on_one_s_own_t5(tmp_path):
    from stillhouse.workflow import run_system

    verbs, words = ("up", "down", "left", "right"), ("cat", "dog", "bird", "stone", "river")
    records = [
        {"task": verb, "input": word, "output": f"{word} {verb}"}
        | ({"candidates": [f"{word} {one}" for one in verbs]} if number else {})
        for number, verb in enumerate(verbs)
        for word in words
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer = train_bpe(["the cat sees the bird and the dog near a river stone going up down left right. " * 30],
                          vocab_size=280)  # fmt: skip
    config = t5_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    teacher = saved(tmp_path / "lm", T5ForConditionalGeneration(config), tokenizer)
    fields = {
        "teacher": teacher,
        "student": "layers=1",
        "data": str(tmp_path / "tasks.jsonl"),
        "demos": 3,
        "demo_tokens": 40,
        "vectors": 4,
        "pretrain_steps": 2,
        "steps": 2,
        "batch_size": 2,
        "trackers": [],
    }
    done = run_system("mend", fields, output=tmp_path / "run", quiet=True)
    figures = done.artifacts["evaluation"].metrics
    assert figures["distilled/prefix"] == 4 and 0 <= figures["in context/accuracy"] <= 1
    made = DemonstrationDistiller.load(done.artifacts["student"].path)
    assert type(made.lm).__name__ == "T5EncoderModel" and len(made.lm.encoder.block) == 1
    ids = torch.tensor([[3, 4, 5]])
    made.save(tmp_path / "again", tokenizer)
    again = DemonstrationDistiller.load(tmp_path / "again")
    assert torch.equal(again(ids, torch.ones_like(ids)), made(ids, torch.ones_like(ids)))
    encoder, _ = load_text_encoder(teacher)  # the teacher's own, without its decoder
    whole, _ = load_encoder_decoder(teacher)
    for name, tensor in encoder.encoder.state_dict().items():
        assert torch.equal(tensor, whole.encoder.state_dict()[name])


def test_which_kind_a_model_is(tmp_path):
    """A decoder that stillhouse has changed is one still, though ``transformers`` does not know its type."""
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    llama = new_causal_lm(config, seed=0)
    for name, model in {"llama": llama, "kv": convert_swiftkv(llama, first=1), "t5": reader(), "half": small()}.items():
        model.save_pretrained(tmp_path / name)
        assert is_encoder_decoder(str(tmp_path / name)) is (name == "t5")
        assert is_text_encoder(tmp_path / name) is (name == "half")


def test_what_is_refused(tmp_path):
    with pytest.raises(ModelError, match="'width=3' is not a size"):
        new_text_encoder("width=3", t5_config(), seed=0)
    with pytest.raises(ModelError, match="bart does not stand alone"):
        new_text_encoder("layers=1", BartConfig(), seed=0)
    saved(tmp_path, T5ForConditionalGeneration(t5_config(vocab_size=300)), train_bpe(["a b"], vocab_size=260))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "decoder_start_token_id": None}))
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        load_encoder_decoder(str(tmp_path))
