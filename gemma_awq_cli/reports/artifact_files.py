"""The names of the files that an artifact may have: what is published, and what may be removed with it."""

from collections.abc import Collection

from gemma_awq_cli.models.checkpoints.files import CONFIG, INDEX, SINGLE
from gemma_awq_cli.models.checkpoints.side_files import SIDE_FILES, WEIGHT_FILE
from gemma_awq_cli.models.checkpoints.staging import REPORT

CARD = "README.md"
BENCH = "bench.json"
PROVENANCE = "provenance.json"  # of what was pushed
EXPORT = "export.json"  # what marks a folder as an export of this tool


def is_artifact_file(name: str, others: Collection[str] = ()) -> bool:
    """Whether a file of this name, relative to the folder, belongs to an artifact.

    others: names of files that another tool writes, and that belong to its models.
    """
    own = name in (CONFIG, INDEX, SINGLE, REPORT, CARD, BENCH, PROVENANCE, *others)
    return own or name in SIDE_FILES or WEIGHT_FILE.fullmatch(name) is not None
