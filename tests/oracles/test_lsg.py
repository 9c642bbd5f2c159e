"""LSG attention (card 168): against attention by hand, token for token, and against the kinds it contains."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from stillhouse.models.efficient_attention import convert_encoder, encoder_cost, load_efficient, token_classifier
from stillhouse.models.lsg import _directions, choose, lsg_attention

SELECTIONS = ["norm", "pooling", "lsh", "strided", "block-strided", "none"]
every_selection = pytest.mark.parametrize("selection", SELECTIONS)


DIRECTIONS = {size: _directions(4, size).double().T for size in (2, 3)}


def inputs(length: int = 30, *, heads: int = 3) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, 25:] = False
    mask[0, 9] = False  # a hole
    return query, key, value, mask


def chosen(keys: Any, values: Any, there: list[bool], head: int, factor: int, selection: str) -> list[tuple[Any, Any]]:
    """The sparse keys and values of one block, one by one."""
    size = len(there) // factor
    if selection == "norm":
        order = sorted(range(len(there)), key=lambda i: -float(keys[i].norm()) if there[i] else 1.0)
        return [(keys[i], values[i]) for i in order[:size] if there[i]]
    if selection == "pooling":
        runs = [[i for i in range(run * factor, (run + 1) * factor) if there[i]] for run in range(size)]
        return [(keys[run].mean(0), values[run].mean(0)) for run in runs if run]
    if selection == "lsh":
        kinds = [max(range(size), key=lambda s: float(keys[i] @ DIRECTIONS[size][s])) for i in range(len(there))]
        alike = [[i for i in range(len(there)) if there[i] and kinds[i] == s] for s in range(size)]
        return [(keys[group].mean(0), values[group].mean(0)) for group in alike if group]
    if selection == "none":
        return []
    turn = head % factor
    wanted = range(turn, len(there), factor) if selection == "strided" else range(turn * size, (turn + 1) * size)
    return [(keys[i], values[i]) for i in wanted if there[i]]


@every_selection
@pytest.mark.parametrize(("block", "factor", "front"), [(4, 2, 2), (6, 3, 0)])
def test_token_by_token(selection, block, factor, front):
    query, key, value, mask = inputs()
    found = lsg_attention(query, key, value, mask, block=block, factor=factor, selection=selection, global_tokens=front)
    length = query.shape[2]
    starts = [*range(front, length, block), length]
    spans = [range(a, b) for a, b in pairwise(starts)]
    for text in range(1):
        for head in range(3):
            k, v, there = key[text, head], value[text, head], mask[text].tolist()
            for place in range(length):
                if not there[place]:
                    continue
                if place < front:
                    pairs = [(k[i], v[i]) for i in range(length) if there[i]]
                else:
                    own = (place - front) // block
                    pairs = [(k[i], v[i]) for i in range(front)]
                    for number, span in enumerate(spans):
                        if abs(number - own) <= 1:
                            pairs += [(k[i], v[i]) for i in span if there[i]]
                        elif abs(number - own) <= 1 + factor:
                            full = [*span, *[0] * (block - len(span))]
                            seen = [i < len(span) and there[full[i]] for i in range(block)]
                            pairs += chosen(k[full], v[full], seen, head, factor, selection)
                keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))
                weights = (keys @ query[text, head, place] / math.sqrt(4)).softmax(0)
                torch.testing.assert_close(found[text, head, place], weights @ values)


def test_lsh_puts_like_keys_together():
    """Opposite keys never; a key and a multiple of it always; tokens that are not there count nowhere."""
    torch.manual_seed(0)
    one = torch.randn(4, 1, 6, 3, 8)  # many keys, their multiples and their opposites, one block each
    key = torch.cat([one, 2 * one, -one], 3)[..., :8, :]
    there = torch.ones(4, 1, 6, 8, dtype=torch.bool)
    there[..., 2] = there[..., 5] = False
    kept, weights, seen = choose(key, torch.eye(8).expand(4, 1, 6, 8, 8), there, 2, "lsh")
    together = (weights > 0).float().mT @ (weights > 0).float()  # of two tokens, whether a bucket has both
    assert together[..., 0, 3].eq(1).all() and together[..., 1, 4].eq(1).all()
    assert together[..., 0, 6].eq(0).all() and together[..., 1, 7].eq(0).all()
    assert weights[..., 2].eq(0).all() and weights[..., 5].eq(0).all()
    torch.testing.assert_close(kept, weights @ key)
    assert torch.equal(seen, weights.sum(-1) > 0) and 0.3 < seen.float().mean() < 1
    unit = _directions(64, 7)
    torch.testing.assert_close(unit.norm(dim=0), torch.ones(7))
    torch.testing.assert_close(unit[:, 4:], -unit[:, :3])


@torch.no_grad()
def test_without_sparse_and_global_tokens_it_is_a_window_of_blocks():
    """BERT itself, with a mask that lets a token see its block and the two beside it."""
    before, ids = encoder("bert"), some_ids()
    own = torch.arange(32) // 4
    apart = ((own[:, None] - own[None]).abs() > 1).float() * torch.finfo(torch.float32).min
    window = before(input_ids=ids, attention_mask=apart[None, None].expand(2, 1, -1, -1)).logits
    model = convert_encoder(before, "lsg", length=32, block=4, selection="none")
    torch.testing.assert_close(model(input_ids=ids).logits, window, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(window, before(input_ids=ids).logits, atol=1e-2)


def encoder(source: str, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config, model = {"bert": (BertConfig, BertForMaskedLM), "roberta": (RobertaConfig, RobertaForMaskedLM)}[source]
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": 34,
    }
    return model(config(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval()


def some_ids() -> torch.Tensor:
    return torch.randint(2, 40, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("source", ["bert", "roberta"])
@torch.no_grad()
def test_a_global_token_is_a_word_in_front_that_takes_no_position(source):
    """Where everything is seen, it is full attention to the text with that word before it."""
    before, ids = encoder(source), some_ids()
    model = convert_encoder(before, "lsg", length=32, block=16, global_ids=[7, 9])
    first = 2 if source == "roberta" else 0
    places = torch.cat([torch.arange(2), torch.arange(32)])[None] + first
    words = torch.cat([torch.tensor([[7, 9]]).expand(2, -1), ids], 1)
    expected = before(input_ids=words, position_ids=places, token_type_ids=torch.zeros_like(words)).logits[:, 2:]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("source", ["bert", "roberta"])
def test_saved_loaded_and_trained(source, tmp_path):
    ids, model = some_ids(), convert_encoder(encoder(source), "lsg", length=32, block=4, global_ids=[7, 9])
    model.save_pretrained(tmp_path / "lm")
    again = load_efficient(tmp_path / "lm")
    assert type(again) is type(model) and again.config.lsg["global_tokens"] == 2
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    tagger = token_classifier(again, ["O", "B-PER"], seed=0)
    tagger.save_pretrained(tmp_path / "tagger")
    assert torch.equal(
        load_efficient(tmp_path / "tagger", tagger=True)(input_ids=ids).logits, tagger(input_ids=ids).logits
    )
    tagger(input_ids=ids, labels=torch.ones_like(ids)).loss.backward()
    front = getattr(tagger, source).embeddings.LayerNorm.global_tokens
    assert (front.grad.abs().sum(1) > 0).all()


def test_the_cost_grows_with_the_length():
    """A block of 4 sees 12 near, 4 sparse and one global token, whatever the length."""
    model = convert_encoder(encoder("bert", layers=1), "lsg", length=128, block=4, factor=2, global_ids=[7])
    costs = {length: encoder_cost(model, length, rounds=1)["flops"] for length in (64, 128)}
    linear = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    head = 2 * (16 * 16 + 16 * 40)
    for length, found in costs.items():
        expected = (length + 1) * linear + length * head
        expected += 2 * 2 * length * (12 + 2 * 2 * 2 + 1) * 16 + 2 * 2 * (length + 1) * 16
        assert found == expected


@pytest.fixture
def fields(tmp_path):
    """A run on one's own BERT, text and questions."""
    from stillhouse.models.word_tokenizer import word_tokenizer

    words = [f"w{number}" for number in range(30)]
    tokenizer = word_tokenizer(words)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=32, pad_token_id=0)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    text = "\n\n".join(" ".join(words[(i * 7 + j * 3) % 30] for j in range(80)) for i in range(40))
    (tmp_path / "text.txt").write_text(text)
    asked = [
        {"question": words[i % 9], "context": " ".join(words[9 + (i + j) % 20] for j in range(40))}
        | {"answers": words[9 + i]}
        for i in range(10)
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    fields = {"teacher": str(tmp_path / "bert"), "data": str(tmp_path / "text.txt"), "attention": ["lsg"]}
    fields |= {"questions": str(tmp_path / "asked.jsonl"), "window": 16, "length": 64, "block_size": 4, "landmarks": 8}
    fields |= {"global_tokens": 2, "sparse_tokens": "pooling", "batch_size": 2, "tune_batch": 2, "trackers": []}
    fields |= {"pretrain_steps": 2, "steps": 2, "tune_steps": 2}
    return fields


def test_on_one_s_own_bert_and_questions(fields, tmp_path):
    """Converted, filled in, distilled and tuned from directories and files, and scored by answers."""
    from stillhouse.workflow import run_system

    done = run_system("efficient-attention-kd", fields, output=tmp_path / "run", quiet=True)
    figures = done.artifacts["evaluation"].metrics
    for who in ("teacher", "student"):
        assert figures[f"lsg {who}/questions"] == figures[f"lsg {who}/questions_answer_f1"]
        assert 0 <= figures[f"lsg {who}/questions_em"] <= figures[f"lsg {who}/questions"] <= 1
    student = load_efficient(done.artifacts["student"].path)
    expected = {"block": 4, "factor": 2, "selection": "pooling", "global_tokens": 2}
    assert student.config.lsg == expected and student.config.num_hidden_layers == 1


def test_any_length_where_there_are_no_landmarks(fields, tmp_path):
    """Groups of ``landmarks`` tokens are a matter of Nystromformers alone."""
    from stillhouse.workflow import run_system

    longer = {"attention": ["longformer"], "attention_window": 8, "length": 40, "landmarks": 16}
    done = run_system("efficient-attention-kd", {**fields, **longer}, output=tmp_path / "run", quiet=True)
    assert done.artifacts["evaluation"].metrics["longformer student/flops"] > 0
