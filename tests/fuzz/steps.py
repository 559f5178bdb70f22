"""What is done to a folder: every function is one kind of damage, applied to a file below it.

A step that finds nothing to act on, because an earlier one took it away, does nothing.
"""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz import hostile
from tests.fuzz.cases import Step

Key = str | int
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
          "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip


def apply(folder: Path, steps: list[Step]) -> None:
    """All steps, in order."""
    for name, *arguments in steps:
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):  # what an earlier one took away
            STEPS[name](folder, *arguments)


# Nodes of JSON files


def set_node(folder: Path, file: str, path: list[Key], value: Any) -> None:
    def change(holder: Any, key: Key) -> None:
        holder[key] = value

    _edit(folder / file, path, change)


def delete_node(folder: Path, file: str, path: list[Key]) -> None:
    def change(holder: Any, key: Key) -> None:
        del holder[key]

    _edit(folder / file, path, change)


def rename_node(folder: Path, file: str, path: list[Key], name: str) -> None:
    def change(holder: Any, key: Key) -> None:
        if isinstance(holder, dict):
            holder[name] = holder.pop(key)

    _edit(folder / file, path, change)


def double_node(folder: Path, file: str, path: list[Key], value: Any = None) -> None:
    """A list's element twice; a key twice in the same object, with another value the second time."""
    target = folder / file

    def change(holder: Any, key: Key) -> None:
        if isinstance(holder, list):
            holder.insert(int(key), holder[int(key)])
        else:
            holder["\x01twice"] = value

    _edit(target, path, change)
    if _is_small(target) and path and isinstance(path[-1], str):
        data = target.read_bytes()
        target.write_bytes(data.replace(b'"\\u0001twice"', json.dumps(path[-1]).encode()))


def _edit(target: Path, path: list[Key], change: Callable[[Any, Key], None]) -> None:
    line = None
    if target.suffix == ".jsonl" and path and isinstance(path[0], int):
        line, *path = path
    if not _is_small(target):
        return
    where = int(line) if line is not None else 0
    try:
        text = target.read_text(encoding="utf-8", errors="surrogatepass")
        lines = text.split("\n") if line is not None else [text]
        document = json.loads(lines[where])
        if not path:
            holder: Any = [document]
            change(holder, 0)
            document = holder[0] if holder else {"$raw": ""}
        else:
            holder = document
            for key in path[:-1]:
                holder = holder[key]
            change(holder, path[-1])
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    made = hostile.to_json(document)
    lines[where] = made.replace("\n", "") if line is not None else made
    target.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


# Bytes of any file


def truncate(folder: Path, file: str, size: int) -> None:
    _rewrite(folder / file, lambda data: data[: max(0, size)])


def flip(folder: Path, file: str, offset: int, bit: int) -> None:
    def change(data: bytes) -> bytes:
        if not data:
            return data
        changed = bytearray(data)
        changed[offset % len(data)] ^= 1 << bit
        return bytes(changed)

    _rewrite(folder / file, change)


def splice(folder: Path, file: str, offset: int, count: int, text: Any) -> None:
    """Other bytes in the place of `count` of them."""
    data = hostile.to_bytes(text)
    _rewrite(folder / file, lambda old: old[:offset] + data + old[offset + count :])


def replace(folder: Path, file: str, old: str, new: Any) -> None:
    _rewrite(folder / file, lambda data: data.replace(old.encode(), hostile.to_bytes(new), 1))


def prepend(folder: Path, file: str, text: Any) -> None:
    _rewrite(folder / file, lambda data: hostile.to_bytes(text) + data)


def append(folder: Path, file: str, text: Any) -> None:
    _rewrite(folder / file, lambda data: data + hostile.to_bytes(text))


def write(folder: Path, file: str, text: Any) -> None:
    _clear(folder / file)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(hostile.to_bytes(text))


def recode(folder: Path, file: str, codec: str) -> None:
    _rewrite(folder / file, lambda data: data.decode("utf-8", "replace").encode(codec, "replace"))


def _rewrite(target: Path, change: Callable[[bytes], bytes]) -> None:
    if _is_small(target):
        target.write_bytes(change(target.read_bytes()))


# Safetensors


def header(folder: Path, file: str, path: list[Key], value: Any) -> None:
    """Set a node of the header, or delete it if the value is `{"$delete": true}`; the data stays as it is."""
    parts = _tensors_of(folder / file)
    if parts is None:
        return
    document, data = parts
    holder: Any = document
    try:
        for key in path[:-1]:
            holder = holder[key]
        if value == {"$delete": True}:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
    except (LookupError, TypeError):
        return
    _write_tensors(folder / file, document, data)


def header_length(folder: Path, file: str, length: int) -> None:
    """A false length before the header."""
    _rewrite(folder / file, lambda data: struct.pack("<Q", length % 2**64) + data[8:])


