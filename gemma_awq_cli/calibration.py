"""Calibration rows: from a recipe, a file or a hub dataset to token rows that each begin with BOS.

Documents of one source are joined and cut into windows of `seq_len - 1` tokens, so that no long document is dropped
and no short one is lost; every window then gets its own BOS. Which windows are taken is decided by the seed alone.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.prompting import Message, Prompter

DEFAULT_RECIPE = "embedded"
SELF = "self"  # rows that the model samples itself; measured on the default recipe's held-out text
FILE_KINDS = (".txt", ".jsonl", ".parquet")
Document = str | list[Message]


@dataclass(frozen=True)
class Dataset:
    """A hub dataset as a recipe names it. evaluation_split: what is measured on by itself, if not `split`."""

    dataset: str
    config: str | None = None
    split: str = "train"
    text_column: str | None = None
    evaluation_split: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What to calibrate on. sources: files, or one hub dataset; heldout: a file to measure on, if any."""

    name: str
    sources: tuple[Path, ...] = ()
    dataset: Dataset | None = None
    heldout: Path | None = None


@dataclass(frozen=True)
class Rows:
    """ids: [R, S] int64, each row from BOS; heldout: the same for rows that are only measured on.

    text_sha256: of the calibration rows' ids; description: what a person should read of where they come from.
    """

    ids: Tensor
    heldout: Tensor
    text_sha256: str
    heldout_sha256: str
    description: str


def data_folder() -> Path:
    """The folder of recipes and texts: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    installed = package / "calibration_data"
    return installed if installed.is_dir() else package.parent / "calibration"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (data_folder() / "recipes").glob("*.json"))


def find_recipe(
    asked: str, config: str | None = None, split: str | None = None, text_column: str | None = None
) -> Recipe:
    """A recipe name, a recipe file, a text file, or a hub dataset id -> its recipe."""
    named = data_folder() / "recipes" / f"{asked}.json"
    path = Path(asked).expanduser()
    if named.is_file():
        recipe = _read_recipe(named, asked)
    elif path.suffix == ".json" and path.is_file():
        recipe = _read_recipe(path, path.stem)
    elif path.suffix in FILE_KINDS and path.is_file():
        recipe = Recipe(path.name, (path,))
    elif path.is_file():
        raise GemmaAwqError(
            f"{asked} is not a text this tool reads.", f"Give a {', '.join(FILE_KINDS)} or .json recipe."
        )
    elif path.suffix in (*FILE_KINDS, ".json") or path.is_absolute() or asked.count("/") > 1:
        raise GemmaAwqError(f"{asked} does not exist.", "Check the path.")
    elif "/" in asked:
        recipe = Recipe(asked, dataset=Dataset(asked))
    else:
        raise GemmaAwqError(
            f"No calibration recipe, file or dataset is called {asked!r}.",
            f"Recipes: {', '.join(recipe_names())}. Files: {', '.join(FILE_KINDS)}. Hub datasets: owner/name.",
        )
    if config is None and split is None and text_column is None:
        return recipe
    if recipe.dataset is None and (config is not None or split is not None):
        raise UsageError(f"--dataset-config and --dataset-split go with a hub dataset, and {asked} is none.")
    base = recipe.dataset or Dataset("")
    dataset = Dataset(base.dataset, config or base.config, split or base.split, text_column or base.text_column)
    return Recipe(recipe.name, recipe.sources, dataset, recipe.heldout)


def _read_recipe(path: Path, name: str) -> Recipe:
    from gemma_awq_cli.models.files import read_json

    raw = read_json(path)
    unknown = set(raw) - {"about", "texts", "heldout", "dataset", "config", "split", "text_column", "evaluation_split"}
    if unknown or ("texts" in raw) == ("dataset" in raw):
        raise GemmaAwqError(
            f"{path} is not a recipe: it needs either texts or dataset"
            + (f", and {', '.join(sorted(unknown))} is unknown." if unknown else "."),
            "See the recipes in calibration/recipes for the form.",
        )
    if "dataset" in raw:
        dataset = Dataset(
            raw["dataset"], raw.get("config"), raw.get("split", "train"), raw.get("text_column"),
            raw.get("evaluation_split"),
        )  # fmt: skip
        return Recipe(name, dataset=dataset)
    sources = tuple(path.parent / text for text in raw["texts"])
    if missing := [str(source) for source in sources if not source.is_file()]:
        raise GemmaAwqError(f"{path} names texts that are missing: {', '.join(missing)}.", "Check the recipe's paths.")
    heldout = path.parent / raw["heldout"] if raw.get("heldout") else None
    return Recipe(name, sources, heldout=heldout)


def build_rows(
    recipe: Recipe, prompter: Prompter, num_samples: int, seq_len: int, seed: int, heldout_samples: int
) -> Rows:
    """Token rows of a recipe. Fewer than `num_samples` if the text has no more; an error if it has none to spare."""
    windows = []
    for source in _sources(recipe, num_samples, seq_len):
        windows.append(_windows(source, prompter, seq_len))
    rng = random.Random(seed)
    for own in windows:
        rng.shuffle(own)
    chosen = _interleave(windows)
    if recipe.heldout is not None:
        heldout = _windows(_read_file(recipe.heldout, None), prompter, seq_len)[:heldout_samples]
    else:
        # no text of its own to measure on: some windows are kept out of the calibration
        spare = min(heldout_samples, max(1, len(chosen) // 5))
        heldout, chosen = chosen[:spare], chosen[spare:]
    if not chosen or not heldout:
        tokens = sum(len(own) for own in windows) * (seq_len - 1)
        raise GemmaAwqError(
            f"The calibration text {recipe.name!r} is too short: {tokens} tokens in whole windows, and at least two "
            f"of {seq_len} are needed (one to calibrate, one to measure).",
            "Give a longer text, or a smaller --seq-len.",
        )
    chosen = chosen[:num_samples]
    ids, heldout_ids = torch.tensor(chosen), torch.tensor(heldout)
    return Rows(ids, heldout_ids, hash_rows(ids), hash_rows(heldout_ids), _describe(recipe))


def evaluation_documents(recipe: Recipe, characters: int | None) -> tuple[list[Document], str]:
    """What is measured on with this recipe, and what to call it: its held-out text, else all its texts or its dataset's
    evaluation split, of a dataset about the first `characters` (None: all).
    """
    if recipe.heldout is not None:
        return _read_file(recipe.heldout, None), f"{recipe.name}, held-out"
    column = recipe.dataset.text_column if recipe.dataset else None
    documents = [document for path in recipe.sources for document in _read_file(path, column)]
    if recipe.dataset is not None and recipe.dataset.dataset:
        dataset = replace(recipe.dataset, split=recipe.dataset.evaluation_split or recipe.dataset.split)
        documents += _read_dataset(dataset, characters)
        recipe = replace(recipe, dataset=dataset)
    return documents, _describe(recipe)


def hash_rows(ids: Tensor) -> str:
    """SHA-256 of token rows."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()


