"""Adapters on disk: native save and load, PEFT's layout both ways, atomic writes, and the exact state of a run."""

from rankwise.checkpoint.atomic import write_file, write_folder
from rankwise.checkpoint.loading import load
from rankwise.checkpoint.portable import export_lora
from rankwise.checkpoint.saving import save
from rankwise.checkpoint.state import load_trainable_state, trainable_state

__all__ = ["export_lora", "load", "load_trainable_state", "save", "trainable_state", "write_file", "write_folder"]
