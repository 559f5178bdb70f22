"""Broken and hostile checkpoints: everything that is wrong is listed, nothing ends in a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.inspection.contents import local_contents
from gemma_awq_cli.inspection.facts import ModelFacts
from gemma_awq_cli.inspection.model import inspect_contents
from tests.inspection import folders
from tests.inspection.folders import model_tensors, write_file, write_model

HOSTILE = "\x1b[31m[red]x[/red]\u202e"


def inspect(folder: Path) -> ModelFacts:
    return inspect_contents(local_contents(folder, str(folder)))


def messages(facts: ModelFacts) -> str:
    return "\n".join(one.message for one in facts.problems)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", model_tensors(folders.CONFIG))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_everything_that_is_wrong_is_listed_at_once(folder: Path) -> None:
    tensors = model_tensors(folders.CONFIG)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = ("F16", (3, 3))
    tensors["model.layers.1.mlp.extra.weight"] = ("F16", (3, 3))
    tensors["lm_head.weight"] = ("F16", (5, 64))
    write_file(folder / "model.safetensors", tensors)
    write_file(folder / "other.safetensors", {"a": ("F8_E4M3", (1,))})
    (folder / "tokenizer.json").unlink()
    (folder / "quantization_report.json").write_text("{}")
    change_config(folder, torch_dtype="float64")
    facts = inspect(folder)
    found = messages(facts)
    for part in (
        "2 tensors are missing: model.layers.0.mlp.up_proj.weight, model.norm.weight",
        "2 tensors do not have the shapes that config.json asks for: lm_head.weight [5, 64], not [264, 64], "
        "model.layers.1.mlp.down_proj.weight [3, 3], not [64, 96]",
        "lm_head.weight differs from it",
        "other.safetensors",
        "There is no tokenizer.json",
        "has schema None",
        "declares float64",
    ):
        assert part in found
    assert facts.unread is not None
    assert facts.unread.first == ("model.layers.1.mlp.extra.weight",)
    assert facts.sizes is not None
    assert facts.sizes.layers == 2
    assert {one.reads for one in facts.readers if one.reader != "llama.cpp"} == {"no"}


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "There is no config.json"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
    "no model_type": (lambda folder: change_config(folder, model_type=None), "has no model_type"),
    "another model": (lambda folder: change_config(folder, model_type="llama"), "'llama' is not supported"),
    "a refused Gemma": (lambda folder: change_config(folder, model_type="t5gemma"), "it is an encoder-decoder"),
    "a value that makes no sense": (lambda folder: change_config(folder, hidden_size="x"), 'hidden_size is "x"'),
    "heads that do not divide": (lambda folder: change_config(folder, num_key_value_heads=3), "is not a multiple"),
    "too many layers": (lambda folder: change_config(folder, num_hidden_layers=1000), "tensors are missing"),
    "too few layers": (lambda folder: change_config(folder, num_hidden_layers=1), "the files hold 2"),
    "a tie that is no bool": (lambda folder: change_config(folder, tie_word_embeddings=7), "tie_word_embeddings 7"),
    "untied without a head": (lambda folder: change_config(folder, tie_word_embeddings=False), "hold no lm_head"),
    "a section that is no object": (lambda folder: change_config(folder, quantization_config=[]), "not a JSON object"),
    "AWQ that is not packed": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "awq"}), "the weights are not packed"
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "There are no weights"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is empty"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "The weights are pickled"
    ),
    "a header that is too long": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "no safetensors file, or cut off"
    ),
    "a header that is no JSON": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{]"), "not valid JSON"
    ),
    "a header that is not UTF-8": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"\xff\xff"), "is not UTF-8"
    ),
    "a deep header": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (10**5).to_bytes(8, "little") + b'{"a":' + b"[" * (10**5 - 5)
        ),
        "nested too deeply",
    ),
    "a truncated file": (
        lambda folder: (folder / "model.safetensors").open("r+b").truncate(30_000), "is cut off: it has 30000 bytes"
    ),
    "bytes at the end": (
        lambda folder: (folder / "model.safetensors").open("ab").write(b"x"), "1 bytes that belong to no tensor"
    ),
    "a link that leads out": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("/etc/hostname")),
        "leads out of its folder",
    ),
    "an index without files": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "names files that are missing: b.safetensors",
    ),
    "an index of no sense": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        "has no weight_map of names",
    ),
    "an index that names a file elsewhere": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        "names files that are missing: ../b",
    ),
    "patterns that never end": (
        lambda folder: (
            write_model(folder, model_tensors(folders.CONFIG, folders.awq_gemm)),
            change_config(folder, quantization_config={
                "quant_method": "awq", "group_size": 32, "modules_to_not_convert": ["(a+)+$" * 9, ".*.*.*.*.*x"]}),
        ),
        "was not compared",
    ),
    "another group size": (
        lambda folder: (
            write_model(folder, model_tensors(folders.CONFIG, folders.awq_gemm)),
            change_config(folder, quantization_config={"quant_method": "awq", "group_size": 64}),
        ),
        "26 tensors do not have the shapes",
    ),
    "names of an adapter": (
        lambda folder: write_file(folder / "model.safetensors", {"base_model.model.x.lora_A.weight": ("F16", (1, 1))}),
        "an adapter that was not merged",
    ),
    "other names": (
        lambda folder: write_file(folder / "model.safetensors", {"transformer.wte.weight": ("F16", (1, 1))}),
        "holds no embedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_folder_is_described(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, said = CONFIGS[name]
    break_it(folder)
    facts = inspect(folder)
    assert said in messages(facts), messages(facts)
    assert main(["inspect", str(folder)]) == 0
    assert said.split(":")[0] in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GemmaAwqError, match="holds no model"):
        inspect(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert main(["inspect", str(tmp_path / "nothing" / "x" / "y")]) == 1


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_what_the_checkpoint_says_is_escaped(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(folder, model_tensors(folders.CONFIG) | {HOSTILE: ("F16", (1,))}, model_type=f"gemma{HOSTILE}")
    (folder / "README.md").write_text(f"---\nlicense: '[bold]x[/bold]'\nlicense_name: {HOSTILE!r}\n---\n")
    assert main(["inspect", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[red]x[/red]" in out  # as text, not as rich's markup
    assert "[bold]x[/bold]" in out


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "U32", "F4", "X", 7, None]),
        "shape": st.one_of(st.lists(st.integers(-(2**65), 2**65), max_size=4), st.text(max_size=3)),
        "data_offsets": st.one_of(st.lists(st.integers(-(2**65), 2**65), max_size=3), st.none()),
    }
)
NAMES = st.sampled_from([*model_tensors(folders.CONFIG), "__metadata__", "x"])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.one_of(ENTRY, st.none(), st.text(max_size=5), st.lists(st.integers())), max_size=8))
def test_any_header_is_described(tmp_path_factory: pytest.TempPathFactory, header: dict[str, object]) -> None:
    folder = write_model(tmp_path_factory.mktemp("model"), {})
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    json.dumps(inspect(folder).document())


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
METHODS = ("awq", "gptq", "compressed-tensors", "auto-round", "bitsandbytes")
FIELDS = (
    "bits", "group_size", "version", "meta", "config_groups", "modules_to_not_convert", "sym", "autoround_version",
    "checkpoint_format", "zero_point", "load_in_4bit",
)  # fmt: skip
SECTIONS = st.fixed_dictionaries(
    {"quant_method": st.one_of(st.sampled_from(METHODS), JSON)}, optional=dict.fromkeys(FIELDS, JSON)
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*folders.CONFIG, "layer_types", "text_config", "quantization", "dtype"]), JSON),
    st.one_of(st.none(), SECTIONS, JSON),
)
def test_any_config_is_described(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], section: object
) -> None:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, model_tensors(folders.CONFIG, folders.awq_gemm), **{**values, "quantization_config": section})
    json.dumps(inspect(folder).document())
