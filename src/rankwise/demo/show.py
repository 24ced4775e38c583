"""`rankwise demo`: the bundled base on two sections it has never seen, trained, measured and asked to write, offline on a CPU."""

from pathlib import Path
from typing import Any

from rankwise.demo import data_file

ROWS = (8, 3)  # of the held-out rows, whose prompts are answered before and after
TOKENS = 60


def run_demo(output: Path, console: Any) -> None:
    """Trains as demo.yaml says and shows what changed. An earlier demo in the output folder is replaced.

    Raises:
        ConfigError: the output folder holds something that is no run.
    """
    from rankwise.training.config import load_config
    from rankwise.training.progress import say
    from rankwise.training.quiet import quiet
    from rankwise.training.run import next_steps, train
    from rankwise.training.use import generate, open_adapter

    quiet()
    config = load_config(Path(__file__).with_name("demo.yaml"), [f"output={output}"])
    say(console, "A small base model that has read descriptions of Debian packages, but none of the sections games and science,")
    say(console, "learns to describe packages of these two, in the form of a Debian control file. Everything is written to")
    say(console, f"{output}.\n")
    result = train(config, fresh=True, console=console, closing=False)
    opened = open_adapter(result.run.root)
    rows = data_file("test.jsonl").read_text(encoding="utf-8").splitlines()
    for row in ROWS:
        _show(console, rows[row], opened, generate)
    say(console, next_steps(result.run, config))
    say(console, "  rankwise methods            the methods that `method=...` can name")
    say(console, f"  rankwise train {result.run / 'config.yaml'} method=dora output=runs/demo-dora")


def _show(console: Any, row: str, opened: Any, generate: Any) -> None:
    import json

    from rankwise.training.progress import say

    prompt = json.loads(row)["prompt"]
    written = generate(opened, prompt, TOKENS, compare=True)
    console.rule("A package that was not trained on", align="left")
    say(console, f"Prompt   {prompt}")
    for name, text in (("Before", written["base"]), ("After", written["adapter"])):
        say(console, f"{name}\n{text.rstrip()}")
    say(console, "")
