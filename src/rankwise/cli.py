"""The command line, thin: each command reads its arguments, calls the package and prints. Heavy imports wait for it."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.errors import RankwiseError, TrainingError

app = typer.Typer(
    name="rankwise",
    help="Low-rank fine-tuning on one equation and seven composable axes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, such as train.lr=1e-3 method.name=dora")]
Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER|RUN", help="folder of an adapter or of a run")]
Base = Annotated[str | None, typer.Option("--model", help="the base model, if it is not where the training found it")]


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)  # a pipe or a log has no width of its own


class _Stopped(Exception):
    """Ctrl-C inside a command, with what the command says about it. (Typer keeps only the exit code of a KeyboardInterrupt.)"""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop)) from stop

    return app.command()(guarded)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Read by `main`, which handles errors."""


@_command
def demo(output: Annotated[Path, typer.Option(help="folder of the run; an earlier demo there is removed")] = Path("runs/demo")) -> None:
    """Train the bundled base offline on a CPU in about a minute and see what changed."""
    from rankwise.demo.show import run_demo

    run_demo(output, _console())


@_command
def methods(name: Annotated[str | None, typer.Argument(help="one method in full")] = None) -> None:
    """Every method on its axes, or one in full with its paper."""
    from rankwise.methods import describe, methods_table

    if name is None:
        _console().print(methods_table())
    else:
        print(describe(name))


