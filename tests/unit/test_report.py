"""The run report and the model card: what they say, what they must never say, and what they survive."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import ModelCard

from report_fixtures import HOSTILE, SECRET, make_run, write_json, write_lines
from stillhouse.base.errors import RunError
from stillhouse.report import html as report_html
from stillhouse.report import write_model_card, write_report
from stillhouse.report.card import _is_hub_id
from stillhouse.report.figures import MAX_ROWS, PALETTE, Bar, Series, bar_plot, compact, line_plot, reliability_plot
from stillhouse.report.record import Column, Table, read_run
from stillhouse.report.wording import command_line, duration, hide_arguments, show


class Page(HTMLParser):
    """Collects the elements and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def source(run_dir: Path) -> str:
    return write_report(run_dir).read_text("utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


# --- what the page says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expected",
    [
        "Temporally adaptive interpolated distillation",
        "Shing et al., 2025, arXiv 2501.16937",
        "24 November 2025, 05:38 UTC",
        "4 min 19 s",
        "Held-out text",
        "Verbatim recall of training text",
        "12,582,912",
        "47.8%",
        "Expected calibration error, ten equal bins of confidence.",
        "student, taid: ECE 0.078",
        "def parse(line):",
        "Split a header line.",
        "01 teacher 4,000 steps, 2 min 05 s, reused from an earlier run",
        "Player: critic",
        "weight of Hinge 1",
        "Weights of the terms",
        "Gradient shares",
        "Value: t",
        "temperature 2",
        "Learning rate",
        "Evaluation: perplexity",
        "Peak memory per stage",
        "1.40 GB",
        "Momentum of the adaptive interpolation.",
        "Linux-6.8.0-x86_64",
        "94867a6 with uncommitted changes",
        "transformers 5.2.0",
        "stillhouse run taid steps=1200",
        "total: 3 non-finite values, first at step 400",
        "CrossEntropy: 1 non-finite value, at step 400",
    ],
)
def test_the_page_says(page: Page, expected: str) -> None:
    assert expected in page.text


def test_every_field_names_its_source(source: str) -> None:
    rows = dict(re.findall(r'<tr class="from-(?:\w+)">\s*<th scope="row">(\w+)</th>.*?<td>(\w+)</td>', source, re.S))
    assert rows["steps"] == "yours"  # set by the user, though the demo sets it too
    assert rows["lr"] == "demo"
    assert rows["t_start"] == "default"
    assert len(rows) == 13


def test_only_the_better_student_is_marked(source: str) -> None:
    assert re.findall(r'<td><strong class="best">(.*?)</strong>', source) == ["15.50", "40.2%"]


def table(better: str | None, **values: float | None) -> tuple[Table, Column]:
    column = Column(key="x", label="x", format=".2f", better=better)
    return Table("", [column], [{"name": name, "x": value} for name, value in values.items()], []), column


@pytest.mark.parametrize(
    ("better", "values", "best"),
    [
        ("lower", {"teacher": 1.0, "a": 3.0, "b": 2.0}, {2}),
        ("higher", {"teacher": 9.0, "a": 3.0, "b": 2.0}, {1}),
        (None, {"a": 3.0, "b": 2.0}, set()),
        ("lower", {"teacher": 3.0, "a": 2.0}, set()),  # one student: nothing to be better than
        ("lower", {"a": 2.001, "b": 2.002}, set()),  # a difference that is not shown is not marked
        ("lower", {"a": 2.001, "b": 2.002, "c": 5.0}, {0, 1}),
        ("lower", {"a": math.nan, "b": 2.0, "c": None}, set()),
        ("lower", {"a": math.nan, "b": 2.0, "c": 4.0}, {1}),
    ],
)
def test_best_rows(better: str | None, values: dict[str, float | None], best: set[int]) -> None:
    made, column = table(better, **values)
    assert made.best(column) == best


def test_a_row_is_a_teacher_by_role_or_by_name() -> None:
    names = [{"name": "teacher"}, {"name": "Ensemble teacher"}, {"name": "student, no teacher"}, {"name": "big"}]
    rows = [*names, {"name": "big", "role": "teacher"}, {"name": "teacher, pruned", "role": "student"}]
    assert Table("", [], rows, []).students == [2, 3, 5]


