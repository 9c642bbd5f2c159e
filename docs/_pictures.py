"""Draws the samples that the pages of the tasks show: ``python docs/_pictures.py [NAME...]``."""

from __future__ import annotations

import io
import random
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import networkx
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from stillhouse.data.condensation.dsa import augment
from stillhouse.data.condensation.synthetic import images_per_class
from stillhouse.data.conversations import embedded_recall
from stillhouse.data.densities import density
from stillhouse.data.docstrings import load_preferences
from stillhouse.data.glyphs import glyphs
from stillhouse.data.graphs import GraphData, molecules
from stillhouse.data.images import digits, dirichlet_shares, partition, subset
from stillhouse.data.in_context import key_map
from stillhouse.data.masking import IGNORED, mask_tokens
from stillhouse.data.memory import RuleDistiller
from stillhouse.data.passages import Junk, with_junk
from stillhouse.data.rationales import cot_prompt
from stillhouse.data.reasoning import ArithmeticChain, KnightsAndKnaves
from stillhouse.data.shapes import Shapes
from stillhouse.data.text import load_text
from stillhouse.data.toy_domains import toy_domains
from stillhouse.data.toy_languages import KINDS, languages, vocabulary
from stillhouse.models import train_bpe
from stillhouse.models.masked import visible_patches
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.tasks import corrective_walk
from stillhouse.tasks.canaries import LETTERS, Canaries, make_language
from stillhouse.tasks.choices import Choices
from stillhouse.tasks.encoder import demo_text
from stillhouse.tasks.in_context import KeyMaps
from stillhouse.tasks.instructed_lm import InstructedCorpus
from stillhouse.tasks.lm_elicitation import AskingSystem
from stillhouse.tasks.long_context import Lexicon, make_document
from stillhouse.tasks.long_context_pictures import documents_picture
from stillhouse.tasks.pictures import sample_picture
from stillhouse.tasks.privacy_pictures import choices_picture, secrets_picture
from stillhouse.tasks.reasoning_text import demo_questions, demo_rule
from stillhouse.tasks.secrets import Secrets, make_text
from stillhouse.tasks.segmentation_pictures import draw_masks
from stillhouse.tasks.text_classification import demo_labelled
from stillhouse.tasks.vision import sample_picture as digits_picture
from stillhouse.teachers.answers import Request

TASKS = Path(__file__).parent / "tasks"
COLOURS = ("#5b6f86", "#c4520a", "#0f68a9", "#0b7a5c", "#94408a", "#8a6d00")
INK, FAINT, MARKED = "#1f2933", "#eef1f5", "#f3c9a8"
CHARACTER, LINE = 0.088, 0.2  # inches that a letter of nine points and a line of them take


def svg(figure: Figure) -> str:
    """The figure as text, the same every time."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def page(width: int, lines: float) -> tuple[Figure, Any]:
    """A figure for ``width`` letters by ``lines`` lines of monospaced text, and its axis, in these units."""
    figure = Figure(figsize=(width * CHARACTER, lines * LINE))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, width)
    axis.set_ylim(lines, 0)
    axis.set_axis_off()
    return figure, axis


def write(axis: Any, x: float, y: float, text: str, **options: Any) -> None:
    """A line of monospaced text, its middle at ``y``."""
    style = {"family": "monospace", "fontsize": 9, "va": "center", "color": INK, **options}
    axis.text(x, y, text.replace("$", r"\$"), **style)


def box(axis: Any, x: float, y: float, width: float, colour: str) -> None:
    """A coloured box behind ``width`` letters of the line at ``y``."""
    axis.add_patch(Rectangle((x, y - 0.45), width, 0.9, color=colour, linewidth=0))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Text in columns, wrapped; every second row is shaded."""
    cells = [[textwrap.wrap(cell, width - 2) or [""] for cell, width in zip(row, widths, strict=True)] for row in rows]
    heights = [max(map(len, row)) + 0.6 for row in cells]
    figure, axis = page(sum(widths), sum(heights) + 1.6)
    starts = [sum(widths[:number]) + 1 for number in range(len(widths))]
    for x, head in zip(starts, heads, strict=True):
        write(axis, x, 0.8, head, weight="bold")
    top = 1.4
    for number, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if number % 2 == 0:
            axis.add_patch(Rectangle((0, top), sum(widths), height, color=FAINT, linewidth=0))
        for x, lines in zip(starts, row, strict=True):
            for place, line in enumerate(lines):
                write(axis, x, top + 0.8 + place, line)
        top += height
    return svg(figure)


