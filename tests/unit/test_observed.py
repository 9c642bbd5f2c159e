"""Observed models: what they yield, how often they run, where gradients go, and what they leave behind."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Address, Observed, Signal, Turn, as_batch
from stillhouse.objectives import CrossEntropy, FeatureMSE, KLDivergence

IDS = torch.arange(12).view(2, 6)


class Net(nn.Module):
    """Three layers, the last of them after the places that tests tap."""

    def __init__(self, width: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.middle = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width))
        self.last = nn.Linear(width, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(self.first(inputs)))


def llama(**sizes: object) -> LlamaConfig:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaConfig(**{**shape, "num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False, **sizes})


class Counter:
    """Counts forwards of a module with a hook of its own, and notes the mode each ran in."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[dict[str, bool]] = []
        self.handle = module.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, _args: object) -> None:
        self.calls.append({"grad": torch.is_grad_enabled(), "training": module.training})

    def __len__(self) -> int:
        return len(self.calls)


def net(seed: int = 0, **sizes: float) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes)


def x(seed: int = 1, rows: int = 7) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def read(*signals: Signal, batch: object) -> list[Tensor]:
    turn, mapping = Turn(signals), as_batch(batch)
    return [turn.read(signal, mapping) for signal in signals]


# -- what is yielded ------------------------------------------------------------------------------------------------


def test_batches_as_tensor_pair_and_mapping():
    model, inputs, labels = net(), x(), torch.arange(7) % 4
    observed = Observed(model)
    expected = model(inputs)
    for batch in (inputs, (inputs, labels), [inputs, labels], {"inputs": inputs, "labels": labels}):
        assert torch.equal(observed.output()(batch), expected)
    assert as_batch((inputs, labels))["labels"] is labels
    for wrong in ((inputs, labels, labels), 3, "text", None):
        with pytest.raises(TypeError, match="a batch must be"):
            observed.output()(wrong)


def test_taps_of_outputs_and_inputs():
    model, inputs = net(), x()
    observed = Observed(model)
    first = model.first(inputs)
    middle = model.middle(first)
    assert torch.equal(observed.tap("first")(inputs), first)
    assert torch.equal(observed.tap("middle", of="input")(inputs), first)
    assert torch.equal(observed.tap("middle.0")(inputs), first.tanh())
    assert torch.equal(observed.tap("last", of="input")(inputs), middle)
    assert torch.equal(observed.tap("")(inputs), model(inputs))  # the model itself


