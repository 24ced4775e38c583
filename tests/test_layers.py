"""Every module can be the first one that is imported: no circle of imports waits for somebody to come in by another door."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"


def test_every_module_can_be_imported_first() -> None:
    """In a process each, but for the heavy libraries: a fork with torch loaded that imports one module."""
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in sorted(SOURCE.rglob("*.py"))]
    if find_spec("triton") is None:
        names.remove("rankwise.storage.nf4_triton")  # asked for on a GPU only, and left alone where there is no Triton
    script = (
        "import os, sys, importlib, torch, transformers, trl\n"
        "failed = 0\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException as error:\n"
        "            print(f'{name}: {error!r}', flush=True)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    failed |= os.waitpid(child, 0)[1]\n"
        "sys.exit(bool(failed))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
