"""What every verb may report while it works: sentences for the user. Each verb's own events lie in its room."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A sentence for the user, such as on a download that takes long."""

    text: str


@dataclass(frozen=True)
class Warned:
    """A sentence that the user should not miss."""

    text: str
