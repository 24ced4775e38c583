"""LoRA-drop beside plain LoRA: the section classifier on MiniLM, short rows, one seed; and what each threshold would leave.

    python -m benchmarks.lora_drop [STEPS] [OUTPUT.json]

Prints and writes accuracy and loss on the held-out rows, adapter numbers, and what other thresholds would leave by the same report.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import rankwise as rw
from rankwise.training.run import train
from rankwise.training.use import open_adapter

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)


def main(steps: int, output: Path) -> None:
    made: dict[str, Any] = {"steps": steps, "runs": {}}
    example = str(Path(__file__).parents[1] / "examples" / "sections.yaml")
    with tempfile.TemporaryDirectory() as folder:
        for method in ("lora", "lora-drop"):
            root = f"{folder}/{method}"
            short = ["train.batch_size=16", "train.max_length=32"]
            done = train(example, [f"method={method}", f"train.steps={steps}", f"output={root}", *short])
            model = open_adapter(root).model
            plan = model.rankwise.plan
            made["runs"][method] = {"adapter_parameters": plan.adapter_parameters, "before": done.before, "after": done.after}
            if plan.importance is not None:
                made["importance"] = json.loads(Path(root, "importance.json").read_text())["scores"]
                rw.unadapt(model)
                whole = rw.plan(model, plan.recipe)
                made["adapter_parameters_at_threshold"] = {
                    drop: {str(t): rw.allocate(whole, plan.importance, t, drop).adapter_parameters for t in THRESHOLDS}
                    for drop in ("share", "remove")
                }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps({key: value for key, value in made.items() if key != "importance"}, indent=2))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 60, Path(given[1] if len(given) > 1 else "benchmarks/results/lora_drop_minilm.json"))
