"""What to calibrate and to measure on: a recipe, a file, a folder or a hub dataset, by the name that a user gives."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from gemma_awq_cli.calibration_text.document_files import FILE_KINDS, HINT, JSON, KINDS_NAMED, kind_of
from gemma_awq_cli.calibration_text.document_folder import files_of
from gemma_awq_cli.calibration_text.document_forms import KEYS, Document
from gemma_awq_cli.calibration_text.document_reading import Wanted, read_documents
from gemma_awq_cli.calibration_text.hub_dataset import Dataset, read_dataset
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.json_input import parse_json, parse_json_object
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.text_input import decode, read_text

DEFAULT_RECIPE = "embedded"
SELF = "self"  # rows that the model samples itself; measured on the default recipe's held-out text
EVALUATED = 1 << 28  # bytes of a text that is measured on as a whole
_RECIPE_BYTES = 1 << 20
_RECIPE_HINT = "See the recipes in calibration/recipes for the form."
_TEXT_KEYS = ("about", "heldout", "dataset", "config", "split", "text_column", "evaluation_split")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Recipe:
    """What to calibrate on. sources: files or folders, or one hub dataset; heldout: a file to measure on, if any."""

    name: str
    sources: tuple[Path, ...] = ()
    dataset: Dataset | None = None
    heldout: Path | None = None

    @property
    def column(self) -> str | None:
        """The column that holds the text, if a user named it."""
        return self.dataset.text_column if self.dataset else None

    def described(self) -> str:
        """The name, and what is read if it does not say that."""
        if self.dataset is not None and self.dataset.dataset:
            parts = (self.dataset.dataset, self.dataset.config, self.dataset.split)
            return f"{self.name} (hub dataset {', '.join(p for p in parts if p)})"
        if len(self.sources) == 1 and self.sources[0].is_dir():
            count = len(files_of(self.sources[0])[0])
            return f"{self.name} (folder of {count} file{'s' if count != 1 else ''})"
        return self.name


@dataclass(frozen=True)
class Evaluation:
    """Documents to measure on, and what to call them. complete: whether there are no more."""

    documents: list[Document]
    description: str
    complete: bool


def data_folder() -> Path:
    """The folder of recipes and texts: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "calibration_data"
    return installed if installed.is_dir() else package.parent / "calibration"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (data_folder() / "recipes").glob("*.json"))


def find_recipe(
    asked: str, config: str | None = None, split: str | None = None, text_column: str | None = None
) -> Recipe:
    """A recipe name, a recipe file, a file or a folder of texts, or a hub dataset id -> its recipe.

    What exists here is never taken for a hub dataset.
    """
    recipe = _find(asked)
    if config is None and split is None and text_column is None:
        return recipe
    if recipe.dataset is None and (config is not None or split is not None):
        raise UsageError(f"--dataset-config and --dataset-split go with a hub dataset, and {asked} is none.")
    base = recipe.dataset or Dataset("")
    dataset = replace(
        base, config=config or base.config, split=split or base.split, text_column=text_column or base.text_column
    )
    return replace(recipe, dataset=dataset)


def _find(asked: str) -> Recipe:
    if asked in recipe_names():
        return _read_recipe(data_folder() / "recipes" / f"{asked}.json", asked)
    path = _local(asked)
    if path is not None and os.path.isdir(path):
        return Recipe(path.resolve().name or "folder", (path,))
    if path is not None and os.path.isfile(path):
        if path.suffix.lower() in JSON and _is_recipe(path):
            return _read_recipe(path, path.stem)
        if kind_of(path) is None:
            raise GemmaAwqError(
                f"{asked} is not a text this tool reads.", f"Give one of {KINDS_NAMED}, a folder, or a recipe."
            )
        return Recipe(path.name, (path,))
    if path is not None and os.path.exists(path):
        raise GemmaAwqError(f"{asked} is neither a file nor a folder.", "Write the text to a file first.")
    if _HUB_ID.fullmatch(asked) and kind_of(PurePath(asked)) is None:
        owner = asked.split("/")[0]
        if os.path.isdir(owner):  # a path with a slip is likelier than an owner that is called as a folder here
            raise GemmaAwqError(
                f"{asked} does not exist in the folder {owner} here.",
                "Check the path; for a hub dataset of that name, run the command from another folder.",
            )
        return Recipe(asked, dataset=Dataset(asked))
    if kind_of(PurePath(asked)) is not None or "/" in asked or os.sep in asked or asked.startswith("~"):
        raise GemmaAwqError(f"{asked} does not exist.", "Check the path.")
    raise GemmaAwqError(
        f"No calibration recipe, file or dataset is called {asked!r}.",
        f"Recipes: {', '.join(recipe_names())}. Files: {KINDS_NAMED}. Hub datasets: owner/name.",
    )