def _describe(recipe: Recipe) -> str:
    if recipe.dataset is not None and recipe.dataset.dataset:
        parts = (recipe.dataset.dataset, recipe.dataset.config, recipe.dataset.split)
        return f"{recipe.name} (hub dataset {', '.join(p for p in parts if p)})"
    return recipe.name


def _windows(documents: Sequence[Document], prompter: Prompter, seq_len: int) -> list[list[int]]:
    """The documents' tokens, joined and cut into rows of BOS and `seq_len - 1` tokens; the rest at the end is left."""
    tokens: list[int] = []
    separator = prompter.ids("\n\n")
    for document in documents:
        if isinstance(document, str):
            ids = prompter.ids(document)
        elif prompter.is_chat:
            ids = prompter.ids(prompter.chat(document, answer_next=False))
        else:
            ids = prompter.ids("\n\n".join(message["content"] for message in document))
        tokens += ids + separator
    rows = []
    start = 0
    while start < len(tokens):
        # a window that begins with a conversation brings its own BOS
        head = [] if tokens[start] == prompter.bos else [prompter.bos]
        row = head + tokens[start : start + seq_len - len(head)]
        if len(row) == seq_len:
            rows.append(row)
        start += seq_len - len(head)
    return rows


def _interleave(groups: Sequence[list[list[int]]]) -> list[list[int]]:
    """All windows in one order in which every prefix holds each source in proportion to its size."""
    placed = [((i + 0.5) / len(own), index, row) for index, own in enumerate(groups) for i, row in enumerate(own)]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def _sources(recipe: Recipe, num_samples: int, seq_len: int) -> Iterator[list[Document]]:
    column = recipe.dataset.text_column if recipe.dataset else None
    for path in recipe.sources:
        yield _read_file(path, column)
    if recipe.dataset is not None and recipe.dataset.dataset:
        yield _read_dataset(recipe.dataset, characters=num_samples * seq_len * 8)


def _read_file(path: Path, column: str | None) -> list[Document]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            return [_document(row, column, str(path)) for row in table.to_pylist()]
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GemmaAwqError(f"{path} is not UTF-8 text: {error}.", "Convert it to UTF-8.") from None
    except OSError as error:
        raise GemmaAwqError(f"{path} cannot be read: {error}.", "Check the path and its permissions.") from None
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise GemmaAwqError(f"{path} is not a readable parquet file: {error}.", "Write it again.") from None
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise GemmaAwqError(f"{path}, line {number} is not JSON: {error}.", "One JSON object a line.") from None
            documents.append(_document(row, column, f"{path}, line {number}"))
    return documents


def _document(row: Any, column: str | None, where: str) -> Document:
    """A row's text, conversation, or prompt and response."""
    if isinstance(row, dict):
        if column is not None:
            value = row.get(column)
            if isinstance(value, str):
                return value
            if isinstance(value, list):
                row = {"messages": value}
            else:
                raise GemmaAwqError(f"{where} has no text column {column!r}.", f"It has: {', '.join(row)}.")
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
            return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        messages = row.get("messages")
        if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
            return [{"role": m["role"], "content": m["content"]} for m in messages]
    raise GemmaAwqError(
        f"{where} has neither text, nor prompt and response, nor messages with role and content.",
        "Name another column with --text-column.",
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and isinstance(value.get("role"), str)


def _read_dataset(dataset: Dataset, characters: int | None) -> list[Document]:
    """The first documents of a hub dataset, streamed: about `characters` of them, enough for the rows asked for."""
    import datasets

    # the HTTP library of the installed client: httpx up to 1.x, httpx2 after it
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    documents: list[Document] = []
    size = 0
    try:
        stream = datasets.load_dataset(dataset.dataset, dataset.config, split=dataset.split, streaming=True)
        for row in stream:
            document = _document(row, dataset.text_column, f"dataset {dataset.dataset}")
            length = len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
            if length:
                documents.append(document)
            size += length
            if characters is not None and size >= characters:
                break
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise GemmaAwqError(
            f"The dataset {dataset.dataset} cannot be read: {error}",
            "Check its id, --dataset-config, --dataset-split and the network, or use the embedded calibration.",
        ) from None
    return documents