def tokens(rows: Sequence[Sequence[tuple[str, str, str]]], width: int = 100) -> str:
    """Rows of tokens as boxes, (text, colour, what is written above); a row ends where ``width`` letters are full."""
    shown = any(above for row in rows for *_, above in row)
    step = 2.4 if shown else 1.5
    figure, axis = page(width, step * len(rows) + 0.3)
    for number, row in enumerate(rows):
        x, y = 0.5, step * (number + 1) - 0.6
        for text, colour, above in row:
            room = max(len(text), len(above))
            if x + room > width - 0.5:
                break
            box(axis, x, y, room - 0.08, colour)
            write(axis, x, y, text)
            write(axis, x, y - 1, above, color=COLOURS[1], fontsize=8)
            x += room + 0.35
    return svg(figure)


# -- images, points, graphs -------------------------------------------------------------------------------------------


def densities() -> str:
    names = ("eight-gaussians", "moons", "spirals", "checkerboard")
    drawn = {name: density(name).draw(2000, torch.Generator().manual_seed(0))[0] for name in names}
    return sample_picture({name: points[:, :, None, None] for name, points in drawn.items()})


def shapes() -> str:
    items = [Shapes(count=3, seed=0)[number] for number in range(3)]
    return draw_masks([(item["image"], item["masks"], item["points"]) for item in items], {})


def graphs(data: GraphData, each: int = 3) -> str:
    figure = Figure(figsize=(2.2 * each, 2.2 * data.classes), layout="constrained")
    axes = figure.subplots(data.classes, each, squeeze=False)
    for label, row in enumerate(axes):
        chosen = [graph for graph in data.graphs if graph.label == label][:each]
        for axis, graph in zip(row, chosen, strict=True):
            drawn = networkx.Graph(graph.edges.T.tolist())
            drawn.add_nodes_from(range(len(graph.nodes)))
            colours = [COLOURS[int(graph.nodes[node]) % len(COLOURS)] for node in drawn]
            places = networkx.kamada_kawai_layout(drawn)
            networkx.draw(drawn, places, ax=axis, node_size=30, node_color=colours, edge_color="#9aa4b0")
        row[0].set_title(f"class {label}", loc="left", fontsize=9)
    return svg(figure)


def strip(images: Tensor, *, gap: int = 1) -> Tensor:
    """Images (N, 1, S, S) side by side."""
    padded = torch.nn.functional.pad(images, (0, gap), value=float("nan"))
    return padded[:, 0].permute(1, 0, 2).flatten(1)


