"""The files of an artifact beside its tensors and its config: their exact names, and copying them from a source.

All other files of a source folder stay there: nobody knows what they are.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from gemma_awq_cli.models.checkpoints.files import CONFIG, INDEX, SINGLE, read_json, require_inside
from gemma_awq_cli.models.checkpoints.local_paths import to_json, without_local_paths
from gemma_awq_cli.system.reading import require_regular

# As transformers writes them, and as the hub's Gemma repositories have them
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_TERMS = ("TERMS", "TERMS_OF_USE", "GEMMA_TERMS", "GEMMA_TERMS_OF_USE", "GEMMA-TERMS-OF-USE")
_POLICIES = ("USE_POLICY", "PROHIBITED_USE_POLICY", "GEMMA_PROHIBITED_USE_POLICY")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "Notice", "COPYING", "GEMMA_LICENSE", *_TERMS, *_POLICIES)
LICENCE_FILES = (
    *(f"{stem}{ending}" for stem in _LICENCES for ending in ("", ".txt", ".md", ".html")),
    "LICENSE-apache-2.0", "LICENSE-APACHE", "LICENSE-MIT", "License", "license", "license.txt", "license.md",
    "License.txt", "License.md", "notice.txt", "notice.md", "LICENSE.rst", "LICENSE.gemma", "LICENSE_GEMMA",
)  # fmt: skip
SIDE_FILES = frozenset((*TOKENIZER_FILES, *LICENCE_FILES))
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

# Left by systems and by programs that copy folders. They belong to no model and are ignored.
_LEFTOVERS = frozenset((
    ".DS_Store", ".AppleDouble", ".LSOverride", ".Spotlight-V100", ".Trashes", ".fseventsd", ".TemporaryItems",
    ".DocumentRevisions-V100", ".VolumeIcon.icns", "__MACOSX", "Icon\r", "Thumbs.db", "Thumbs.db:encryptable",
    "ehthumbs.db", "desktop.ini", "Desktop.ini", "$RECYCLE.BIN", ".directory", "System Volume Information",
    ".ipynb_checkpoints", "@eaDir",
))  # fmt: skip
_LEFTOVER_NAMES = re.compile(r"\._.+|\.Trash-\d+|\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+|.+:Zone\.Identifier")
# Files of a source that need no mention when they are not copied: those written anew, those of the hub's page, and
# other forms of the same weights
_WRITTEN_ANEW = frozenset((CONFIG, INDEX, SINGLE, "README.md", ".gitattributes", ".gitignore", ".git", ".cache"))
_OTHER_WEIGHTS = re.compile(r".*\.(safetensors|bin|gguf|pt|pth|h5|msgpack|onnx|ot|index\.json)", re.IGNORECASE)


def is_leftover(name: str) -> bool:
    """Whether a file or folder was left by an operating system."""
    return name in _LEFTOVERS or _LEFTOVER_NAMES.fullmatch(name) is not None


def is_licence_file(name: str) -> bool:
    return name in LICENCE_FILES


def side_files(folder: Path) -> dict[str, Path | bytes]:
    """A checkpoint's tokenizer, chat template, generation config, processor and licence files, by name.

    JSON that contains paths of this machine is given as bytes without them, everything else as the file's path. An
    error for a link that leads out of the folder, for anything but a regular file, and for invalid JSON.
    """
    gathered: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in SIDE_FILES or (path.is_dir() and not path.is_symlink()):
            continue
        require_inside(folder, path)
        require_regular(path, "Remove it from the folder, or put a regular file there.")
        gathered[path.name] = path
        if path.suffix == ".json" and path.name not in VOCABULARIES:
            cleaned, changed = without_local_paths(read_json(path))
            if changed:
                gathered[path.name] = to_json(cleaned)
    return gathered


def copy_side_files(gathered: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write the result of `side_files` into an artifact."""
    for name, content in gathered.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def not_copied(folder: Path) -> list[str]:
    """Names in a source folder that the user should know an artifact will not have; weights do not count."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if (path.name not in SIDE_FILES or path.is_dir())
        and path.name not in _WRITTEN_ANEW
        and not is_leftover(path.name)
        and not _OTHER_WEIGHTS.fullmatch(path.name)
    ]