# --- what the page must never do ---------------------------------------------------------------------------------


def test_nothing_hostile_becomes_markup(source: str, page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert [source.split(",")[0] for source in images] == ["data:image/svg+xml;base64"]  # the one picture of the run
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>alert" not in source
    assert HOSTILE in "".join(page.parts)


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            target = attributes.get(name) or ""
            assert not target or target.startswith(("#", "data:")), f"{tag} {name}={target}"
        assert "url(http" not in (attributes.get("style") or "")
    assert any("Content-Security-Policy" in str(attributes) for _, attributes in page.elements)


def test_the_policy_admits_the_one_script(source: str) -> None:
    import base64
    import hashlib

    script = re.search(r"<script>(.*?)</script>\s*</body>", source, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in source


def test_credentials_stay_home(source: str, run_dir: Path, tmp_path: Path) -> None:
    card = write_model_card(run_dir, tmp_path).read_text("utf-8")
    for text in (source, card):
        assert SECRET not in text
        assert "hunter2" not in text


def test_credentials_on_the_command_line() -> None:
    argv = ["x", "--api-key", "abc", "hf_token=abc", "max_tokens=12", "tokenizer=gpt2", "api_key_env=KEY", "api_key="]
    hidden = hide_arguments(argv)
    assert hidden == ["x", "--api-key", "(hidden)", "hf_token=(hidden)", *argv[4:]]


def test_ids_are_unique_and_references_meet_them(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [str(a["href"])[1:] for _, a in page.elements if str(a.get("href") or "").startswith("#")]
    wanted += [m for _, a in page.elements for m in re.findall(r"url\(#([^)]+)\)", str(a.get("clip-path") or ""))]
    assert len(wanted) > 20
    assert set(wanted) <= set(ids)


def test_figures_are_coloured_by_variables_and_named(source: str) -> None:
    figures = re.findall(r"<svg class=\"plot\".*?</svg>", source, re.S)
    assert len(figures) > 15
    for figure in figures:
        assert not re.search(r"#[0-9a-f]{6}\b", figure)
        assert "font-family" not in figure
        assert "<style" not in figure
        assert re.search(r'aria-label="[^"]{12,}"', figure)
    assert source.count('<details class="numbers">') == len(figures)


def test_writing_twice_gives_the_same_bytes(run_dir: Path, source: str) -> None:
    """With figures that are drawn again, and with those that are kept."""
    for kept in (report_html._line_plot, report_html._reliability_plot):
        kept.cache_clear()
    assert write_report(run_dir).read_text("utf-8") == source
    assert write_report(run_dir).read_text("utf-8") == source
    assert not [path for path in run_dir.iterdir() if path.name.endswith(".tmp")]


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "run.json", {"title": "Before"})
    before = write_report(tmp_path).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    write_json(tmp_path / "run.json", {"title": "After"})
    with pytest.raises(RunError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.json"]


def test_global_settings_stay() -> None:
    before = dict(matplotlib.rcParams)
    assert line_plot("x", "Loss", "loss", [Series("a", [1, 2], [1, 2])])
    assert reliability_plot("x", "a", [(0.5, 0.5, 1)], 0.1)
    assert dict(matplotlib.rcParams) == before


# --- what it survives --------------------------------------------------------------------------------------------


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path, status="running")).read_text("utf-8")).text
    assert "Unfinished: it had come to stage 02 student" in text
    assert "The last line logged there is of step 1,200." in text
    assert "unfinished" in text


def test_a_failed_run_shows_its_error(tmp_path: Path) -> None:
    error = f"Traceback (most recent call last):\n  line 3\nRuntimeError: loss of 'student' {HOSTILE}"
    source = write_report(make_run(tmp_path, status="failed", error=error)).read_text("utf-8")
    page = Page(source)
    assert "This run failed in stage 02 student." in page.text
    assert source.index("RuntimeError: loss of") < source.index("Traceback")
    assert source.index('role="alert"') < source.index("<main>")
    assert [tag for tag, _ in page.elements].count("script") == 1