def test_input_passed_by_keyword():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(3, 3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(input1=inputs, input2=2 * inputs)

    inputs = x()
    observed = Observed(Keyword())
    assert torch.equal(observed.tap("inner", of="input")(inputs), inputs)
    assert torch.equal(observed.tap("inner", of="input", index=1)(inputs), 2 * inputs)


class Repeats(nn.Module):
    """Calls one layer three times and a recurrent one that returns a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.alias = self.layer
        self.memory = nn.LSTM(3, 4, batch_first=True)

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.layer(self.layer(self.layer(inputs)))
        states, (last, _) = self.memory(hidden[:, None])
        return states, {"last": last, "hidden": hidden}


def test_repeated_calls_of_one_module():
    torch.manual_seed(0)
    model, inputs = Repeats(), x()
    observed = Observed(model)
    once = model.layer(inputs)
    twice = model.layer(once)
    thrice = model.layer(twice)
    taps = [observed.tap("layer", call=call) for call in (0, 1, 2, -1)]
    for found, expected in zip(read(*taps, batch=inputs), (once, twice, thrice, thrice), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ModelError, match=r"did not call 'layer' 4 time"):
        observed.tap("layer", call=3)(inputs)


def test_a_module_under_two_names():
    torch.manual_seed(0)
    model, inputs = Repeats(), x()
    assert torch.equal(Observed(model).tap("alias")(inputs), model.layer(inputs))


def test_tuple_outputs():
    torch.manual_seed(0)
    model, inputs = Repeats(), x()
    observed = Observed(model)
    states, rest = model(inputs)
    assert torch.equal(observed.output(0)(inputs), states)
    assert torch.equal(observed.output(1)(inputs)["last"], rest["last"])
    assert torch.equal(observed.tap("memory")(inputs), states)
    last, cell = model.memory(rest["hidden"][:, None])[1]
    assert torch.equal(observed.tap("memory", index=1)(inputs)[1], cell)
    assert torch.equal(observed.output(1).map(lambda parts: parts["last"].sum())(inputs), last.sum())


def test_named_outputs():
    class Pair(NamedTuple):
        score: Tensor

    class Answers(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, inputs: Tensor) -> object:
            return {"mapping": {"score": 2 * inputs}, "tuple": Pair(2 * inputs), "tensor": 2 * inputs}[self.kind]

    for kind in ("mapping", "tuple", "tensor"):
        assert torch.equal(Observed(Answers(kind)).output("score")(x()), 2 * x())
    with pytest.raises(ModelError, match=r"no 'scores'; did you mean 'score'\?"):
        Observed(Answers("mapping")).output("scores")(x())
    with pytest.raises(ModelError, match="ask for an index instead"):
        Observed(Answers("tuple")).output("scores")(x())


def test_wrong_paths_are_refused_at_once():
    observed = Observed(net(), name="teacher")
    with pytest.raises(ModelError, match=r"teacher has no sub-module 'midle'; did you mean 'middle'"):
        observed.tap("midle")
    with pytest.raises(ModelError, match=r"teacher has no parameter 'last.wieght'; did you mean 'last.weight'"):
        observed.parameter("last.wieght")


def test_parameters_are_tensors_that_gradients_reach():
    model = net()
    counter = Counter(model)
    weight = Observed(model).parameter("last.weight")(x())
    assert torch.equal(weight, model.last.weight)
    weight.square().sum().backward()
    assert torch.equal(model.last.weight.grad, 2 * model.last.weight)
    assert len(counter) == 0  # nothing had to run
    assert not Observed(copy.deepcopy(model), frozen=True).parameter("last.weight")(x()).requires_grad


def test_a_tied_parameter_is_known_by_both_names():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(tie_word_embeddings=True))
    tied = Observed(model).parameter("lm_head.weight")(IDS)
    assert torch.equal(tied, model.model.embed_tokens.weight)


def test_map_and_options_and_call():
    model, inputs = net(), x()
    observed = Observed(model, call=lambda run, batch: run(3 * batch["pictures"]))
    mapped = observed.output().map(torch.exp).map(torch.sum)
    assert torch.equal(mapped({"pictures": inputs}), model(3 * inputs).exp().sum())

    class Doubling(Net):
        def forward(self, inputs: Tensor, factor: int = 1) -> Tensor:
            return factor * super().forward(inputs)

    torch.manual_seed(0)
    assert torch.equal(Observed(Doubling(), options={"factor": 2}).output()(inputs), 2 * model(inputs))


# -- feeding by name ------------------------------------------------------------------------------------------------


def test_entries_are_matched_by_name_and_labels_are_kept_back():
    seen = {}

    class Named(nn.Module):
        def forward(self, left: Tensor, right: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            seen.update(left=left, right=right, labels=labels)
            return left

    batch = {"right": x(1), "left": x(2), "labels": x(3), "unrelated": x(4)}
    Observed(Named()).output()(batch)
    assert seen["left"] is batch["left"] and seen["right"] is batch["right"] and seen["labels"] is None


def test_a_batch_that_does_not_fit_says_what_does():
    with pytest.raises(KeyError, match=r"Net takes inputs, but the batch has pixels"):
        Observed(net()).output()({"pixels": x()})


# -- how often models run -------------------------------------------------------------------------------------------


def test_one_forward_however_many_terms_read_it():
    student, teacher = net(0), net(1)
    counts = Counter(student), Counter(teacher)
    s, t = Observed(student), Observed(teacher, frozen=True)
    objective = (
        CrossEntropy(s.output())
        + 0.5 * KLDivergence(s.output(), t.output(), temperature=2.0)
        + 0.1 * FeatureMSE(s.tap("first"), t.tap("first"))
        + 0.1 * FeatureMSE(s.tap("middle"), t.tap("middle.2"))
    )
    objective((x(), torch.arange(7) % 4))
    assert [len(count) for count in counts] == [1, 1]
    objective((x(), torch.arange(7) % 4))  # a new call is a new turn
    assert [len(count) for count in counts] == [2, 2]


def test_one_forward_per_view_and_batch():
    model = net()
    counter = Counter(model)
    observed = Observed(model)
    double = observed.view("double", lambda batch: {"inputs": 2 * batch["inputs"]})
    signals = [observed.output(), observed.tap("first"), double.output(), double.tap("first")]
    turn = Turn(signals)
    batches = [{"inputs": x(1)}, {"inputs": x(2)}]
    for batch in batches:
        for signal in [*signals, *reversed(signals)]:
            turn.read(signal, batch)
    assert len(counter) == 4  # two views of two batches
    assert torch.equal(turn.read(double.tap("first"), batches[1]), model.first(2 * x(2)))
    assert len(counter) == 4
    turn.clear()
    turn.read(signals[0], batches[0])
    assert len(counter) == 5


def test_a_batch_that_takes_the_place_of_a_freed_one_is_a_new_batch():
    """The memo goes by identity: identities must not be used twice while it lives."""
    observed = Observed(net())
    signal = observed.output()
    turn = Turn([signal])
    for seed in range(50):
        assert torch.equal(turn.read(signal, {"inputs": x(seed)}), observed.module(x(seed)))


# -- gradients and modes --------------------------------------------------------------------------------------------


def test_frozen_models_run_without_gradient_and_in_eval_mode():
    model = net(dropout=0.5).train()
    counter = Counter(model.middle[1])
    observed = Observed(model, frozen=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not observed.output()(x()).requires_grad
    model.train()  # somebody else, who also holds the model
    assert torch.equal(observed.output()(x()), observed.output()(x()))
    assert counter.calls == 3 * [{"grad": False, "training": False}]


def test_only_detached_readers_mean_no_graph():
    model = net()
    counter = Counter(model)
    observed = Observed(model)
    detached, live = observed.tap("first").detach(), observed.output()
    assert not detached(x()).requires_grad
    assert counter.calls.pop() == {"grad": False, "training": True}
    found, output = read(detached, live, batch=x())
    assert counter.calls == [{"grad": True, "training": True}]  # still one forward
    assert not found.requires_grad and output.requires_grad
    assert torch.equal(found, model.first(x()))


def test_detached_structures_carry_no_gradient():
    """A model that returns a tuple, read once with gradient and once without."""
    observed = Observed(Repeats())
    live, detached = observed.output(0), observed.output().detach().map(lambda output: output[1]["last"])
    found, last = read(live, detached, batch=x())
    assert found.requires_grad and not last.requires_grad


def test_detach_and_map_keep_their_order():
    model, projection = net(), nn.Linear(5, 2)
    tap = Observed(model).tap("first")
    assert not tap.map(projection).detach()(x()).requires_grad
    tap.detach().map(projection)(x()).sum().backward()
    assert projection.weight.grad is not None and model.first.weight.grad is None


def test_gradients_are_those_of_the_plain_model():
    model, inputs = net(), x()
    reference = copy.deepcopy(model)
    observed = Observed(model)
    first, output = read(observed.tap("first"), observed.output(), batch=inputs)
    (first.square().sum() + output.exp().sum()).backward()
    (reference.first(inputs).square().sum() + reference(inputs).exp().sum()).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_grad_around_is_respected():
    with torch.no_grad():
        assert not Observed(net()).output()(x()).requires_grad


def test_mode():
    model = net(dropout=0.5)
    Observed(model, mode="eval")
    assert not model.training
    assert Observed(net(), mode="train").module.training


# -- stopping early -------------------------------------------------------------------------------------------------


class Bomb(nn.Module):
    def forward(self, *_: object) -> Tensor:
        raise AssertionError("this module must not run")


def test_the_forward_stops_at_the_last_wanted_tap():
    model, inputs = net(), x()
    expected = model.first(inputs), model.middle(model.first(inputs))
    counter = Counter(model.last)
    observed = Observed(model)
    taps = [observed.tap("first"), observed.tap("middle")]
    for found, wanted in zip(read(*taps, batch=inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(counter) == 0
    model.last = Bomb()
    for found, wanted in zip(read(*taps, batch=inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(AssertionError, match="must not run"):
        read(*taps, observed.output(), batch=inputs)
    assert hooks(model) == 0


def test_early_stop_waits_for_every_call():
    """The last call of a module is known only at the end; a later call comes after the first."""
    torch.manual_seed(0)
    model, inputs = Repeats(), x()
    counter = Counter(model.layer)
    Observed(model).tap("layer", call=1)(inputs)
    assert len(counter) == 2
    Observed(model).tap("layer", call=-1)(inputs)
    assert len(counter) == 2 + 3


def test_an_error_in_the_model_is_passed_on_and_leaves_no_hook():
    model = net()
    model.last = Bomb()
    with pytest.raises(AssertionError, match="must not run"):
        Observed(model).output()(x())
    with pytest.raises(RuntimeError):
        Observed(model).tap("middle")(torch.randn(2, 99))
    assert hooks(model) == 0


def test_no_hook_is_left():
    model = net()
    observed = Observed(model)
    read(observed.tap("first"), observed.tap("middle", of="input"), observed.output(), batch=x())
    observed.tap("middle.1")(x())
    assert hooks(model) == 0


def test_taps_of_one_turn_do_not_leak_into_the_next():
    model = net()
    observed = Observed(model)
    observed.tap("first")(x(1))
    model.first = nn.Identity()  # what was tapped before is no more
    assert torch.equal(observed.tap("first")(x(2)), x(2))
    assert observed.tapped._captured == {}


# -- views ----------------------------------------------------------------------------------------------------------


def test_a_named_view_feeds_an_entry_of_the_batch():
    model = net()
    masked = Observed(model).view("masked")
    batch = {"inputs": x(1), "masked": x(2)}
    assert torch.equal(masked.output()(batch), model(x(2)))
    assert torch.equal(masked.output()({"inputs": x(1), "masked": {"inputs": x(3)}}), model(x(3)))
    with pytest.raises(KeyError, match=r"view 'maskd' needs batch\['maskd'\]; the batch has: inputs, masked"):
        Observed(model).view("maskd").output()(batch)


def test_a_named_view_is_never_ignored():
    """A tensor that would be passed over, because the model is fed by other names, is an error."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).eval()
    masked = Observed(model).view("masked").output("logits")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    other = {**batch, "input_ids": IDS.flip(1)}
    assert torch.equal(masked({**batch, "masked": other}), model(**other).logits)
    with pytest.raises(KeyError, match="masked"):
        masked({**batch, "masked": IDS.flip(1)})


def test_a_view_transforms_the_batch():
    model = net()

    def halve(batch):
        return {**batch, "inputs": batch["inputs"] / 2}

    observed = Observed(model)
    halved = observed.view("half", halve)
    assert torch.equal(halved.output()(x()), model(x() / 2))
    assert observed.view("half", halve) is halved
    assert observed.view("other", halve) is not halved


def test_around_is_entered_for_the_forward_only():
    model = net()
    events = []

    @contextmanager
    def narrow(module):
        events.append("in")
        weight = module.last.weight
        full = weight.data
        weight.data = torch.zeros_like(full)
        yield
        weight.data = full
        events.append("out")

    observed = Observed(model)
    narrowed = observed.view("narrow", around=narrow).output()
    plain = observed.output()
    found, wide = read(narrowed, plain, batch=x())
    assert events == ["in", "out"]
    assert torch.equal(found, model.last.bias.expand(7, 4))
    assert torch.equal(wide, model(x()))


def fed(detach: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    generator, critic = nn.Linear(3, 3), net()
    made = Observed(generator).output()
    score = Observed(critic).view("fake", feed={"inputs": made.detach() if detach else made}).output()
    return generator, critic, score(x())


def test_gradients_flow_through_a_fed_signal():
    torch.manual_seed(0)
    generator, critic, score = fed(detach=False)
    assert torch.equal(score, critic(generator(x())))
    (expected,) = torch.autograd.grad(critic(generator(x())).sum(), generator.weight)
    score.sum().backward()
    assert torch.equal(generator.weight.grad, expected)
    assert critic.first.weight.grad is not None


def test_no_gradient_through_a_detached_feed():
    generator, critic, score = fed(detach=True)
    score.sum().backward()
    assert generator.weight.grad is None and critic.first.weight.grad is not None


def test_a_fed_model_runs_once_for_all_its_readers():
    """The generator is read by itself and feeds two views; a view that is asked for twice is one view."""
    generator, critic = nn.Linear(3, 3), net()
    counts = Counter(generator), Counter(critic)
    made, judge = Observed(generator), Observed(critic)

    def fake() -> Signal:
        return judge.view("fake", feed={"inputs": made.output()}).output()

    detached = judge.view("detached", feed={"inputs": made.output().detach()}).output()
    one, two, plain, apart = read(fake(), fake(), made.output(), detached, batch=x())
    assert [len(count) for count in counts] == [1, 2]
    assert one is two
    assert torch.equal(judge.module(plain), apart)


def test_feeds_of_feeds():
    torch.manual_seed(0)
    a, b, c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    middle = Observed(b).view("b", feed={"inputs": Observed(a).output()})
    last = Observed(c).view("c", feed={"inputs": middle.output()})
    assert torch.equal(last.output()(x()), c(b(a(x()))))


# -- transformers ---------------------------------------------------------------------------------------------------


def test_a_causal_language_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).eval()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    observed = Observed(model)
    expected = model(input_ids=IDS, attention_mask=batch["attention_mask"], output_hidden_states=True)
    logits, layer, head = read(
        observed.output("logits"), observed.tap("model.layers.0"), observed.tap("lm_head", of="input"), batch=batch
    )
    assert torch.equal(logits, expected.logits)
    assert torch.equal(layer, expected.hidden_states[1])
    assert torch.equal(head, expected.hidden_states[-1])
    assert observed.output()(batch).loss is None  # labels were not passed on
    with pytest.raises(ModelError, match=r"no sub-module 'model.layer.0'; did you mean 'model.layers.0'"):
        observed.tap("model.layer.0")


def test_a_causal_language_model_stops_early():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).eval()
    expected = model(input_ids=IDS, output_hidden_states=True)
    counts = Counter(model.model.layers[1]), Counter(model.lm_head)
    observed = Observed(model)
    layer = observed.tap("model.layers.0")({"input_ids": IDS})
    assert torch.equal(layer, expected.hidden_states[1])
    assert [len(count) for count in counts] == [0, 0]
    assert torch.equal(model(input_ids=IDS).logits, expected.logits)  # and is whole again


