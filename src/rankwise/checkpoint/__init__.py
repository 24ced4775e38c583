"""Adapters on disk: native save and load, PEFT's layout both ways."""