def test_an_almost_empty_run(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {})
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert tmp_path.name in page.text
    assert "No stage had started." in page.text


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run\.json"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match="not list"):
        write_report(tmp_path)


def test_damaged_and_odd_parts_cost_only_themselves(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "stages" / "03-evaluate" / "artifact" / "table.json").write_text('{"title": "Held')
    stage = run / "stages" / "01-teacher" / "stage.json"
    write_json(stage, json.loads(stage.read_text()) | {"cache": str(tmp_path / "gone")})
    odd = run / "stages" / "05-<b>odd"
    write_json(odd / "stage.json", {"seconds": "soon", "peak_memory_mb": -1, "steps": None, "metrics": [1]})
    lines = [
        {"step": "2", "kind": "train", "loss": 1},
        {"step": 3, "kind": "train", "player": "p", "loss": None, "terms": {"a": {}, "b": 3, "c": {"value": math.inf}}},
        {"step": 4, "kind": "train", "player": "p", "loss": math.nan, "grad_norm": 10**400, "values": {"v": "x"}},
        {"step": 5, "kind": "eval", "metrics": {"val": 1.5}},
        {"step": 6, "kind": "other"},
    ]
    write_lines(odd / "metrics.jsonl", lines, tail="[1, 2]\nnull\n")
    page = Page(write_report(run).read_text("utf-8"))
    assert "table.json cannot be read" in page.text
    assert "gone is gone: no curves and no artifact" in page.text
    assert "loss total never finite in 2 logged values" in page.text
    assert "val at step 5, evaluated once 1.5" in page.text
    assert "Verbatim recall of training text" in page.text
    assert "05 <b>odd" in page.text


def test_stages_outside_the_run_are_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", record | {"stages": ["../../outside", "..", "01-teacher", "09-planned"]})
    stages = {stage.folder: stage.status for stage in read_run(run).stages}
    assert list(stages)[:2] == ["01-teacher", "09-planned"]
    assert stages["09-planned"] == "no record"
    assert len(stages) == 5


def test_steps_are_put_in_order_and_one_logged_twice_counts_once(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {})
    stage = tmp_path / "stages" / "01-a"
    write_json(stage / "stage.json", {"kind": "Train"})
    lines = [
        {"step": step, "kind": "train", "player": "p", "loss": loss} for step, loss in ((3, 2), (1, 5), (2, 4), (2, 3))
    ]
    write_lines(stage / "metrics.jsonl", lines)
    assert [line["loss"] for line in read_run(tmp_path).stages[0].train["p"]] == [5, 3, 2]


def test_many_stages_make_a_bounded_page(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"status": "done"})
    for index in range(1, 31):
        stage = tmp_path / "stages" / f"{index:02d}-round"
        write_json(stage / "stage.json", {"kind": "Train", "status": "done", "seconds": index})
        write_lines(stage / "metrics.jsonl", [{"step": s, "kind": "train", "loss": 1 / s} for s in (1, 2, 3)])
    source = write_report(tmp_path).read_text("utf-8")
    assert "18 further training stages are not drawn" in source
    assert source.count('class="plot"') == report_html.MOST_PLOTTED_STAGES + 1
    assert "the longest 24 of 30" in source


# --- figures -----------------------------------------------------------------------------------------------------


def points_of(svg: str) -> list[int]:
    """How many points each path of a figure has."""
    return [len(re.findall(r"[ML] ", path)) for path in re.findall(r' d="([^"]*)"', svg)]


def test_long_series_are_drawn_short_and_told_in_a_dozen_rows() -> None:
    steps = list(range(100_000))
    plot = line_plot("x", "Loss", "loss", [Series("a", steps, [1 + math.sin(s / 900) / 2 for s in steps])])
    assert plot is not None
    assert max(points_of(plot.svg)) <= 500
    assert len(plot.rows) == MAX_ROWS
    assert plot.rows[0][0] == "0"
    assert plot.rows[-1][0] == "99,999"
    assert plot.bucket == 625