def tensor(folder: Path, file: str, name: str, dtype: str, shape: list[int], fill: str) -> None:
    """A tensor as a well-formed file would hold it, in the place of the one of that name if there is one.

    fill: a byte in hex that its data repeats, or `keep`: what it held, cut or repeated to the new size.
    """
    parts = _tensors_of(folder / file)
    if parts is None:
        return
    document, data = parts
    count = 1
    for size in shape:
        count *= size
    size = count * WIDTHS[dtype]
    if not 0 <= size <= 2**24:
        return
    old = document.get(name)
    held = data[slice(*old["data_offsets"])] if isinstance(old, dict) else b""
    new = (held * (size // max(1, len(held)) + 1))[:size] if fill == "keep" and held else bytes.fromhex(
        "3c" if fill == "keep" else fill) * size  # fmt: skip
    pieces, offset = [], 0
    rest = {key: entry for key, entry in document.items() if key not in ("__metadata__", name)}
    for entry in rest.values():
        piece = data[slice(*entry["data_offsets"])]
        entry["data_offsets"] = [offset, offset + len(piece)]
        pieces.append(piece)
        offset += len(piece)
    made = {"__metadata__": document.get("__metadata__", {"format": "pt"}), **rest}
    made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
    _write_tensors(folder / file, made, b"".join([*pieces, new]))


def drop_tensor(folder: Path, file: str, name: str, renamed: str | None = None) -> None:
    """A well-formed file without a tensor, or with another name for it."""
    parts = _tensors_of(folder / file)
    if parts is None or name not in parts[0]:
        return
    document, data = parts
    pieces, offset, made = [], 0, {}
    for key, entry in document.items():
        if key == "__metadata__":
            made[key] = entry
        elif key != name or renamed is not None:
            piece = data[slice(*entry["data_offsets"])]
            made[renamed if key == name and renamed is not None else key] = {
                **entry, "data_offsets": [offset, offset + len(piece)],
            }  # fmt: skip
            pieces.append(piece)
            offset += len(piece)
    _write_tensors(folder / file, made, b"".join(pieces))


def _tensors_of(target: Path) -> tuple[dict[str, Any], bytes] | None:
    if not _is_small(target):
        return None
    raw = target.read_bytes()
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        document = json.loads(raw[8 : 8 + length])
        whole = isinstance(document, dict) and all(
            [type(offset) for offset in entry["data_offsets"]] == [int, int]
            for key, entry in document.items()
            if key != "__metadata__"
        )
    except (ValueError, LookupError, TypeError, struct.error, RecursionError, OverflowError):
        return None
    return (document, raw[8 + length :]) if whole else None


def _write_tensors(target: Path, document: Any, data: bytes) -> None:
    text = hostile.to_json(document).replace("\n", "").encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + data)


# What a name in a folder is


def remove(folder: Path, file: str) -> None:
    _clear(folder / file)


def copy(folder: Path, file: str, name: str) -> None:
    if _is_small(folder / file) and file != name:
        _clear(folder / name)
        shutil.copyfile(folder / file, folder / name)


def move(folder: Path, file: str, name: str) -> None:
    if (folder / file).exists() and not (folder / name).exists():
        (folder / file).rename(folder / name)


def link(folder: Path, file: str, target: str) -> None:
    """A symbolic link, perhaps to itself or to nothing."""
    _clear(folder / file)
    (folder / file).symlink_to(target)


def directory(folder: Path, file: str) -> None:
    _clear(folder / file)
    (folder / file / "inside").mkdir(parents=True)


def pipe(folder: Path, file: str) -> None:
    """A named pipe that nobody writes to."""
    _clear(folder / file)
    os.mkfifo(folder / file)


def listener(folder: Path, file: str) -> None:
    """A socket."""
    _clear(folder / file)
    here = Path.cwd()
    os.chdir((folder / file).parent)  # the whole path may be too long for a socket's name
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(Path(file).name)
    finally:
        os.chdir(here)


def mode(folder: Path, file: str, bits: int) -> None:
    if (folder / file).exists():
        (folder / file).chmod(bits)


def sparse(folder: Path, file: str, size: int) -> None:
    """A file that says it is large, and holds zeros."""
    if (folder / file).is_file():
        os.truncate(folder / file, size)


def _is_small(target: Path) -> bool:
    """Whether a file is there to be changed; neither a pipe or a device, nor one that only says that it is large."""
    return target.is_file() and target.stat().st_size < 2**24


def _clear(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


STEPS: dict[str, Callable[..., None]] = {
    "set": set_node, "delete": delete_node, "rename": rename_node, "double": double_node,
    "truncate": truncate, "flip": flip, "splice": splice, "replace": replace, "prepend": prepend, "append": append,
    "write": write, "recode": recode,
    "header": header, "header_length": header_length, "tensor": tensor, "drop_tensor": drop_tensor,
    "remove": remove, "copy": copy, "move": move, "link": link, "directory": directory, "pipe": pipe,
    "listener": listener, "mode": mode, "sparse": sparse,
}  # fmt: skip