def test_an_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **sizes)).eval()
    batch = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": torch.zeros(2)}
    expected = model(input_ids=IDS, attention_mask=batch["attention_mask"], output_hidden_states=True)
    observed = Observed(model)
    logits, layer = read(observed.output("logits"), observed.tap("bert.encoder.layer.0"), batch=batch)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(layer, expected.hidden_states[1])


def test_attention_maps():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(attn_implementation="eager")).eval()
    expected = model(input_ids=IDS, output_attentions=True).attentions
    own = hooks(model)  # transformers collects attention maps with hooks that stay
    observed = Observed(model, options={"output_attentions": True})
    maps = observed.output("attentions").map(lambda attentions: attentions[1])({"input_ids": IDS})
    assert torch.equal(maps, expected[1])
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 6))
    tapped = observed.tap("model.layers.1.self_attn", index=1)({"input_ids": IDS})  # stops early
    assert torch.equal(tapped, expected[1])
    again = model(input_ids=IDS, output_attentions=True).attentions  # and the stop left nothing behind
    assert len(again) == 3 and all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert hooks(model) == own


# -- gradient checkpointing -----------------------------------------------------------------------------------------


def gradients(model: nn.Module, signals: list[Signal], batch: object) -> dict[str, Tensor]:
    model.zero_grad()
    loss = sum((value.square().mean() for value in read(*signals, batch=batch)), torch.zeros(()))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "paths",
    [
        ["lm_head"],
        ["model.layers.0"],
        ["model.layers.0", "model.layers.1"],
        ["model.layers.1.mlp"],
        ["model.layers.0", "lm_head"],
    ],
    ids=" ".join,
)
def test_gradient_checkpointing_changes_no_gradient(paths):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(llama()).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counter = Counter(saving.model.layers[0].mlp)
    found = []
    for model in (plain, saving):
        observed = Observed(model)
        of = [observed.tap(path, of="input" if path == "lm_head" else "output") for path in paths]
        found.append(gradients(model, of, {"input_ids": IDS}))
    assert len(counter) == 2  # once forward, once again for the backward: checkpointing was on
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# -- torch.compile --------------------------------------------------------------------------------------------------


