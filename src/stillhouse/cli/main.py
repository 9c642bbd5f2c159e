"""``stillhouse``: run, resume, list, check and report."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from stillhouse.base.errors import ConfigError, RunError, StillhouseError, suggest
from stillhouse.base.taxonomy import AXES
from stillhouse.cli.advise import advise
from stillhouse.cli.audit import audit
from stillhouse.cli.choose import choose

app = typer.Typer(
    name="stillhouse",
    help="Staged distillation: published systems as short compositions, on your models and data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(advise, name="advise")
app.command()(audit)
app.command()(choose)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors a user can put right are one line and exit code 2; the rest needs ``--debug``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(words):
        for library in ("HUB", "DATASETS"):  # their progress bars would surround our one line
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        app(args=words, standalone_mode=False)
    except StillhouseError as error:
        _fail(str(error), error, debug)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("\nstillhouse: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            _fail(error.format_message(), error, debug)
        _fail(f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)", error, debug, 1)


def _fail(message: str, error: BaseException, debug: bool, code: int = 2) -> None:
    if debug:
        raise error
    print(f"stillhouse: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _print(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def _table(columns: list[str], rows: list[list[str]], *, right: int = 99) -> None:
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place >= right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def run(
    name: Annotated[
        str, typer.Argument(help="A system (see `stillhouse systems`), or a .py file that defines one.")
    ] = "",
    values: Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE...", help="Fields and options.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A recipe (YAML).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all stages again.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a system, on the embedded task or on your models and data."""
    from stillhouse.cli.recipe import parse_overrides, read_recipe, without_defaults
    from stillhouse.systems import get_system
    from stillhouse.workflow import run_system

    words = list(values or [])
    if "=" in name:
        name, words = "", [name, *words]
    chosen: dict[str, Any] = read_recipe(config) if config else {}
    named = chosen.pop("system", None)
    if name and named and name != named:
        raise ConfigError(f"{config} is a recipe for {named!r}, not for {name!r}")
    if not (name or named):
        raise ConfigError("which system? `stillhouse run NAME ...`, or a --config with `system: NAME`")
    chosen = without_defaults(get_system(name or named), chosen) | parse_overrides(words)
    output = chosen.pop("output", None) or _new_folder(name or named)
    finished = run_system(name or named, chosen, output=output, quiet=quiet, fresh=fresh)
    _show_result(finished)


def _new_folder(name: str) -> str:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"runs/{Path(name).stem}-{stamp}"


def _show_result(finished: Any) -> None:
    if int(os.environ.get("RANK", "0")):
        return
    for artifact in finished.artifacts.values():
        if artifact.kind == "table":
            table = artifact.table()
            print(f"\n{table.title}")
            rows = [[row["name"], *table.cells(row)] for row in table.rows]
            _table(["", *(column.label for column in table.columns)], rows, right=1)
            for note in table.notes:
                print(note)
    print()
    if (finished.folder / "model").exists():
        print(f"model   {finished.folder / 'model'}")
    print(f"report  {finished.report}")


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")], quiet: Quiet = False
) -> None:
    """Go on with a run that was stopped or killed."""
    from stillhouse.workflow import resume as resume_run

    _show_result(resume_run(folder, quiet=quiet))


FILTERS = (
    "domain",
    "family",
    "access",
    "year",
    "divergence",
    "needs",
    *(axis for axis in AXES if axis != "teacher_access"),
)


def _filter(name: str) -> Any:
    return typer.Option(f"--{name}", help=f"Only systems whose {name} contains this.")


@app.command()
def systems(
    domain: Annotated[str, _filter("domain")] = "",
    family: Annotated[str, _filter("family")] = "",
    feedback: Annotated[str, _filter("feedback")] = "",
    access: Annotated[str, _filter("access")] = "",
    granularity: Annotated[str, _filter("granularity")] = "",
    policy: Annotated[str, _filter("policy")] = "",
    elicitation: Annotated[str, _filter("elicitation")] = "",
    algorithm: Annotated[str, _filter("algorithm")] = "",
    knowledge: Annotated[str, _filter("knowledge")] = "",
    scheme: Annotated[str, _filter("scheme")] = "",
    modality: Annotated[str, _filter("modality")] = "",
    skill: Annotated[str, _filter("skill")] = "",
    vertical: Annotated[str, _filter("vertical")] = "",
    role: Annotated[str, _filter("role")] = "",
    year: Annotated[str, _filter("year")] = "",
    divergence: Annotated[str, _filter("divergence")] = "",
    needs: Annotated[
        str, typer.Option("--needs", help="Only systems that need this: verifier, shared tokenizer.")
    ] = "",
    matrix: Annotated[bool, typer.Option("--matrix", help="Names by elicitation and algorithm, and the gaps.")] = False,
    as_json: Json = False,
) -> None:
    """List the systems, by any axis of the taxonomy, and by what is known of the method."""
    from stillhouse.catalogue import in_words, rows
    from stillhouse.navigation import coverage, coverage_lines

    wanted = {name: value for name, value in locals().items() if name in FILTERS and value}
    found = rows(**wanted)
    if matrix:
        covered = coverage(found)
        if as_json:
            _print([{"elicitation": e, "algorithm": a, "systems": names} for (e, a), names in covered.items()])
            return
        _table(["elicitation", "algorithm", "count", "systems"], coverage_lines(covered))
        return
    if as_json:
        _print(found)
        return
    keys = ["name", "card", "title", "domain", "family", "feedback", "verdict"]
    _table(keys, [[in_words(row[key]) for key in keys] for row in found])


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """Describe a system: what it is, its fields, the paper's values and the demo's."""
    from stillhouse.catalogue import FACTS, describe, in_words
    from stillhouse.navigation import nearest

    found = {**describe(name), "nearest": nearest(name)}
    if as_json:
        _print(found)
        return
    print(f"{found['title']} ({name})\n{found['citation']}\n\n{found['doc']}\n")
    print("\n".join(f"{axis}: {in_words(found[axis])}" for axis in ("domain", "family", *AXES)))
    print(
        "\n".join(
            f"{fact.replace('_', ' ')}: {in_words(found[fact])}" for fact in FACTS if found[fact] not in (None, "", ())
        )
    )
    print(f"verdict: {found['verdict'] or 'not checked'}")
    print("nearest: " + ", ".join(f"{other} {shared:.2f}" for other, shared in found["nearest"].items()) + "\n")
    rows = [
        [f["name"], f["type"], str(f["default"]), str(f["demo"]) if f["demo"] is not None else "", f["help"]]
        for f in found["fields"]
    ]
    _table(["field", "type", "default", "demo", "what it is"], rows)


