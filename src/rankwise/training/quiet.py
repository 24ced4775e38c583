"""Silences what other libraries print, so that every line of a run is ours."""

import logging
import os
import warnings

_NOISY = ("transformers", "datasets", "trl", "accelerate", "peft", "bitsandbytes", "huggingface_hub", "torch.utils.checkpoint")


def quiet() -> None:
    """To be called before these libraries are imported: some of them speak while they are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|datasets|peft|torch)(\.|$)")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
