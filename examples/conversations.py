"""Conversations to fine-tune on, for the scripts beside this file."""

from pathlib import Path

from datasets import Dataset, load_dataset

FORMAT = """
DATA is a dataset on the hub with a column `messages`, as UltraChat has, or a file of JSON lines:
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
The tokenizer's chat template makes texts of them.
"""


def conversations(data: str, split: str) -> Dataset:
    """The conversations of a file or of a hub dataset."""
    if Path(data).is_file():
        return load_dataset("json", data_files=data, split="train")
    return load_dataset(data, split=split)
