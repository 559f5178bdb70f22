"""The first documents of a hub dataset, streamed through the datasets library."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from gemma_awq_cli.calibration_text.document_files import Row
from gemma_awq_cli.calibration_text.document_forms import Document
from gemma_awq_cli.calibration_text.document_reading import BadRows, Reading, documents_from_rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.failures import VALIDATION_ERRORS, first_line


@dataclass(frozen=True)
class Dataset:
    """A hub dataset as a recipe names it. evaluation_split: the split to measure on, if it is not `split`."""

    dataset: str
    config: str | None = None
    split: str = "train"
    evaluation_split: str | None = None


def read_dataset(dataset: Dataset, characters: int | None, bad: BadRows, column: str | None = None) -> list[Document]:
    """Return a dataset's first documents that are not empty.

    characters: about how many to read, None for all; bad: collects the rows that cannot be used; column: the one that
    holds the text, None to look for the known ones. Raises if the dataset cannot be read.
    """
    if os.path.exists(dataset.dataset):  # the library would read it instead of the hub's
        raise GemmaAwqError(
            f"{dataset.dataset} is a file or a folder here, so it cannot name a hub dataset.",
            f"Give it as --calibration ./{dataset.dataset}, or run the command from another folder.",
        )
    if find_spec("datasets") is None:
        raise GemmaAwqError(
            f"{dataset.dataset} is a hub dataset, and reading it needs the library datasets, which is not installed.",
            f"{install_hint('datasets')}. Or give text of your own.",
        )
    documents: list[Document] = []
    size = 0
    reading = Reading(0, column=column, bad=bad)
    for document in documents_from_rows(f"The dataset {dataset.dataset}", _rows(dataset), reading):
        if document.characters:
            documents.append(document)
        size += document.characters
        if characters is not None and size >= characters:
            break
    return documents


def _rows(dataset: Dataset) -> Iterator[Row]:
    with _dataset_errors(dataset.dataset):
        import datasets

        stream = datasets.load_dataset(dataset.dataset, dataset.config, split=dataset.split, streaming=True)
        rows = iter(stream)
    number = 0
    while True:
        with _dataset_errors(dataset.dataset):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"dataset {dataset.dataset}, row {number}", row


@contextmanager
def _dataset_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise over a dataset, its files or the network into an error that names the dataset."""
    import datasets
    import pyarrow
    import yaml

    # the HTTP library of the installed client: httpx up to 1.x, httpx2 after it
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    libraries = (datasets.exceptions.DatasetsError, httpx.HTTPError, pyarrow.lib.ArrowException, yaml.YAMLError)
    try:
        yield
    except (*VALIDATION_ERRORS, *libraries) as error:
        raise GemmaAwqError(
            f"The dataset {name} cannot be read: {first_line(error)}",
            "Check its id, --dataset-config, --dataset-split and the network, or use the embedded calibration.",
        ) from error
