"""What to calibrate and to measure on: a recipe, a file, a folder or a hub dataset, by the name that a user gives."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from gemma_awq_cli.calibration_text.document_files import FILE_KINDS, HINT, JSON, KINDS_NAMED, kind_of
from gemma_awq_cli.calibration_text.document_folder import files_of
from gemma_awq_cli.calibration_text.document_forms import KEYS, Document
from gemma_awq_cli.calibration_text.document_reading import Reading, read_documents
from gemma_awq_cli.calibration_text.hub_dataset import Dataset, read_dataset
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.json_input import parse_json, parse_json_object
from gemma_awq_cli.system.reading import home_path, read_bytes
from gemma_awq_cli.system.text_input import decode, read_text

DEFAULT_RECIPE = "embedded"
SELF = "self"  # rows that the model samples itself; measured on the default recipe's held-out text
EVALUATED = 1 << 28  # bytes: the longest text that is measured on as a whole
_RECIPE_BYTES = 1 << 20
_RECIPE_HINT = "See calibration/recipes for examples."
_PATHS_HINT = "Check the recipe's paths."
_TEXT_KEYS = ("about", "heldout", "dataset", "config", "split", "text_column", "evaluation_split")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Recipe:
    """What to calibrate on: texts of this machine or a hub dataset.

    sources: files or folders; dataset: a hub dataset instead; column: the one that holds the text, None to look for the
    known ones; heldout: a file to measure on, None to keep rows of the sources apart.
    """

    name: str
    sources: tuple[Path, ...] = ()
    dataset: Dataset | None = None
    column: str | None = None
    heldout: Path | None = None

    def description(self) -> str:
        """Return the name, and in brackets what it stands for: a hub dataset, or a folder's number of files."""
        if self.dataset is not None:
            parts = (self.dataset.dataset, self.dataset.config, self.dataset.split)
            return f"{self.name} (hub dataset {', '.join(p for p in parts if p)})"
        if len(self.sources) == 1 and self.sources[0].is_dir():
            count = len(files_of(self.sources[0])[0])
            return f"{self.name} (folder of {count} file{'s' if count != 1 else ''})"
        return self.name


@dataclass(frozen=True)
class Evaluation:
    """Documents to measure on. description: their name in reports; complete: whether the text has no more."""

    documents: list[Document]
    description: str
    complete: bool


def data_folder() -> Path:
    """Return the folder of recipes and texts: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "calibration_data"
    return installed if installed.is_dir() else package.parent / "calibration"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in (data_folder() / "recipes").glob("*.json"))


def find_recipe(
    asked: str, config: str | None = None, split: str | None = None, text_column: str | None = None
) -> Recipe:
    """Return the recipe that a name stands for: a packaged recipe, a recipe file, a text, a folder or a hub dataset.

    config, split: of a hub dataset; text_column: the column or key that holds the text. What exists on this machine is
    never taken for a hub dataset. Raises if there is nothing of that name.
    """
    recipe = _find(asked)
    if recipe.dataset is None and (config is not None or split is not None):
        raise UsageError(f"--dataset-config and --dataset-split need a hub dataset, and {asked} is not one.")
    dataset = recipe.dataset and replace(
        recipe.dataset, config=config or recipe.dataset.config, split=split or recipe.dataset.split
    )
    return replace(recipe, dataset=dataset, column=text_column or recipe.column)


def _find(asked: str) -> Recipe:
    for read in (_packaged_recipe, _folder, _file, _hub_dataset):
        if (recipe := read(asked)) is not None:
            return recipe
    if kind_of(PurePath(asked)) is not None or "/" in asked or os.sep in asked or asked.startswith("~"):
        raise GemmaAwqError(f"{asked} does not exist.", "Check the path.")
    raise GemmaAwqError(
        f"There is no calibration recipe, file or dataset named {asked!r}.",
        f"Recipes: {', '.join(recipe_names())}. Files: {KINDS_NAMED}. Hub datasets: owner/name.",
    )


# The readers of `_find`: each returns the recipe of a name of its kind, None for a name of another kind.


def _packaged_recipe(asked: str) -> Recipe | None:
    return _read_recipe(data_folder() / "recipes" / f"{asked}.json", asked) if asked in recipe_names() else None


def _folder(asked: str) -> Recipe | None:
    path = _local_path(asked)
    return None if path is None or not os.path.isdir(path) else Recipe(path.resolve().name or "folder", (path,))


def _file(asked: str) -> Recipe | None:
    path = _local_path(asked)
    if path is None or not os.path.exists(path):
        return None
    if not os.path.isfile(path):
        raise GemmaAwqError(f"{asked} is neither a file nor a folder.", "Write the text to a file first.")
    if path.suffix.lower() in JSON and _is_recipe(path):
        return _read_recipe(path, path.stem)
    if kind_of(path) is None:
        raise GemmaAwqError(
            f"{asked} is not a supported text file.", f"Give one of {KINDS_NAMED}, a folder, or a recipe."
        )
    return Recipe(path.name, (path,))


def _hub_dataset(asked: str) -> Recipe | None:
    if not _HUB_ID.fullmatch(asked) or kind_of(PurePath(asked)) is not None:
        return None
    owner = asked.split("/")[0]
    if os.path.isdir(owner):  # a mistyped path is likelier than an owner who shares a name with a folder here
        raise GemmaAwqError(
            f"{asked} does not exist in the folder {owner} here.",
            "Check the path; for a hub dataset of that name, run the command from another folder.",
        )
    return Recipe(asked, dataset=Dataset(asked))


def _local_path(asked: str) -> Path | None:
    """Return the path that `asked` may be, None if it cannot be one."""
    return None if not asked.strip() or "\0" in asked else home_path(asked)


def reported_name(asked: str) -> str:
    """Return `asked` for a report: a local folder such that nobody takes it for a hub dataset, all else as it is."""
    path = _local_path(asked)
    if path is None or asked in (SELF, *recipe_names()) or not os.path.isdir(path):
        return asked
    if PurePath(asked).name in ("", ".."):
        return str(path.resolve())
    return f"./{asked}" if _HUB_ID.fullmatch(asked) else asked


def public_name(asked: str) -> str:
    """Return a report's text for strangers: a recipe or hub dataset as it is, of a local path the last part."""
    is_file = asked.lower().endswith((*FILE_KINDS, *(f"{kind}.gz" for kind in FILE_KINDS)))
    if (_HUB_ID.fullmatch(asked) and not is_file) or " (hub dataset " in asked:
        return asked
    return re.split(r"[/\\\\]", asked.rstrip("/\\"))[-1]