def strips(rows: dict[str, Tensor], *, inches: float = 0.42) -> Figure:
    """A row of images for each name."""
    count = max(map(len, rows.values()))
    figure = Figure(figsize=(inches * count + 1.4, (inches + 0.1) * len(rows)), layout="constrained")
    for axis, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        blank = images.new_full((count - len(images), *images.shape[1:]), float("nan"))
        axis.imshow(strip(torch.cat([images, blank])).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def masked_images(count: int = 12) -> str:
    """Digits as an encoder sees them at two mask ratios."""
    images = digits("train").pixels[:count]
    noise = torch.rand(count, 16, generator=torch.Generator().manual_seed(0))
    rows = {"image": images}
    for ratio in (0.75, 0.94):
        kept = noise.argsort(1).argsort(1) < visible_patches(16, ratio)
        seen = kept.view(count, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        rows[f"mask_ratio={ratio}"] = images.masked_fill(~seen, 0.35)
    return svg(strips(rows))


def condensation() -> str:
    """The real images that learnt ones begin as, and one draw of the augmentation they may be seen under."""
    images = digits("train")
    real = torch.cat([images.select(images_per_class(images, 1, seed=seed)).pixels for seed in range(3)])
    draw = torch.Generator().manual_seed(0)
    kinds = ("crop", "cutout", "scale", "rotate")
    rows = {f"per_class=1, seed={seed}": real[10 * seed : 10 * seed + 10] for seed in range(3)}
    rows["seed=0, augmented"] = augment(real[:10], kinds, draw).clamp(0, 1)
    return svg(strips(rows))


def federation(clients: int = 6, count: int = 18) -> str:
    """The first images of every client, at two values of alpha."""
    images = subset(digits("train"), 360)
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    for part, alpha in zip(figure.subfigures(1, 2), (0.4, 100.0), strict=True):
        part.suptitle(f"alpha={alpha:g}", fontsize=10)
        parts = partition(images.labels, dirichlet_shares(10, clients, alpha=alpha))
        for number, (axis, own) in enumerate(zip(part.subplots(clients, 1), parts, strict=True)):
            shown = images.pixels[own[:count]]
            blank = shown.new_full((count - len(shown), *shown.shape[1:]), float("nan"))
            axis.imshow(
                strip(torch.cat([shown, blank])).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
            )
            axis.set_ylabel(f"{number}: {len(own)}", rotation=0, ha="right", va="center", fontsize=8)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return svg(figure)


# -- text -------------------------------------------------------------------------------------------------------------


def tokenised_docs(vocab_size: int, **options: Any) -> tuple[Any, list[list[int]]]:
    """A tokenizer as the embedded task trains it, and what becomes of the text."""
    texts = load_text("demo").documents["text"]
    tokenizer = train_bpe(texts, vocab_size=vocab_size, **options)
    return tokenizer, tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def readable(tokenizer: Any, token: int) -> str:
    """One token, with its blanks and line ends to be seen."""
    return tokenizer.decode([token]).replace(" ", "\u00b7").replace("\n", "\u21b5")


def language() -> str:
    """Text in the embedded teacher's tokens, darker the rarer they are."""
    tokenizer, documents = tokenised_docs(2048)
    counts = torch.bincount(torch.tensor([token for own in documents for token in own]))
    shades = ("#e4ebf2", "#c9d8e8", "#a9c3dd", "#86abcf")
    order = counts.argsort(descending=True).argsort()

    def boxed(token: int) -> tuple[str, str, str]:
        return readable(tokenizer, token), shades[min(3, int(order[token]) // 64)], ""

    starts = (200, 240, 280, 320, 360, 400)
    return tokens([[boxed(token) for token in documents[1][start : start + 40]] for start in starts])


def encoder() -> str:
    """Text as the embedded encoder is to fill it in."""
    tokenizer = word_tokenizer(vocabulary(languages(1)))
    document = tokenizer(demo_text().documents["text"][0], add_special_tokens=False)["input_ids"]
    ids = torch.tensor(document[: 5 * 20]).view(5, 20)
    seen, labels = mask_tokens(
        ids,
        mask_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special=tokenizer.all_special_ids,
        rate=0.15,
        generator=torch.Generator().manual_seed(0),
    )
    rows = [
        [
            (readable(tokenizer, token), FAINT, "")
            if label == IGNORED
            else (readable(tokenizer, token).replace(tokenizer.mask_token, "____"), MARKED, readable(tokenizer, label))
            for token, label in zip(own, wanted, strict=True)
        ]
        for own, wanted in zip(seen.tolist(), labels.tolist(), strict=True)
    ]
    return tokens(rows)


def canaries(each: int = 6, prefix: int = 8) -> str:
    """Training sequences that are chance, and some that repeat two letters."""
    found = make_language(Canaries())
    rows = []
    for name, chosen in (("chance", found.train[~found.easy]), ("easy", found.train[found.easy])):
        for row in chosen[:each].tolist():
            letters = [(f" {LETTERS[one]} ", FAINT if place < prefix else MARKED, "") for place, one in enumerate(row)]
            rows.append([(f"{name:7}", "#ffffff", ""), *letters])
    return tokens(rows, width=67)


def in_context(count: int = 4, demos: int = 6) -> str:
    """Demonstrations of some maps from keys to labels, and a key that is asked for with its label."""
    rows = []
    learnt, _ = KeyMaps().maps()
    for seed, chosen in enumerate(learnt[:count].tolist()):
        records = key_map(chosen, KeyMaps().labels, copies=3)
        random.Random(seed).shuffle(records)
        asked = records[demos]
        pairs = [(f" {one['input']} {one['output']} ", FAINT, "") for one in records[:demos]]
        answer = [(f" {asked['input']} ", "#ffffff", ""), (f" {asked['output']} ", MARKED, "")]
        rows.append([(f"map {seed + 1}  ", "#ffffff", ""), *pairs, *answer])
    return tokens(rows, width=66)


def questions(count: int = 6) -> str:
    """Questions of the embedded task, what its teacher writes, and what the student is to write."""
    found = demo_questions()
    rows = []
    for example in found.train[:count]:
        said = demo_rule(Request.of(cot_prompt(found.exemplars, example.input)))
        rows.append((example.input, said, f"explain: {example.rationale}", f"predict: {example.label}"))
    return table(("question", "the teacher writes", "learnt", "and"), rows, (22, 40, 20, 14))


def reasoning() -> str:
    """Problems of both puzzles with a right and a flawed trace."""
    rows = []
    for puzzle, draws in ((ArithmeticChain(), 3), (KnightsAndKnaves(), 1)):
        chance = random.Random(1)
        for _ in range(draws):
            drawn = puzzle.draw(chance)
            rows.append(tuple(drawn[key].strip() for key in ("prompt", "trace", "flawed", "answer")))
    return table(("prompt", "trace", "flawed trace", "answer"), rows, (28, 34, 34, 14))


def instructions(each: int = 2) -> str:
    """What the embedded teacher learns to write to the three instructions."""
    demo, chance = AskingSystem.demo, random.Random(1)
    corpus = InstructedCorpus(
        steps=1,
        answer=demo["answer_template"],
        expansion=demo["expansion_template"],
        curation=demo["curation_template"],
        example_form=demo["example_template"],
        demonstrations=demo["demonstrations"],
    )
    ways: dict[str, list[tuple[str, str]]] = {"labelling": [], "expansion": [], "curation": []}
    begins = {"expansion": demo["expansion_template"][:4], "curation": demo["curation_template"][:4]}
    while any(len(found) < each for found in ways.values()):
        asked, written = corpus.example(ArithmeticChain(), chance, set())
        way = next((name for name, first in begins.items() if asked.startswith(first)), "labelling")
        ways[way].append((" ".join(asked.split()), written))
    rows = [(way, *pair) for way, found in ways.items() for pair in found[:each]]
    return table(("ask=", "what the teacher reads", "what it writes"), rows, (14, 58, 34))


def agents() -> str:
    """One exchange, what the rule makes of it, and a question that it answers."""
    recall = embedded_recall(exchanges=40, queries=10, seed=0)
    exchange = recall.exchanges[0]
    memory = RuleDistiller(recall.exchanges)(exchange)
    asked = next((query.text for query in recall.queries if exchange.key in query.relevant), recall.queries[0].text)
    said = [(f"{role}, verbatim", text[:700] + " ..." * (len(text) > 700)) for role, text in exchange.messages]
    rooms = ", ".join(f"{room.type} {room.key}" for room in memory.room_assignments)
    kept = [("core", memory.exchange_core), ("context", memory.specific_context), ("rooms", rooms)]
    return table(("", "one exchange, and its memory"), [*said, *kept, ("a recall question", asked)], (24, 90))


def labelled_sentences(count: int = 4) -> str:
    (toy,) = languages()
    colours = {noun: COLOURS[1 + kind] for kind, nouns in enumerate(toy.nouns) for noun in nouns}
    data, _ = demo_labelled(count=count)
    figure, axis = page(92, count + 0.5)
    for row, (text, label) in enumerate(zip(data.first, data.labels.tolist(), strict=True)):
        write(axis, 1, row + 0.8, KINDS[label], color=COLOURS[1 + label], weight="bold")
        place = 10
        for word in text.split():
            write(axis, place, row + 0.8, word, color=colours.get(word, COLOURS[0]))
            place += len(word) + 1
    return svg(figure)


def pretraining(count: int = 5) -> str:
    """Pairs of the clean data, each with the worse answer that preferences give it."""
    pairs = load_preferences("demo", seed=0)
    chosen = pairs[:: len(pairs) // count][:count]
    rows = [(pair.prompt, pair.chosen, pair.rejected) for pair in chosen]
    return table(("prompt", "answer", "worse answer, for DPO"), rows, (34, 40, 40))


def corpora() -> str:
    """Passages of the corpus that is refined, and documents of the domains that are mixed."""
    tokenizer, documents = tokenised_docs(2048)
    stream = [token for own in documents for token in own][: 64 * 200]
    mixed = with_junk(
        torch.tensor(stream).view(-1, 64), load_text("demo").documents["text"], tokenizer, Junk(passages=100)
    )
    assert mixed.kinds is not None
    rows = []
    for kind in dict.fromkeys(mixed.kinds):
        text = tokenizer.decode(mixed.ids[mixed.kinds.index(kind)])
        rows.append((f"{kind} passage", " ".join(text.split())[:170]))
    rows += [(f"domain {name}", texts[0]) for name, texts in toy_domains().items()]
    return table(("", "sample"), rows, (20, 86))


def pushed_walks() -> str:
    """The expert's walks, and where the teacher sends one who was pushed off them."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    walks = corrective_walk.walks(60, torch.Generator().manual_seed(0))
    chosen = [walk for walk in walks.tolist() if abs(walk[1] - walk[3]) > 5][:3]
    for number, walk in enumerate(chosen):
        axes = figure.add_subplot(1, 3, number + 1)
        start, target, path = walk[1], walk[3], [walk[1], *walk[5:]]
        axes.axhline(target, color="0.75", linestyle=":", label="target")
        axes.plot(path, color="#3564a8", marker="o", markersize=3, label="the expert's walk")
        place = torch.tensor([(start + 5) % corrective_walk.POSITIONS])
        back = [path[3], int(place)]
        for _ in range(4):
            place = corrective_walk.expert(place, torch.tensor([target]))
            back.append(int(place))
        axes.plot(range(3, 9), back, color="#c2503c", marker="o", markersize=3, linestyle="--", label="after a push")
        axes.set(xlabel="step", ylim=(-0.5, corrective_walk.POSITIONS - 0.5))
        if not number:
            axes.set_ylabel("position")
            axes.legend(fontsize=7, frameon=False)
    return svg(figure)


def ranked_traces() -> str:
    """Chains of sums with responses of falling score: what is right is light, what is wrong is marked."""
    prompt, right = "3+5+2+6+1=", "1,3,2,3#3"
    rows = []
    for response in (right, "1,0,2,3#3", "1,3,2,4#4", "6,0,2,5#5"):
        marks = [
            (letter, FAINT if letter == wanted else MARKED, "") for letter, wanted in zip(response, right, strict=True)
        ]
        rows.append([(prompt, FAINT, ""), *marks])
    return tokens(rows, width=40)


def merging() -> str:
    """Two models and their ancestor as points; the first mean, and the way from the ancestor to it."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    ancestor, instruct, reasoning = (0.0, 0.0), (1.0, 1.6), (3.0, 0.4)
    mean = tuple((a + b) / 2 for a, b in zip(instruct, reasoning, strict=True))
    merged = tuple(0.6 * one for one in mean)
    axes.plot(*zip(instruct, reasoning, strict=True), color="0.7", linestyle=":")
    axes.plot(*zip(ancestor, mean, strict=True), color="0.7", linestyle=":")
    named = {
        "ancestor": ancestor,
        "instruct": instruct,
        "reasoning": reasoning,
        "their mean": mean,
        "where RL begins": merged,
    }
    for name, (x, y) in named.items():
        axes.plot(x, y, marker="o", color="#c2503c" if name == "where RL begins" else "#3564a8")
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set(xlim=(-0.3, 4), ylim=(-0.3, 2.1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return svg(figure)


def long_documents() -> str:
    """A document of each of the tagging tasks, its entities marked."""
    lexicon = Lexicon.of(demo_text().documents["text"])
    sizes = {"short-ner": 30, "long-ner": 60, "retrieval": 60}
    return documents_picture(
        {task: make_document(task, words, lexicon, random.Random(0)) for task, words in sizes.items()}
    )


PICTURES: dict[str, Callable[[], str]] = {
    "agents": agents,
    "canaries": canaries,
    "choices": lambda: choices_picture(Choices()),
    "condensation": condensation,
    "corpora": corpora,
    "corrective-walk": pushed_walks,
    "densities": densities,
    "encoder": encoder,
    "federation": federation,
    "glyphs": lambda: sample_picture({"glyphs": glyphs("train", count=64).pixels}),
    "graphs": lambda: graphs(molecules(40, seed=0)),
    "in-context": in_context,
    "language": language,
    "lm-elicitation": instructions,
    "long-context": long_documents,
    "masked-images": masked_images,
    "merged-starts": merging,
    "preferences": ranked_traces,
    "pretraining": pretraining,
    "questions": questions,
    "reasoning": reasoning,
    "secrets": lambda: secrets_picture(make_text(Secrets())),
    "shapes": shapes,
    "text-classification": labelled_sentences,
}


def main(names: Sequence[str]) -> None:
    if not names or "digits" in names:
        digits_picture(TASKS / "digits.svg")
    for name, draw in PICTURES.items():
        if not names or name in names:
            (TASKS / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
