"""The messages typed in earlier chats: a file of bounded size that only its owner can read."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import reason_of
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.saving import write_whole

HISTORY_BYTES = 1 << 20  # of the file; when it has more, the older half goes
MESSAGE_BYTES = 1 << 16  # a longer message is not remembered
OWNER_ONLY = 0o600


def history_path() -> Path:
    """Return where the messages are kept, in the user's folder for the state of programs."""
    return Path(platformdirs.user_state_dir("gemma-awq", False)) / "chat-history.jsonl"


class ChatHistory:
    """A file of messages, a JSON string on each line, the newest last. Two chats may add to it at once.

    warn: told why, once, if the file cannot be used. The chat goes on without it.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._usable = True

    def load(self) -> list[str]:
        """Return the messages, the oldest first. What is no message is passed over."""
        try:
            with open(self._path, "rb", opener=_opened) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - HISTORY_BYTES))
                lines = file.read(HISTORY_BYTES).split(b"\n")[1 if size > HISTORY_BYTES else 0 :]
            if size > HISTORY_BYTES:
                lines = self._shorten(lines)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
            return []
        return [text for line in lines if (text := _message(line)) is not None]

    def add(self, text: str) -> None:
        """Append a message."""
        if not self._usable:
            return
        try:
            line = json.dumps(text).encode() + b"\n"
            if len(line) > MESSAGE_BYTES:
                return
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0, opener=_opened) as file:
                file.write(line)
        except OSError as error:
            self._give_up(error)

    def _shorten(self, lines: list[bytes]) -> list[bytes]:
        """Leave the newest messages, at most half of what the file may have; return them."""
        kept: list[bytes] = []
        size = 0
        for line in reversed(lines):
            size += len(line) + 1
            if size > HISTORY_BYTES // 2:
                break
            kept.insert(0, line)
        write_whole(self._path, b"\n".join(kept), 0o600)
        return kept

    def _give_up(self, error: OSError) -> None:
        if self._usable:
            self._usable = False
            self._warn(f"The chat's history cannot be kept: {self._path}: {reason_of(error)}.")


def _opened(path: str, flags: int) -> int:
    """Open a regular file that nobody else may read; opening a pipe does not wait."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), OWNER_ONLY)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("not a regular file")
        if os.name == "posix" and stat.S_IMODE(mode) != OWNER_ONLY:
            os.fchmod(descriptor, OWNER_ONLY)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _message(line: bytes) -> str | None:
    try:
        text = parse_json(line.decode("utf-8"), "", "")
    except (UnicodeDecodeError, GemmaAwqError):
        return None
    return text if isinstance(text, str) and text and "\0" not in text else None