@app.command()
def config(name: str) -> None:
    """Print a recipe: all fields with defaults and help, as YAML for `run --config`."""
    from stillhouse.cli.recipe import write_recipe
    from stillhouse.systems import get_system

    print(write_recipe(get_system(name), name), end="")


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where runs are.")] = Path("runs"), as_json: Json = False) -> None:
    """List the runs in a folder."""
    from stillhouse.base.files import read_json

    found = []
    for file in sorted(folder.glob("*/run.json")):
        try:
            record = read_json(file)
        except RunError:
            record = {"name": file.parent.name, "status": "damaged"}
        keys = ("name", "system", "status", "created", "seconds")
        found.append({key: record.get(key) for key in keys} | {"folder": str(file.parent)})
    if as_json:
        _print(found)
        return
    if not found:
        print(f"no runs in {folder}")
        return
    _table(
        ["run", "system", "status", "created", "seconds"],
        [
            [r["folder"], r["system"] or "–", r["status"], r["created"] or "–", f"{r['seconds'] or 0:.0f}"]
            for r in found
        ],
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")]) -> None:
    """Write the HTML report of a run and print its path."""
    from stillhouse.report import write_report
    from stillhouse.runs import run_record

    run_record(folder)
    print(write_report(folder))


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Systems whose claims to re-measure.")
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="All that are not checked as they are configured now.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="How many seeds; by default the claim's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at one time; by default one a core.")] = None,
    results: Annotated[Path, typer.Option(help="Where verdicts are written.")] = Path("results/claims"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Re-measure a system's claims on the embedded task: effect, 95 % interval, verdict."""
    from stillhouse.claims import check as check_claims
    from stillhouse.claims import stale as stale_claims

    names = [*(names or []), *(stale_claims(results) if stale else [])]
    if not names and not stale:
        raise ConfigError("which system? `stillhouse check NAME...`, or --stale for all that need it")
    records = [
        r for name in names for r in check_claims(name, seeds=seeds, workers=workers, results=results, quiet=quiet)
    ]
    if as_json:
        _print(records)
        return
    for record in records:
        low, high = record["interval"]
        print(f"\n{record['system']} ({record['scope']}): {record['statement']}")
        print(f"metric: {record['metric']}; {len(record['seeds'])} seeds; {record['seconds']:.0f} s")
        rows = [
            [name, *(f"{value:.4f}" for value in values), f"{sum(values) / len(values):.4f}"]
            for name, values in record["variants"].items()
        ]
        _table(["variant", *(f"seed {s}" for s in record["seeds"]), "mean"], rows, right=1)
        print(
            f"effect {record['effect']:+.4f} (positive: {record['method']} is better), 95 % interval "
            f"[{low:+.4f}, {high:+.4f}]: {record['verdict']}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and what this machine offers."""
    from stillhouse.catalogue import installation

    found = installation()
    if as_json:
        _print(found)
        return
    for part, facts in found.items():
        print(part)
        for key, value in facts.items():
            print(f"  {key:<18} {value}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    devices: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    node_rank: Annotated[int, typer.Option(help="Which of the machines this is.")] = 0,
    address: Annotated[str, typer.Option(help="The first machine, as HOST:PORT, when there are several.")] = "",
) -> None:
    """Start `run` or `resume` in several processes: `stillhouse launch --devices 2 run taid ...`."""
    words = context.args
    if not words or words[0] not in ("run", "resume"):
        raise ConfigError(f"launch starts `run` or `resume`, not {' '.join(words[:1]) or 'nothing'}{suggest('', [])}")
    if nodes > 1 and not address:
        raise ConfigError("several nodes need --address HOST:PORT of the first one")
    place = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), "--node-rank", str(node_rank)]
    if address:
        place += ["--rdzv-backend", "c10d", "--rdzv-endpoint", address]
    if words[0] == "run":
        words = [*words, f"devices={devices}", f"nodes={nodes}"]
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(devices)]
    done = subprocess.run([*command, "-m", "stillhouse.cli.main", *words])
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