def test_a_spike_is_not_averaged_away() -> None:
    values = [1.0] * 10_000
    values[5_000] = 40.0
    plot = line_plot("x", "Loss", "loss", [Series("a", range(10_000), values)])
    flat = line_plot("x", "Loss", "loss", [Series("a", range(10_000), [1.0] * 10_000)])
    assert plot is not None
    assert flat is not None
    assert plot.svg != flat.svg
    assert ">40<" in plot.svg.replace("\n", "")


def test_steep_positive_series_get_a_logarithmic_axis() -> None:
    steep = line_plot("x", "Loss", "loss", [Series("a", [1, 2, 3], [100.0, 1.0, 0.01])], steep=True)
    mixed = line_plot("x", "Loss", "loss", [Series("a", [1, 2, 3], [100.0, 0.0, -1.0])], steep=True)
    assert steep is not None
    assert mixed is not None
    assert "log scale" in steep.svg
    assert "log scale" not in mixed.svg


def test_names_are_never_read_as_mathematics() -> None:
    plot = line_plot("x", "Value", "$\\frac{1}", [Series("$\\frac{1}", [1, 2], [1, 2])])
    bars = bar_plot("y", "Time", "time (s)", [Bar("$\\frac{1} <b>", 3.0, "3 s")])
    assert plot is not None
    assert "$\\frac{1}" in plot.svg
    assert bars is not None
    assert "&lt;b&gt;" in bars.svg


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf]])
def test_nothing_finite_gives_no_figure(values: list[float]) -> None:
    assert line_plot("x", "Loss", "loss", [Series("a", range(len(values)), values)]) is None
    assert bar_plot("x", "Time", "time", [Bar("a", value, "") for value in values]) is None
    assert reliability_plot("x", "a", [(value, 0.5, 1) for value in values], 0.1) is None


@pytest.mark.parametrize("values", [[0.0], [1e300, -1e300], [1e-300, 2e-300], [5.0, math.nan, 5.0], [-3.0, -2.0]])
def test_extreme_values_are_drawn(values: list[float]) -> None:
    plot = line_plot("x", "Loss", "loss", [Series("a", range(len(values)), values)])
    assert plot is not None
    assert "nan" not in plot.svg.lower()


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_palette_is_readable_in_both_schemes(scheme: int) -> None:
    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(PALETTE[one][scheme]), luminance(PALETTE[other][scheme])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for text, ground in (("ink", "paper"), ("quiet", "paper"), ("accent", "paper"), ("bad", "paper")):
        assert contrast(text, ground) >= 4.5
    assert min(contrast("ink", "wash"), contrast("quiet", "wash"), contrast("bad", "badwash")) >= 4.5
    assert min(contrast(name, "paper") for name in PALETTE if re.fullmatch(r"s\d|axis", name)) >= 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.41267, "0.4127"),
        (1204.0, "1,204"),
        (12_345.6, "12,346"),
        (1.2e-5, "1.2e−5"),
        (3.4e6, "3.4M"),
        (-2.5, "−2.5"),
        (1e300, "1e300"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
    ],
)
def test_compact_numbers(value: float, expected: str) -> None:
    assert compact(value) == expected