def compiled_equals_plain(backend: str) -> None:
    torch.manual_seed(0)
    plain = LlamaForCausalLM(llama(num_hidden_layers=1)).train()
    compiled = copy.deepcopy(plain)
    found = []
    for model in (plain, compiled):
        observed = Observed(model)
        signals = [
            observed.output("logits"),
            observed.tap("model.layers.0"),
            observed.tap("lm_head", of="input"),
            observed.parameter("lm_head.weight"),
        ]
        if model is compiled:
            observed.tapped.compile([signal.address for signal in signals], backend=backend)
        for batch in ({"input_ids": IDS}, {"input_ids": IDS.flip(1)}):
            values = read(*signals, batch=batch)
            found.append((model, [value.detach() for value in values], gradients(model, signals, batch)))
    for (_, values, grads), (_, others, other_grads) in zip(found[:2], found[2:], strict=True):
        for one, other in zip(values, others, strict=True):
            torch.testing.assert_close(one, other)
        assert grads.keys() == other_grads.keys()
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, other_grads[name], msg=name)
    assert not torch.allclose(found[2][1][0], found[3][1][0])  # the second batch was not answered from the first


def test_compiled_models_yield_the_same():
    compiled_equals_plain("aot_eager")


@pytest.mark.slow
def test_compiled_with_inductor_models_yield_the_same():
    compiled_equals_plain("inductor")


def test_a_compiled_model_knows_the_taps_it_was_compiled_with():
    observed = Observed(net())
    observed.tapped.compile([observed.tap("first").address], backend="eager")
    torch.testing.assert_close(observed.tap("first")(x()), observed.module.first(x()))
    with pytest.raises(ModelError, match="'middle' was not tapped when the model was compiled"):
        observed.tap("middle")(x())


def test_compiled_models_know_the_first_call_only():
    observed = Observed(Repeats())
    with pytest.raises(ModelError, match="first call of a tapped module only"):
        observed.tapped.compile([Address("module", "layer", call=1)])
