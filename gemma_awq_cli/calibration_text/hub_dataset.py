"""The first documents of a hub dataset, streamed through the datasets library."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gemma_awq_cli.calibration_text.document_files import Row
from gemma_awq_cli.calibration_text.document_forms import Document
from gemma_awq_cli.calibration_text.document_reading import BadRows, Wanted, documents_of
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import VALIDATION_ERRORS, first_line


@dataclass(frozen=True)
class Dataset:
    """A hub dataset as a recipe names it. evaluation_split: what is measured on by itself, if not `split`."""

    dataset: str
    config: str | None = None
    split: str = "train"
    text_column: str | None = None
    evaluation_split: str | None = None


def read_dataset(dataset: Dataset, characters: int | None, bad: BadRows) -> list[Document]:
    """The first documents of a dataset that say anything, up to about so many characters, None for all."""
    if os.path.exists(dataset.dataset):  # the library would read it in the hub's stead
        raise GemmaAwqError(
            f"{dataset.dataset} is a file or a folder here, and no hub dataset.",
            f"Give it as --calibration ./{dataset.dataset}, or run the command from another folder.",
        )
    documents: list[Document] = []
    size = 0
    wanted = Wanted(0, column=dataset.text_column, bad=bad)
    for document in documents_of(f"The dataset {dataset.dataset}", _rows(dataset), wanted):
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
    """Turn what the libraries below raise over a dataset, its files or the network into an error that names it."""
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