@pytest.mark.parametrize(
    ("value", "spec", "expected"),
    [
        (100.0, ",d", "100"),
        (1234567, ",d", "1,234,567"),
        (0.5, ",d", "0.5"),  # a format that does not fit is passed over
        (0.4781, ".1%", "47.8%"),
        (-0.5, ".2f", "−0.50"),
        (1.0, "999999999", "1"),
        (1.0, ".2f}{x", "1"),
        (None, ".2f", "–"),
        (math.nan, ".2f", "NaN"),
        ("text", ".2f", "text"),
        (True, ".2f", "true"),
        (10**400, ".2f", "∞"),
    ],
)
def test_table_cells(value: object, spec: str, expected: str) -> None:
    assert show(value, spec) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0042, "4 ms"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (math.nan, "–"),
        (-1, "–"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_the_command_line_is_what_one_types() -> None:
    assert command_line(["/opt/venv/bin/stillhouse", "run", "a b"]) == "stillhouse run 'a b'"
    assert command_line([]) == ""


# --- the model card ----------------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    return folder


def test_the_card_is_valid_and_says_what_is_known(run_dir: Path, model_dir: Path) -> None:
    path = write_model_card(
        run_dir,
        model_dir,
        base_model="HuggingFaceTB/SmolLM-135M",
        dataset="roneneldan/TinyStories",
        teacher="/home/someone/private/teacher-7b",
        figures={"val_loss": 2.7412, "kept | parameters": 1_179_648},
    )
    assert path == model_dir / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["stillhouse", "distillation", "taid"]
    assert card.data.base_model == "HuggingFaceTB/SmolLM-135M"
    assert card.data.datasets == ["roneneldan/TinyStories"]
    assert card.data.license is None
    text = card.text
    assert "distilled from `teacher-7b` by Temporally adaptive" in text
    assert "/home/someone" not in text
    assert "| 01 teacher | Train | 4,000 | 2 min 05 s | reused from an earlier run |" in text
    assert "| `t_start` | `0.4` | default |" in text
    assert "| student, taid | 1,179,648 | **15.50** | 40.1% | 0.021 | 0.3127 |" in text
    assert "kept \\| parameters" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "AutoTokenizer" not in text  # the directory holds none
    assert "stillhouse run taid steps=1200" in text
    assert "Measured only on: Held-out text; Verbatim recall of training text." in text
    assert "not by the published method: `lr`, `batch_size`" in text
    assert "3 logged losses were not finite" in text
    prose = re.sub(r"`[^`\n]*`", "", text)
    assert "<script>" not in prose
    assert "<img" not in prose


def test_the_card_promises_only_what_the_directory_holds(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_json(folder / "config.json", {"architectures": ["ViTForImageClassification"]})
    card = ModelCard.load(write_model_card(run_dir, folder, base_model="small", dataset=str(tmp_path)))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "from_pretrained" not in card.text
    (folder / "config.json").write_text("{broken")
    assert ModelCard.load(write_model_card(run_dir, folder)).data.library_name == "stillhouse"


def test_a_card_is_written_twice_alike(run_dir: Path, model_dir: Path) -> None:
    first = write_model_card(run_dir, model_dir).read_bytes()
    assert write_model_card(run_dir, model_dir).read_bytes() == first
    assert sorted(path.name for path in model_dir.iterdir()) == ["README.md", "config.json"]


def test_the_card_of_an_almost_empty_run(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"status": "running"})
    text = ModelCard.load(write_model_card(tmp_path, tmp_path)).text
    assert "holds no evaluation table" in text
    assert "its status was running" in text
    assert "##  " not in text


def test_no_card_without_a_model(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="save the model there"):
        write_model_card(run_dir, tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM-135M", True),
        ("gpt2", False),
        ("./models/x", False),
        ("/abs/x", False),
        ("~/x", False),
        ("a/b/c", False),
        ("owner/with space", False),
        ("owner/" + "x" * 300, False),
        ("", False),
        (None, False),
    ],
)
def test_hub_ids(name: str | None, expected: bool) -> None:
    assert _is_hub_id(name) is expected


def test_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert not _is_hub_id("models/small")


@pytest.mark.parametrize(
    ("kind", "built", "loader"),
    [
        ("swiftkv-llama", "LlamaForCausalLM", "stillhouse.models.swiftkv import load_swiftkv"),
        ("expanded-llama", "LlamaForCausalLM", "stillhouse.models.input_expansion import load_expanded"),
        ("lsg-bert", "LSGBertForMaskedLM", "stillhouse.models.efficient_attention import load_efficient"),
        ("llama", "LlamaForCausalLM", "transformers import AutoModelForCausalLM"),
    ],
)
def test_a_card_loads_types_of_our_own_as_they_must_be(tmp_path, kind, built, loader):
    import importlib

    from stillhouse.report.card import _load

    write_json(tmp_path / "config.json", {"model_type": kind, "architectures": [built]})
    said = _load(tmp_path, causal=built.endswith("ForCausalLM"))
    assert f"from {loader}\n" in said
    module, name = loader.split(" import ")
    assert hasattr(importlib.import_module(module), name) and f"model = {name}" in said
