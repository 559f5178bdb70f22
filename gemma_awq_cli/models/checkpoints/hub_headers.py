"""The headers of safetensors files that stay on the hub: the first bytes of each file, and none of its weights."""

from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.models.checkpoints.headers import TensorInfo, WeightFiles, find_weights, merge_headers, tensor_info
from gemma_awq_cli.models.checkpoints.hub import fetch_errors, unusable_answer


@dataclass(frozen=True)
class HubWeights:
    """The weights of a repository whose other files have been fetched.

    repo: the hub id; commit: of the other files; names: of all files that the repository has.
    """

    repo: str
    commit: str
    names: frozenset[str]

    def find(self, folder: Path) -> WeightFiles:
        """Return the repository's one complete set of weights, as if it lay in `folder`, where the other files are."""
        return find_weights(folder, self.names)

    def read_headers(self, weights: WeightFiles) -> dict[str, TensorInfo]:
        """Return every tensor of a set by its name. Raises GemmaAwqError if the hub or its answer stands in the way."""
        with fetch_errors(self.repo, self.commit):
            return merge_headers(weights, self._read_header)

    def _read_header(self, file: Path) -> dict[str, TensorInfo]:
        from huggingface_hub import parse_safetensors_file_metadata
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            header = parse_safetensors_file_metadata(self.repo, file.name, revision=self.commit)
        except SafetensorsParsingError as error:
            raise unusable_answer(error, self.repo) from None
        return {name: tensor_info(file, name, one.shape, one.dtype) for name, one in header.tensors.items()}


def weights_on_hub(repo: str, commit: str) -> HubWeights:
    """Return the weights of a repository at a commit. Asks the hub for the names of its files."""
    from huggingface_hub import list_repo_files

    with fetch_errors(repo, commit):
        return HubWeights(repo, commit, frozenset(list_repo_files(repo, revision=commit)))