@_command
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Targets, parameters, memory and data, before anything runs. Reads no weights."""
    from rankwise.training.forecast import forecast

    _loud(forecast, config, overrides or [])


@_command
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: remove an earlier run in the output folder")] = False,
) -> None:
    """One run from one file; the same command again goes on where it stopped."""
    from rankwise.training.run import train as run

    run(config, overrides or [], fresh, _console())


@_command
def evaluate(
    adapter: Adapter,
    data: Annotated[str | None, typer.Option(help="rows of the task; default: the run's own")] = None,
    general: Annotated[str | None, typer.Option(help="general text; default: the run's own")] = None,
    model: Base = None,
) -> None:
    """Scores of the base and of the adapter on held-out rows."""
    from rankwise.training.evaluate import scores_table
    from rankwise.training.quiet import quiet
    from rankwise.training.use import evaluate as scores
    from rankwise.training.use import open_adapter

    quiet()
    base, trained = scores(open_adapter(adapter, model), data, general)
    # a model that was pretrained from scratch has no base to compare with
    _console().print(scores_table(base, trained, headings=("base", "adapter")) if base else scores_table(trained, headings=("trained", "")))


@_command
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="what to answer or continue")],
    tokens: Annotated[int, typer.Option(min=1, help="at most so many new tokens")] = 128,
    compare: Annotated[bool, typer.Option("--compare", help="the base's answer too, before the adapter's")] = False,
    model: Base = None,
) -> None:
    """Write greedily with the adapter, or with the base and the adapter one after the other."""
    from rankwise.training.quiet import quiet
    from rankwise.training.use import generate as write
    from rankwise.training.use import open_adapter

    quiet()
    written = write(open_adapter(adapter, model), prompt, tokens, compare)
    if not compare:
        print(written["adapter"])
        return
    for name, text in written.items():
        print(f"--- {name} ---\n{text}")


@_command
def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="the new model folder")],
    model: Base = None,
) -> None:
    """Write base plus adapter as an ordinary model folder, loaded again and compared before it says done."""
    from rankwise.training.quiet import quiet
    from rankwise.training.use import merge as write

    quiet()
    done = write(adapter, output, model)
    print(f"merged into {done['folder']} in {done['dtype']}\n{done['proof'].text()}")


@_command
def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="the new folder")],
    format: Annotated[str, typer.Option(help="lora (any server), peft, merged, or gguf-lora (llama.cpp)")] = "lora",
    rank: Annotated[int | None, typer.Option(help="cut each layer's change to a rank")] = None,
    energy: Annotated[float | None, typer.Option(help="keep this part of each change's squared norm, such as 0.99")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the base's own")] = None,
    static: Annotated[bool, typer.Option("--static", help="hold a mixture's gates at their mean: an approximation")] = False,
    model: Base = None,
) -> None:
    """Write an adapter in the form that other software takes, loaded again and compared before it says done."""
    from rankwise.training.exporting import export as write
    from rankwise.training.quiet import quiet

    quiet()
    print(write(adapter, output, format, model, rank, energy, dtype, static).text())  # pyright: ignore[reportArgumentType]


@_command
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="model that the training began from")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the trained model")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="the new folder")],
    rank: Annotated[int | None, typer.Option(help="ranks of each layer")] = None,
    energy: Annotated[float | None, typer.Option(help="keep this part of each layer's squared norm")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the trained model's own")] = None,
) -> None:
    """Take the difference of two models as a low-rank adapter, and measure how near it comes."""
    from rankwise.training.extracting import extract as take
    from rankwise.training.quiet import quiet

    quiet()
    print(take(base, tuned, output, rank, energy, dtype).text())


@_command
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="a base, an adapter, a run or a merged folder")],
    b: Annotated[str, typer.Argument(metavar="B", help="another one")],
    model: Base = None,
) -> None:
    """Compare the logits of two of: base, adapter, merged folder. Exits with 1 where they are not the same."""
    from rankwise.training.quiet import quiet
    from rankwise.training.verifying import verify as compare

    quiet()
    found = compare(a, b, model)
    print(found.text())
    if not found.passed:
        raise typer.Exit(1)


@_command
def doctor(
    adapter: Annotated[Path | None, typer.Argument(metavar="[ADAPTER]", help="diagnose this adapter instead of the machine")] = None,
    model: Base = None,
    repair: Annotated[Path | None, typer.Option(metavar="OUTPUT", help="write it again, with what can be repaired repaired")] = None,
) -> None:
    """What this machine can do, or what is wrong with an adapter (exits with 1 then)."""
    if adapter is not None:
        from rankwise.training.checkup import check
        from rankwise.training.checkup import repair as mend
        from rankwise.training.quiet import quiet

        quiet()
        found = check(adapter, model)
        print(found.text())
        if repair is not None:
            print(mend(found, model, repair))
        elif found.broken:
            raise typer.Exit(1)
        return
    from rankwise.doctor import report

    if not report(_console()):
        raise typer.Exit(1)


def _loud(command: Callable[..., str], *arguments: Any) -> None:
    print(command(*arguments))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 1 a run that failed, 2 usage, configuration or data, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs a command and returns its exit code. Errors are one line on stderr; a traceback only with --debug."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]  # wherever it stands
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt, _Stopped) as stop:
        said = str(stop) or "interrupted; a training run goes on from its last checkpoint when the same command is given again"
        return _fail(said, 130, debug)
    except TrainingError as error:
        return _fail(str(error), 1, debug)
    except RankwiseError as error:
        return _fail(str(error), 2, debug)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), 2, debug)
    except MemoryError:
        return _fail("not enough memory; lower train.batch_size or train.max_length, or set train.checkpointing=true", 1, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, or of the copy of click that newer versions of typer carry
            return _usage(error, debug)
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("the GPU's memory is full; lower train.batch_size or set train.checkpointing=true", 1, debug)
        text = str(error).strip().splitlines()
        return _fail(f"{type(error).__name__}: {text[0] if text else 'no message'} (unexpected; --debug shows where)", 1, debug)


def _usage(error: Any, debug: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return 2
    return _fail(f"{error.format_message()}; rankwise --help lists the commands, rankwise COMMAND --help their options", 2, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _missing(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name in ("transformers", "trl", "datasets", "accelerate", "jinja2", "matplotlib"):
        return f"this command needs {name}, which is not installed; get it with: pip install 'rankwise[train]'"
    return f"the package {name} is not installed; get it with: pip install {name}"


__all__ = ["app", "main", "run"]

if __name__ == "__main__":
    main()
