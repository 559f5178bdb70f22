"""What is no checkpoint: LoRA adapters, GGUF files and pickled weights, named for what they are."""

import re
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.inspection.contents import Contents
from gemma_awq_cli.inspection.facts import Adapter, GgufFile, ModelFacts, Problem, ReaderVerdict, Storage
from gemma_awq_cli.inspection.gguf_header import FILE_TYPES, read_gguf_header
from gemma_awq_cli.inspection.readers import LLAMA_CPP
from gemma_awq_cli.inspection.stored import read_stored
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json, require_inside
from gemma_awq_cli.models.checkpoints.foreign import ADAPTER_CONFIG, MERGE

MOST_GGUF = 20  # files whose headers are read
_QUANT = re.compile(
    r"(?i)(?:^|[-_.])((?:IQ|TQ|Q)\d(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4\w*)(?=[-_.]|$)"
)  # of a file's name: gemma-3-1b-it-Q4_K_M.gguf


def inspect_adapter(contents: Contents) -> ModelFacts:
    """Say what a PEFT adapter changes."""
    problems = []
    config: dict[str, Any] = {}
    try:
        require_inside(contents.folder, contents.folder / ADAPTER_CONFIG)
        config = read_json(contents.folder / ADAPTER_CONFIG)
    except GemmaAwqError as error:
        problems.append(Problem(error.message, error.hint))
    stored = read_stored(contents)
    problems += stored.problems
    kind = config.get("peft_type")
    targets = config.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    alpha = config.get("lora_alpha")
    adapter = Adapter(
        base_model=_text(config.get("base_model_name_or_path")),
        kind="DoRA" if config.get("use_dora") is True else _text(kind),
        rank=config["r"] if type(config.get("r")) is int else None,
        alpha=float(alpha) if isinstance(alpha, int | float) and abs(alpha) < 1e9 else None,
        targets=tuple(sorted(name[:100] for name in names if isinstance(name, str)))[:50],
    )
    problems.append(Problem("This is an adapter, not a whole model.", MERGE))
    dtypes: dict[str, int] = {}
    for info in stored.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    elements = sum(info.elements for info in stored.tensors.values())
    storage = Storage(
        len(stored.files), sum(dtypes.values()), len(stored.tensors), elements, elements, (), None, dtypes
    )
    return ModelFacts(
        contents.asked, contents.where, contents.revision, "adapter", storage=storage, adapter=adapter,
        problems=tuple(problems),
    )  # fmt: skip


def inspect_gguf(contents: Contents, names: list[str]) -> ModelFacts:
    """Say what GGUF files hold. Of one on the hub only what stands before its tokenizer is read."""
    files, problems = [], []
    for index, name in enumerate(sorted(names)):
        plain = GgufFile(name, contents.sizes[name], file_type=type_in_name(name))
        try:
            files.append(_gguf(contents, plain) if index < MOST_GGUF else plain)
        except GemmaAwqError as error:
            files.append(plain)
            problems.append(Problem(error.message, error.hint))
    if not contents.has(CONFIG):
        problems.append(
            Problem(
                "GGUF is the format of llama.cpp; this tool reads safetensors.",
                "Run it with llama.cpp or Ollama, or give the model that the file was made from.",
            )
        )
    readers = (ReaderVerdict(LLAMA_CPP, "yes"),)
    return ModelFacts(
        contents.asked, contents.where, contents.revision, "gguf", gguf=tuple(files), readers=readers,
        problems=tuple(problems),
    )  # fmt: skip


def _gguf(contents: Contents, plain: GgufFile) -> GgufFile:
    name = plain.name
    header = read_gguf_header(
        lambda start, count: contents.read(name, start, count), plain.bytes, name, whole=contents.local
    )
    values = header.values
    architecture = _text(values.get("general.architecture"))
    number = values.get("general.file_type")
    return GgufFile(
        name,
        plain.bytes,
        architecture,
        _text(values.get("general.name")),
        FILE_TYPES.get(number, f"file type {number}") if type(number) is int else plain.file_type,
        _whole(values.get(f"{architecture}.context_length")),
        _whole(values.get(f"{architecture}.block_count")),
        header.elements,
        dict(sorted(header.types.items(), key=lambda item: -item[1])),
    )


def inspect_pickles(contents: Contents) -> ModelFacts:
    """Say that weights are pickled. Nothing opens them."""
    names = ", ".join(sorted(name for name in contents.sizes if not name.endswith(".json"))[:3])
    problem = Problem(
        f"There is no {CONFIG}, and the weights are in a format that runs code when it is loaded: {names}.",
        "Give the folder of the whole checkpoint, converted to safetensors.",
    )
    return ModelFacts(contents.asked, contents.where, contents.revision, "pickle", problems=(problem,))


def type_in_name(name: str) -> str | None:
    """The quantization that a GGUF file's name ends with, as llama.cpp's tools write it."""
    found = _QUANT.findall(name.removesuffix(".gguf"))
    return found[-1].upper() if found else None


def _text(value: object) -> str | None:
    return value[:200] if isinstance(value, str) and value else None


def _whole(value: object) -> int | None:
    return value if type(value) is int else None