def _is_recipe(path: Path) -> bool:
    """Whether a .json file is a recipe, if perhaps a faulty one, and not data."""
    with system_errors(path, HINT):
        if path.stat().st_size > _RECIPE_BYTES:
            return False
    try:
        value = parse_json(decode(read_bytes(path, HINT), path), path, HINT)
    except GemmaAwqError:
        return False  # JSON lines perhaps; reading it says what is wrong
    if not isinstance(value, dict):
        return False
    lists = [items for items in value.values() if isinstance(items, list) and items]
    rows = any(all(isinstance(item, dict | list) for item in items) for items in lists)
    return not rows and not any(isinstance(value.get(key), str) for key in KEYS)


def _read_recipe(path: Path, name: str) -> Recipe:
    raw = parse_json_object(read_text(path, HINT, _RECIPE_BYTES), path, _RECIPE_HINT)
    unknown = set(raw) - {"texts", *_TEXT_KEYS}
    if unknown or ("texts" in raw) == ("dataset" in raw):
        raise GemmaAwqError(
            f"{path} is not a recipe: it needs either texts or dataset"
            + (f", and {', '.join(sorted(unknown)[:8])} is unknown." if unknown else "."),
            _RECIPE_HINT,
        )
    for key in _TEXT_KEYS:
        if raw.get(key) is not None and not (isinstance(raw[key], str) and raw[key].strip()):
            raise GemmaAwqError(f"{path}: {key} must be a text, not {raw[key]!r:.60}.", _RECIPE_HINT)
    return _dataset_recipe(path, name, raw) if "dataset" in raw else _texts_recipe(path, name, raw)


def _dataset_recipe(path: Path, name: str, raw: dict[str, Any]) -> Recipe:
    if not _HUB_ID.fullmatch(raw["dataset"] or ""):
        raise GemmaAwqError(f"{path}: dataset must be an id owner/name, not {raw['dataset']!r}.", _RECIPE_HINT)
    given = {key: raw[key] for key in ("dataset", "config", "split", "evaluation_split") if raw.get(key) is not None}
    return Recipe(name, dataset=Dataset(**given), column=raw.get("text_column"))


def _texts_recipe(path: Path, name: str, raw: dict[str, Any]) -> Recipe:
    texts = raw["texts"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise GemmaAwqError(f"{path}: texts must be a list of file names, not {texts!r:.60}.", _RECIPE_HINT)
    sources = tuple(_beside(path, text) for text in texts)
    heldout = _beside(path, raw["heldout"]) if raw.get("heldout") else None
    return Recipe(name, _existing(path, sources), heldout=heldout and _existing(path, [heldout])[0])


def _beside(recipe: Path, text: str) -> Path:
    """Return the path that a recipe names, relative to the recipe's folder."""
    named = _local_path(text)
    if named is None:
        raise GemmaAwqError(f"{recipe} names {text!r:.60}, which is not a path.", _PATHS_HINT)
    return recipe.parent / named


def _existing(recipe: Path, texts: Iterable[Path]) -> tuple[Path, ...]:
    texts = tuple(texts)
    if missing := [str(text) for text in texts if not (os.path.isfile(text) or os.path.isdir(text))]:
        raise GemmaAwqError(f"{recipe} names texts that are missing: {', '.join(missing[:8])}.", _PATHS_HINT)
    return texts


def evaluation_documents(recipe: Recipe, characters: int | None) -> Evaluation:
    """Return the documents to measure on: the recipe's held-out text, else its texts or dataset's evaluation split.

    characters: about how many to read from the beginning, None for all. Raises for all of a text that is far too long.
    """
    reading = Reading(EVALUATED if characters is None else characters, column=recipe.column)
    if recipe.heldout is not None:
        reading.column = None
        documents, name = read_documents(recipe.heldout, reading), f"{recipe.name}, held-out"
    elif recipe.dataset is not None:
        dataset = replace(recipe.dataset, split=recipe.dataset.evaluation_split or recipe.dataset.split)
        documents = read_dataset(dataset, characters, reading.bad, recipe.column)
        name = replace(recipe, dataset=dataset).description()
    else:
        documents, name = [], recipe.description()
        for source in recipe.sources:
            documents += read_documents(source, reading)
            if not reading.complete:  # the next source does not follow where this one was cut
                break
    if not documents:
        reading.bad.raise_if_any(name)
    if characters is None and not reading.complete:
        raise GemmaAwqError(f"The text {name} has more than {EVALUATED} bytes.", "Measure on less: give --windows.")
    if reading.bad.count:
        name += f", without {reading.bad.count} of {reading.bad.count + len(documents)} rows"
    return Evaluation(documents, name, reading.complete)