def _local(asked: str) -> Path | None:
    """The path that `asked` is, None if it can be none."""
    if not asked.strip() or "\0" in asked:
        return None
    try:
        return Path(asked).expanduser()
    except RuntimeError:  # the home of nobody
        return None


def spelled(asked: str) -> str:
    """`asked` for the report: a local folder such that nobody takes it for a hub dataset, all else as it is."""
    path = _local(asked)
    if path is None or asked in (SELF, *recipe_names()) or not os.path.isdir(path):
        return asked
    if PurePath(asked).name in ("", ".."):
        return str(path.resolve())
    return f"./{asked}" if _HUB_ID.fullmatch(asked) else asked


def public_name(asked: str) -> str:
    """What a report says was calibrated on, for strangers: a recipe or hub dataset as it is, a path's last part."""
    is_file = asked.lower().endswith((*FILE_KINDS, *(f"{kind}.gz" for kind in FILE_KINDS)))
    if (_HUB_ID.fullmatch(asked) and not is_file) or " (hub dataset " in asked:
        return asked
    return re.split(r"[/\\\\]", asked.rstrip("/\\"))[-1]


def _is_recipe(path: Path) -> bool:
    """Whether a .json file is a recipe, or means to be, rather than data."""
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
            raise GemmaAwqError(f"{path}: {key} is {raw[key]!r:.60}, and no text.", _RECIPE_HINT)
    if "dataset" in raw:
        if not _HUB_ID.fullmatch(raw["dataset"] or ""):
            raise GemmaAwqError(f"{path}: dataset is {raw['dataset']!r}, and no id owner/name.", _RECIPE_HINT)
        named = {key: raw[key] for key in _TEXT_KEYS[2:] if raw.get(key) is not None}
        return Recipe(name, dataset=Dataset(**named))
    texts = raw["texts"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise GemmaAwqError(f"{path}: texts is {texts!r:.60}, and no list of file names.", _RECIPE_HINT)
    sources = tuple(_beside(path, text) for text in texts)
    heldout = _beside(path, raw["heldout"]) if raw.get("heldout") else None
    return Recipe(name, _existing(path, sources), heldout=heldout and _existing(path, [heldout])[0])


def _beside(recipe: Path, text: str) -> Path:
    named = _local(text)
    if named is None:
        raise GemmaAwqError(f"{recipe} names {text!r:.60}, and that is no path.", "Check the recipe's paths.")
    return recipe.parent / named


def _existing(recipe: Path, texts: Iterable[Path]) -> tuple[Path, ...]:
    texts = tuple(texts)
    if missing := [str(text) for text in texts if not (os.path.isfile(text) or os.path.isdir(text))]:
        raise GemmaAwqError(
            f"{recipe} names texts that are missing: {', '.join(missing[:8])}.", "Check the recipe's paths."
        )
    return texts


def evaluation_documents(recipe: Recipe, characters: int | None) -> Evaluation:
    """What is measured on with this recipe: its held-out text, else all its texts or its dataset's evaluation split.

    characters: about so many from the beginning; None: all, and an error if that is far too much.
    """
    wanted = Wanted(EVALUATED if characters is None else characters, column=recipe.column)
    if recipe.heldout is not None:
        wanted.column = None
        documents, name = read_documents(recipe.heldout, wanted), f"{recipe.name}, held-out"
    elif recipe.dataset is not None and recipe.dataset.dataset:
        dataset = replace(recipe.dataset, split=recipe.dataset.evaluation_split or recipe.dataset.split)
        documents = read_dataset(dataset, characters, wanted.bad)
        name = replace(recipe, dataset=dataset).described()
    else:
        documents, name = [], recipe.described()
        for source in recipe.sources:
            documents += read_documents(source, wanted)
            if not wanted.complete:  # what follows it is not this text's next
                break
    if not documents:
        wanted.bad.refuse_all(name)
    if characters is None and not wanted.complete:
        raise GemmaAwqError(f"The text {name} has more than {EVALUATED} bytes.", "Measure on less: give --windows.")
    if wanted.bad.count:
        name += f", without {wanted.bad.count} of {wanted.bad.count + len(documents)} rows"
    return Evaluation(documents, name, wanted.complete)
