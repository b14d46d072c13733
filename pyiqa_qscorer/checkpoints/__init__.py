"""Checkpoints: fetched from the Hub or read from a folder, in any layout, and written."""

from .layouts import CheckpointFolder, Layout, recognise
from .load import LoadedCheckpoint, Precision, half_precision, load_checkpoint, load_folder
from .new_folder import SavedLayout
from .save import merge_checkpoint, save_folder, save_lora_folder
from .source import CheckpointSource

__all__ = [
    "CheckpointFolder",
    "CheckpointSource",
    "Layout",
    "LoadedCheckpoint",
    "Precision",
    "SavedLayout",
    "half_precision",
    "load_checkpoint",
    "load_folder",
    "merge_checkpoint",
    "recognise",
    "save_folder",
    "save_lora_folder",
]
