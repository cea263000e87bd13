"""The ``vcpo`` command: parse, call, print.

Everything heavy is imported inside the command that needs it, so that ``vcpo --help`` answers at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vcpo.errors import ConfigError, VcpoError

OVERRIDABLE = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": ["-h", "--help"],
}
"""Settings of a command that takes ``--section.field value``."""

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended; typer returns it for a KeyboardInterrupt."""

LOG_WIDTH = 160
"""Columns of a table that is printed to a file."""


class StoppedError(VcpoError):
    """A run that was asked to stop before its end, and did so in order."""

    exit_code = INTERRUPTED


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeAndSettings = Annotated[
    list[str] | None, typer.Argument(metavar="RECIPE|--SECTION.FIELD VALUE", hidden=True)
]
ModelAndSettings = Annotated[
    list[str] | None, typer.Argument(metavar="RUN_OR_MODEL|--SECTION.FIELD VALUE", hidden=True)
]


@app.callback(invoke_without_command=True)
def vcpo(context: typer.Context) -> None:
    """Stable asynchronous reinforcement learning of language models.

    \b
    vcpo train                  train a small model on the text maze, 2 CPU cores, minutes
    vcpo train --dry-run        what that would do, and what it needs
    vcpo config                 every setting, its value and its meaning
    vcpo report RUN             the report of a run, as a web page in one file
    vcpo compare RECIPE ...     methods against each other, over lags and seeds
    vcpo COMMAND --help         more about a command
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(context_settings=OVERRIDABLE)
def train(
    context: typer.Context,
    arguments: RecipeAndSettings = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Continue this run from its last checkpoint, with its own config."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (memory, tokens, processes) and stop.")
    ] = False,
) -> None:
    """Train a model by asynchronous RL.

    RECIPE is a TOML file, or a recipe that comes with vcpo (default: maze). The model is evaluated before and
    after on held-out problems, and a report is written to the run's folder.

    \b
    vcpo train                                        the maze, with the defaults
    vcpo train sort --algorithm.name grpo             another recipe, another algorithm
    vcpo train my.toml --pipeline.lag 8 --run.name a  your recipe, two settings changed
    vcpo train jsonl --model.name PATH_OR_HUB_ID --environment.path problems.jsonl
    vcpo train --resume runs/a                        go on after a stop or a crash
    """
    from vcpo.config import apply_overrides, default_recipe, load_config

    recipe, overrides = _split(context, arguments)
    if resume is None:
        config = load_config(recipe or default_recipe(overrides), overrides)
    elif recipe is None:
        config = apply_overrides(load_config(_run_folder(resume) / "config.toml"), overrides)
    else:
        raise ConfigError(f"give a recipe or --resume, not both: {resume} has the config it was started with")
    if dry_run:
        from vcpo.pipeline.plan import plan_text

        typer.echo(plan_text(config, resume))
        return
    from rich.console import Console

    from vcpo.monitor.progress import RichProgress, print_summary
    from vcpo.runtime import train as run

    summary = run(config, resume=resume, progress=RichProgress())
    print_summary(summary, Console())
    if not summary["completed"]:
        raise StoppedError(f"interrupted; to go on: vcpo train --resume {summary['run_folder']}")


@app.command(context_settings=OVERRIDABLE)
def eval(
    context: typer.Context,
    arguments: ModelAndSettings = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Held-out problems to play.")] = None,
) -> None:
    """Measure accuracy on held-out problems.

    RUN_OR_MODEL is a run's folder, or a model's folder or hub id. Accuracy is sampled and greedy.

    \b
    vcpo eval runs/a --problems 1000                  the model that a run made, on its own environment
    vcpo eval PATH --environment.kind countdown --environment.size 3
    """
    from vcpo.monitor.progress import RichProgress
    from vcpo.runtime import evaluate

    path, overrides = _split(context, arguments)
    if path is None:
        raise ConfigError("name a run folder or a model: vcpo eval RUN_OR_MODEL")
    _print_figures(evaluate(Path(path), overrides, problems=problems, progress=RichProgress()))


@app.command(context_settings=OVERRIDABLE)
def calibrate(
    context: typer.Context,
    arguments: RecipeAndSettings = None,
    groups: Annotated[
        int, typer.Option(min=2, help="Problems to play, each with the recipe's rollouts.")
    ] = 64,
    tokens: Annotated[int | None, typer.Option(min=1, help="Stop when so many tokens were sampled.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write there, and not where runs with these settings look."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the ESS ratios.")] = None,
) -> None:
    """Measure what the sampler's numerics alone cost.

    Sampler and learner get the same weights. What they say of the same tokens still differs where kernels or
    number types do, and the more tokens an answer has, the more ESS that costs, at lag 0. This measures the
    difference of a token, and tells the ESS ratio that on-policy data have at each length. A run with
    on_policy_ratio = "calibrated" scales its steps relative to that, so that only lag shortens them.

    \b
    vcpo calibrate sort --sampler.dtype bfloat16      the same settings as of the run
    vcpo train sort --sampler.dtype bfloat16 --algorithm.on_policy_ratio calibrated
    vcpo calibrate my.toml --groups 256               four times the default: half the interval
    vcpo calibrate my.toml --out a.json               for --algorithm.calibration a.json, on any machine
    """
    from rich.console import Console

    from vcpo.config import default_recipe, load_config
    from vcpo.monitor.calibration import calibration_svg, print_calibration
    from vcpo.monitor.progress import RichProgress
    from vcpo.runtime import calibrate as run

    recipe, overrides = _split(context, arguments)
    config = load_config(recipe or default_recipe(overrides), overrides)
    if figure is not None and not figure.parent.is_dir():
        raise ConfigError(f"--figure {figure}: there is no folder {figure.parent}")
    record, path = run(config, groups=groups, tokens=tokens, out=out, progress=RichProgress())
    print_calibration(record, Console())
    if figure is not None:
        figure.write_text(calibration_svg(record), encoding="utf-8")
    typer.echo(f"written to {path}")


@app.command(context_settings=OVERRIDABLE)
def serve(
    context: typer.Context,
    arguments: ModelAndSettings = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8000,
    host: Annotated[str, typer.Option(help="Loopback, unless other machines shall reach it.")] = "127.0.0.1",
) -> None:
    """Start a vLLM server that vcpo can train with, and stay in front of it.

    The model's folder or hub id, then settings as for training: [sampler], [model] and [lora] decide how it
    is served, and must be those of the run (vcpo config RECIPE shows them). A run uses it by sampler.urls;
    without urls a run starts servers itself. Whoever reaches the port can change the weights: open it to
    machines you trust alone.

    \b
    vcpo serve Qwen/Qwen2-1.5B --port 8001 --sampler.python ENV/bin/python
        --model.device cuda --model.dtype bfloat16 --model.context_length 4096
    vcpo train gsm8k --sampler.kind vllm --sampler.urls http://127.0.0.1:8001
    """
    from vcpo.config import load_config
    from vcpo.samplers.vllm.process import serve_in_front

    model, overrides = _split(context, arguments)
    if model is None:
        raise ConfigError("name a model: vcpo serve PATH_OR_HUB_ID")
    config = load_config(None, [*overrides, "--sampler.kind", "vllm", "--model.name", model])
    raise typer.Exit(serve_in_front(config, host, port))


@app.command(context_settings=OVERRIDABLE)
def compare(
    context: typer.Context,
    arguments: RecipeAndSettings = None,
    methods: Annotated[
        str,
        typer.Option(help="Algorithms, by comma; their own settings in [...]. Required.", show_default=False),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where runs and results go. Required.", show_default=False),
    ] = None,
    lags: Annotated[str, typer.Option(help="Policy lags, by comma.")] = "0",
    seeds: Annotated[str, typer.Option(help="4 for seeds 0 to 3, 10-14, or 3,7.")] = "4",
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; default: as many as cores.")] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Control runs after the grid.")] = False,
) -> None:
    """Compare methods over lags and seeds.

    Every method is run at every lag with every seed, in exact mode, each run in a process of its own. Runs
    that are in FOLDER already are not repeated: the same command goes on after a stop. FOLDER gets
    results.jsonl, table.md and compare.html.

    \b
    vcpo compare maze --methods vcpo,grpo --lags 0,16,64 --seeds 4 --out comparison
    vcpo compare sort --methods "vcpo,vcpo[learner.learning_rate=4e-4],tis" --lags 64 --seeds 10-14 --out b
    vcpo compare my.toml --methods vcpo,tis --lags 8 --out c --pipeline.steps 300 --jobs 4

    With --controls, each run whose steps are scaled by the ESS ratio is followed by the same at the constant
    rate that is its mean and by the same with its factors permuted, and each run with the optimal baseline by
    the same with baseline zero.
    """
    from rich.console import Console

    from vcpo.compare.command import Grid
    from vcpo.compare.command import compare as run
    from vcpo.config import default_recipe

    recipe, overrides = _split(context, arguments)
    if not methods or out is None:  # checked after the rest, which may be a misspelling of just these
        missing = "--out FOLDER" if methods else "--methods vcpo,grpo (`vcpo methods` lists all)"
        raise ConfigError(f"vcpo compare needs {missing}")
    recipe = recipe or default_recipe(overrides)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    outcome = run(Grid(recipe, overrides, methods, lags, seeds, out, jobs, controls), console)
    typer.echo(outcome.text)
    if outcome.interrupted:
        raise StoppedError("interrupted; to go on, give the same command again")
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
) -> None:
    """Write a run's report anew.

    RUN/report.html is one file that needs nothing else; it can be written while the run goes on.

    \b
    vcpo report runs/a
    """
    from vcpo.monitor.report import write_report

    typer.echo(write_report(_run_folder(run)))


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="Folder of a job that runs with runtime.kind = 'ray'.")],
    samplers: Annotated[int, typer.Option(help="How many samplers it is to have from now on.")],
) -> None:
    """Change the number of samplers of a running job on a Ray cluster.

    New ones join as soon as the cluster has room for them; those that go finish their groups first.
    """
    from vcpo.runtime.ray.scale import scale as ask

    ask(_run_folder(run), samplers)
    noun = "sampler" if samplers == 1 else "samplers"
    typer.echo(f"asked for {samplers} {noun}: the job has heard it, and says so where it runs")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One algorithm, in full.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every algorithm, in full.")] = False,
) -> None:
    """List the algorithms, or describe one.

    The description has formula, paper, settings, and departures from the paper. A recipe names one as
    algorithm.name, and may change its parts by other fields of [algorithm].

    \b
    vcpo methods
    vcpo methods vcpo
    """
    from vcpo.algorithms.catalog import ALGORITHMS, get_algorithm

    if name is not None:
        typer.echo(get_algorithm(name).describe())
        return
    if every:
        typer.echo("\n\n".join(algorithm.describe() for algorithm in ALGORITHMS.values()))
        return
    width = max(map(len, ALGORITHMS))
    for algorithm in ALGORITHMS.values():
        typer.echo(f"{algorithm.name:{width}}  {algorithm.summary}")


@app.command(context_settings=OVERRIDABLE)
def config(context: typer.Context, arguments: RecipeAndSettings = None) -> None:
    """Print every setting, its value and its meaning.

    The output is TOML and itself a recipe.

    \b
    vcpo config
    vcpo config sort --pipeline.lag 8 > my.toml
    """
    from vcpo.config import default_recipe, dump_toml, load_config

    recipe, overrides = _split(context, arguments)
    typer.echo(dump_toml(load_config(recipe or default_recipe(overrides), overrides), explain=True), nl=False)


def _split(context: typer.Context, arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """The one plain argument (None if there is none), and the ``--section.field value`` list.

    Raises ConfigError for a second plain argument, an option without a dot, and one without a value.
    """
    plain: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments or ())
    for argument in rest:
        if not argument.startswith("-"):
            plain.append(argument)
            continue
        _require_setting(context, argument)
        overrides.append(argument)
        if "=" not in argument:
            overrides.append(_value(argument, next(rest, "--")))
    if len(plain) > 1:
        raise ConfigError(f"unexpected argument {plain[1]!r}: settings are written --section.field value")
    return (plain[0] if plain else None), overrides


def _value(option: str, following: str) -> str:
    if following.startswith("--"):
        raise ConfigError(f"{option} needs a value: {option} VALUE")
    return following


def _require_setting(context: typer.Context, argument: str) -> None:
    """Options of the command itself never get here, so one without a dot is misspelt."""
    option = argument.partition("=")[0]
    if "." in option:
        return
    known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    near = difflib.get_close_matches(option, known, 1)
    meant = f"did you mean {near[0]}?" if near else f"options are {', '.join(known)} and --section.field"
    raise ConfigError(f"unknown option {option}; {meant}")


def _run_folder(path: Path) -> Path:
    """``path`` if a run is there; else ConfigError with the nearest run beside it."""
    if (path / "config.toml").is_file():
        return path
    runs = [str(found.parent) for found in path.parent.glob("*/config.toml")]
    near = difflib.get_close_matches(str(path), runs, 1, cutoff=0.4)
    meant = f"; did you mean {near[0]}?" if near else "; a run folder has a config.toml"
    raise ConfigError(f"no run in {str(path)!r}{meant}")


def _print_figures(figures: Mapping[str, Any]) -> None:
    """Name and value, one a line."""
    width = max(map(len, figures))
    for name, value in figures.items():
        typer.echo(f"{name.replace('_', ' '):{width}}  {_figure(value)}")


def _figure(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_figure, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: runs the command and returns its exit code; whatever goes wrong is one line on stderr.

    ``VCPO_DEBUG=1`` shows the traceback instead.
    """
    try:
        code = app(arguments, prog_name="vcpo", standalone_mode=False) or 0
    except Exception as error:
        if os.environ.get("VCPO_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(*_explain(error))
    return _fail("interrupted", code) if code == INTERRUPTED else code


def _explain(error: Exception) -> tuple[str, int]:
    """Message and exit code."""
    if isinstance(error, VcpoError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return error.format_message(), error.exit_code
    return f"{type(error).__name__}: {error} (not foreseen; VCPO_DEBUG=1 shows where)", VcpoError.exit_code


def _fail(message: str, exit_code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
