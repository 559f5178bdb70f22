"""What a model is made of: config, weights, index, tokenizer, chat template, generation config."""

import json
import random
import struct
from pathlib import Path
from typing import Any

from tests.fuzz import hostile
from tests.fuzz.bases import ARTIFACTS, BATCH, CHAT, FAMILIES, PLAN, PROMPT, PUSH, QUANTIZE, RUN
from tests.fuzz.cases import Step
from tests.fuzz.kinds.common import Draft, Extra, dense_or_packed, json_steps, load, operation, some, text_steps
from tests.fuzz.steps import WIDTHS

CONFIG, INDEX, WEIGHTS = "model/config.json", "model/model.safetensors.index.json", "model/model.safetensors"
ROPES: list[Any] = [
    {"rope_type": kind, "rope_theta": 10000.0, **more}
    for kind, more in (
        ("linear", {"factor": 2.0}), ("linear", {}), ("linear", {"factor": 0}), ("linear", {"factor": "x"}),
        ("dynamic", {"factor": 2.0}), ("dynamic", {"factor": 1e308, "original_max_position_embeddings": 0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}), ("yarn", {}), ("yarn", {"factor": -1.0}),
        ("longrope", {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16}), ("longrope", {"short_factor": [1.0]}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64}), ("llama3", {"factor": 1.0}), ("proportional", {}),
        ("nope", {}), (None, {}), (3, {}), ([], {}), ({}, {}),
    )
]  # fmt: skip
SIZES = [
    0,
    -1,
    1,
    2,
    3,
    5,
    7,
    16,
    17,
    24,
    33,
    48,
    63,
    65,
    128,
    263,
    265,
    512,
    513,
    1024,
    10**5,
    10**8,
    2**31,
    2**32 + 1,
]
CONFIG_EXTRA = Extra(
    keys=(
        "quantization_config", "rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq",
        "tie_word_embeddings", "torch_dtype", "dtype", "auto_map", "attention_bias", "architectures", "sliding_window",
        "sliding_window_pattern", "_sliding_window_pattern", "layer_types", "text_config", "vision_config",
        "hidden_act", "hidden_activation", "partial_rotary_factor", "id2label", "num_labels", "pruned_heads",
        "name_or_path", "_name_or_path", "_attn_implementation", "use_bidirectional_attention", "head_dim", "attribute_map",
        "problem_type", "transformers_version", "is_encoder_decoder", "pad_token_id", "use_cache", "rms_norm_eps",
        "base_model_tp_plan", "num_kv_shared_layers", "activation_sparsity_pattern", "hidden_size_per_layer_input",
        "vocab_size_per_layer_input", "laurel_rank", "altup_num_inputs", "altup_active_idx", "altup_coef_clip",
        "altup_correct_scale", "enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size",
        "attention_k_eq_v", "global_head_dim", "num_global_key_value_heads", "use_double_wide_mlp", "per_layer_config", "ignore_keys_at_rope_validation", "query_pre_attn_scalar",
    ),
    values={
        "rope_scaling": ROPES, "rope_parameters": ROPES, "full_attention": ROPES, "sliding_attention": ROPES,
        "rope_theta": [0, -1.0, 1e308, 1e-308, "10000", True, None, {"$raw": "NaN"}, [1.0], 10**400],
        "rope_type": ["linear", "dynamic", "yarn", "longrope", "llama3", "nope", None, 1, {}],
        "tie_word_embeddings": [True, False, None, "false", 0, 1],
        "dtype": ["float16", "float32", "float64", "auto", "int8", "bfloat16 ", "load", "Tensor", None, 16],
        "model_type": ["gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
                       "gemma4_unified_text", "gemma4_assistant", "vaultgemma", "llama", "GEMMA", "", None, 3],
        "num_kv_shared_layers": [0, 1, 2, 3, 6, 7, 8, -1, "3", None, True, 2**31], "num_experts": SIZES, "top_k_experts": SIZES,
        "moe_intermediate_size": SIZES, "hidden_size_per_layer_input": SIZES, "vocab_size_per_layer_input": SIZES,
        "laurel_rank": SIZES, "altup_num_inputs": SIZES, "altup_active_idx": [0, 1, 3, 4, -1, "0", None, 2**31],
        "altup_coef_clip": [0, -1.0, 1e-30, 1e308, None, "x", {"$raw": "NaN"}], "altup_correct_scale": [True, False, None, 1],
        "activation_sparsity_pattern": [0.95, 0, [], [0.95] * 7, [1.0] * 7, [0.5] * 6, [-0.1] * 7, ["x"] * 7, None, [2.0] * 7],
        "enable_moe_block": [True, False, None, 1], "attention_k_eq_v": [True, False, None, 1],
        "use_double_wide_mlp": [True, False, None, 1], "global_head_dim": SIZES, "num_global_key_value_heads": SIZES,
        "hidden_size": SIZES, "intermediate_size": SIZES, "num_hidden_layers": SIZES, "num_attention_heads": SIZES,
        "num_key_value_heads": SIZES, "head_dim": SIZES, "vocab_size": SIZES, "max_position_embeddings": SIZES,
        "sliding_window": SIZES, "query_pre_attn_scalar": [0, -4, 1e-30, 1e30, "8", None, 10**400],
        "rms_norm_eps": [0, -1, 1e30, 1e-300, "1e-6", None, {"$raw": "NaN"}],
        "attn_logit_softcapping": [0, 0.0, -2.0, 1e-30, 1e300, "2", True, None, 2],
        "final_logit_softcapping": [0, 0.0, -2.0, 1e-30, 1e300, "2", True, None, 2],
        "layer_types": [[], ["full_attention"], ["full_attention"] * 4, ["x"] * 3, [None] * 3, "full_attention",
                        [["full_attention"]] * 3, ["chunked_attention"] * 3, ["linear_attention"] * 3],
        "bos_token_id": [263, 264, 10**9, -1, None, [2], "2", 2.0], "eos_token_id": [[1, 5], [[1]], ["1"], [], -1, 10**9, None],
        "group_size": [0, -1, 16, 32.0, 33, 64, 128, 2**31, "32", None, True], "bits": [3, 8, "4", 4.0, None],
        "version": ["gemv", "GEMM", "exllama", None, 4], "quant_method": ["gptq", "AWQ", "bitsandbytes", None, 4, ["awq"]],
        "zero_point": [False, None, "x"], "modules_to_not_convert": [None, [], "lm_head", [1], ["model.layers.0"]],
        "auto_map": [{"AutoConfig": "evil.Evil"}, {"AutoModelForCausalLM": "x--y.Z"}, "x"],
        "use_bidirectional_attention": [True, "all", "vision", 1], "attention_bias": [True, "x", 1],
        "hidden_activation": ["relu", "gelu", "silu", "nope", None, 3, ["gelu"]],
        "quantization_config": [None, {}, [], "awq", {"quant_method": "awq"}, {"quant_method": "gptq", "bits": 4}],
        "text_config": [None, {}, [], "x"], "vision_config": [None, {}, [], "x", {"num_hidden_layers": 10**8}],
        "name_or_path": ["/home/somebody/secret-model", "C:\\Users\\somebody\\m"],
        "_name_or_path": ["/home/somebody/secret-model", "C:\\Users\\somebody\\m"],
    },
)  # fmt: skip


def config(rng: random.Random, root: Path) -> Draft:
    base = dense_or_packed(rng)
    steps = json_steps(rng, CONFIG, load(root, base, CONFIG), CONFIG_EXTRA)
    return Draft(base, steps, operation(rng, base))


def generation(rng: random.Random, root: Path) -> Draft:
    base = dense_or_packed(rng)
    file = "model/generation_config.json"
    extra = Extra(
        keys=("temperature", "top_k", "top_p", "min_p", "do_sample", "repetition_penalty", "eos_token_id", "max_length",
              "bos_token_id", "cache_implementation", "stop_strings", "suppress_tokens", "_name_or_path"),
        values={
            "temperature": [0, -1, 1e-300, 1e308, "1", True, {"$raw": "NaN"}], "top_k": [0, -1, 1, 2**63, 10**30, 1.5, "5", True],
            "top_p": [0, 1, 1.5, -1, 1e-300, "x"], "min_p": [0, 1, 2, -1, "x"], "do_sample": [True, "yes", 1, None],
            "repetition_penalty": [0, -1, 1e-300, 1e308, "x", True, 1.1],
            "eos_token_id": [[1, 5], [[1, 5], 2], ["1"], [], -1, 10**9, 2**63, None, "x", {"a": 1}, [None], 1.0, [True]],
        },
    )  # fmt: skip
    steps = json_steps(rng, file, load(root, base, file), extra)
    if rng.random() < 0.5:
        steps.append(["set", file, ["do_sample"], True])
    return Draft(
        base, steps, rng.choice([[*RUN, PROMPT], [*RUN, "--json", PROMPT], BATCH if rng.random() < 0.5 else PUSH])
    )


def index(rng: random.Random, root: Path) -> Draft:
    base = "gemma2"
    document = load(root, base, INDEX)
    files = sorted(set(document["weight_map"].values()))
    targets = [*files, "../outside/secret.txt", "/etc/passwd", "config.json", "", ".", "..", "x\x00", "a/b.safetensors",
               "nope.safetensors", 3, None, [], {}, "./" + files[0], "../model/" + files[0], "\ud800.safetensors"]  # fmt: skip
    steps = []
    for _ in range(some(rng)):
        if rng.random() < 0.5:
            steps.append(["set", INDEX, ["weight_map", rng.choice(list(document["weight_map"]))], rng.choice(targets)])
        elif rng.random() < 0.3:
            file = f"model/{rng.choice(files)}"
            steps.append(
                rng.choice([["remove", file], ["copy", f"model/{files[0]}", file], ["link", file, "../outside/secret.txt"],
                            ["move", file, "model/model.safetensors"], ["truncate", file, 100]])
            )  # fmt: skip
        else:
            extra = Extra(keys=("weight_map", "metadata", "total_size", "model.norm.weight", "x"))
            steps += json_steps(rng, INDEX, document, extra, 1)
    return Draft(base, steps, operation(rng, base))


def _header(root: Path, base: str) -> dict[str, Any]:
    with (root / base / WEIGHTS).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
        return found


def _header_steps(rng: random.Random, document: dict[str, Any], likely: list[str]) -> list[Step]:
    """Damage to a safetensors file: to its header, its data, or a tensor in an otherwise sound file."""
    steps: list[Step] = []
    names = [name for name in document if name != "__metadata__"]
    for _ in range(some(rng)):
        name = rng.choice(likely if rng.random() < 0.7 else names)
        entry = document[name]
        shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
        what = rng.choices(
            ["tensor dtype", "tensor shape", "fill", "drop", "rename", "add", "dtype", "shape", "offsets", "node", "length",
             "bytes", "metadata"],
            [18, 14, 10, 6, 6, 6, 8, 8, 8, 6, 4, 6, 4],
        )[0]  # fmt: skip
        other = rng.choice([one for one in WIDTHS if not one.startswith("U1")])
        odd = [*shape[:-1], rng.choice([0, 1, 7, 8, 16, 2**31, 2**62])]
        shapes = [
            shape[::-1],
            [*shape, 1],
            shape[:-1],
            [],
            [0],
            odd,
            [1, *shape],
            [2 * shape[0], *shape[1:]],
            [shape[0] + 1, *shape[1:]],
        ]
        if what == "tensor dtype":
            steps.append(["tensor", WEIGHTS, name, other, shape, rng.choice(["keep", "00", "ff", "3c", "7f"])])
        elif what == "tensor shape":
            steps.append(["tensor", WEIGHTS, name, dtype, rng.choice(shapes), "keep"])
        elif what == "fill":
            steps.append(
                ["tensor", WEIGHTS, name, dtype, shape, rng.choice(["00", "ff", "7f", "80", "7c00", "7fc0"][:4])]
            )
        elif what == "drop":
            steps.append(["drop_tensor", WEIGHTS, name])
        elif what == "rename":
            made = rng.choice([f"base_model.model.{name}", f"language_model.{name}", name.removeprefix("model."), name.upper(),
                               name.replace(".weight", ".weight_packed"), name.replace(".weight", ".lora_A.weight"),
                               "\x1b[31m", "", name.replace("qweight", "g_idx"), name + "\n"])  # fmt: skip
            steps.append(["drop_tensor", WEIGHTS, name, made])
        elif what == "add":
            made = rng.choice(["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight", "x", "\x1b]0;x\x07",
                               "model.layers.3.mlp.up_proj.weight", "model.layers.99999999999.x", "model.rotary_emb.inv_freq",
                               "model.layers.0.self_attn.q_proj.bias", "vision_tower.x", "/etc/passwd"])  # fmt: skip
            embedding = next((document[one]["shape"] for one in names if one.endswith("embed_tokens.weight")), [4, 4])
            steps.append(
                ["tensor", WEIGHTS, made, rng.choice(["BF16", "F32", other]), rng.choice([embedding, [4], []]), "3c"]
            )
        elif what == "dtype":
            steps.append(
                ["header", WEIGHTS, [name, "dtype"], rng.choice([other, other, "F4", "C64", "", None, 3, "bf16"])]
            )
        elif what == "shape":
            steps.append(
                [
                    "header",
                    WEIGHTS,
                    [name, "shape"],
                    rng.choice([*shapes, "x", None, [-1, 2], [2.5], [10**30], [2**32, 2**32]]),
                ]
            )
        elif what == "offsets":
            first, last = offsets
            steps.append(["header", WEIGHTS, [name, "data_offsets"], rng.choice(
                [[last, first], [0, last - first], [first, last + 2], [first - 2, last], [0, 2**63], [-2, 4], [first], None,
                 [first, 10**30], [first + 1, last + 1], document[rng.choice(names)]["data_offsets"]])])  # fmt: skip
        elif what == "node":
            steps.append(["header", WEIGHTS, rng.choice([[name], [name, rng.choice(list(entry))], ["x"]]),
                          rng.choice([{"$delete": True}, hostile.value(rng, entry)])])  # fmt: skip
        elif what == "length":
            steps.append(
                ["header_length", WEIGHTS, rng.choice([0, 1, 7, 8, 100, 10**6, 2**31, 2**32, 2**63, 2**64 - 1])]
            )
        elif what == "bytes":
            end = max(one["data_offsets"][1] for one in document.values() if "data_offsets" in one)
            steps += rng.choice([[["truncate", WEIGHTS, rng.choice([0, 4, 8, 20, end // 2, end - 1])]],
                                 [["flip", WEIGHTS, rng.randrange(end), rng.randrange(8)]], [["sparse", WEIGHTS, 2**33]],
                                 [["append", WEIGHTS, "xx"]], [["prepend", WEIGHTS, {"$hex": "0000000000000000"}]]])  # fmt: skip
        else:
            steps.append(
                [
                    "header",
                    WEIGHTS,
                    ["__metadata__"],
                    rng.choice(
                        [
                            None,
                            [],
                            {"format": "tf"},
                            {"format": 3},
                            {"a": {}},
                            {"x": {"$repeat": ["x", 10000]}},
                            {"key": "hf_" + "a1B2" * 9},
                        ]
                    ),
                ]
            )
    return steps


def weights(rng: random.Random, root: Path) -> Draft:
    """The 16-bit weights of a checkpoint."""
    base = rng.choice([family for family in FAMILIES if family != "gemma2"])
    document = _header(root, base)
    steps = _header_steps(rng, document, [name for name in document if "layers.0" in name or "embed_tokens" in name])
    return Draft(base, steps, operation(rng, base))


def packed(rng: random.Random, root: Path) -> Draft:
    """The packed weights of an artifact."""
    base = rng.choice(ARTIFACTS)
    document = _header(root, base)
    likely = [name for name in document if name.endswith(("qweight", "qzeros", "scales"))]
    steps = _header_steps(rng, document, likely)
    if rng.random() < 0.15:
        steps.append(["set", CONFIG, ["quantization_config", "group_size"], rng.choice([16, 64, 96, 33])])
    return Draft(base, steps, operation(rng, base))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer(rng: random.Random, root: Path) -> Draft:
    base = dense_or_packed(rng)
    steps: list[Step] = []
    for _ in range(some(rng)):
        name = rng.choices(TOKENIZER_FILES, [50, 35, 8, 7])[0]
        file = f"model/{name}"
        document = load(root, base, file)
        what = rng.random()
        if name == "tokenizer.json" and what < 0.25:
            token = rng.choice(list(document["model"]["vocab"]))
            steps.append(
                ["set", file, ["model", "vocab", token], rng.choice([264, 265, 10**6, 2**31, 2**32 - 1, -1, 0, 263])]
            )
        elif name == "tokenizer.json" and what < 0.4:
            place = rng.randrange(len(document["added_tokens"]))
            added = document["added_tokens"][place]
            key = rng.choice(list(added))
            steps.append(["set", file, ["added_tokens", place, key], hostile.value(rng, added[key])])
        elif what < 0.47:
            steps.append(rng.choice([["remove", file], ["empty", file][:0] or ["write", file, ""], ["directory", file],
                                     ["write", "model/tokenizer.model", "x"], ["link", file, "../outside/secret.txt"]]))  # fmt: skip
        else:
            extra = Extra(
                keys=("chat_template", "bos_token", "eos_token", "added_tokens_decoder", "tokenizer_class", "auto_map",
                      "extra_special_tokens", "model_max_length", "name_or_path", "add_bos_token", "truncation", "padding",
                      "normalizer", "pre_tokenizer", "decoder", "tokenizer_file"),
                values={
                    "tokenizer_class": ["GemmaTokenizer", "GemmaTokenizerFast", "LlamaTokenizer", "evil.X", None, 3],
                    "bos_token": ["<eos>", "<nope>", "", {"content": "<bos>"}, {"content": 3}, {"content": "\x1b[31m"}, ["<bos>"]],
                    "chat_template": ["{{ 1 }}", 3, [], {}, [{"name": "default", "template": "x"}], [{"name": 3}], {"default": 3}],
                    "type": ["BPE", "WordPiece", "Unigram", "WordLevel", "Metaspace", "Replace", "Nope", None],
                    "normalizer": [{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}, {"type": "NFC"},
                                   {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
                                   {"type": "Prepend", "prepend": {"$repeat": ["x", 10000]}}],
                    "pre_tokenizer": [{"type": "Split", "pattern": {"Regex": "((a*)*)*b"}, "behavior": "Isolated", "invert": False},
                                      None, {"type": "Whitespace"}],
                    "truncation": [{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
                                   {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}],
                    "padding": [{"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                                 "pad_type_id": 0, "pad_token": "<pad>"}],
                },
            )  # fmt: skip
            steps += json_steps(rng, file, document, extra, 1)
    prompt = rng.choice([PROMPT, "<image_soft_token><start_of_turn>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "naïve 東京"])
    arguments = rng.choice([[*RUN, prompt], [*RUN, prompt], PLAN, BATCH, PUSH if base in ARTIFACTS else QUANTIZE])
    return Draft(base, steps, arguments)


NODES = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ lipsum(n=10**8) }}", "{{ 'x' * 10**10 }}", "{{ range(10**9)|list }}",
    "{% set ns = namespace(a='xx') %}{% for i in range(64) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ undefined.attribute }}",
    "{{ undefined() }}", "{{ messages[99].content }}", "{{ messages[0]['content'] + 1 }}", "{{ 1 / 0 }}", "{{ 10**10**8 }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ raise_exception('x' * 100000) }}",
    "{{ raise_exception('\x1b[31mred') }}", "{{ raise_exception(3) }}", "{{ raise_exception() }}", "{{ strftime_now('%') }}",
    "{{ strftime_now(3) }}", "{{ strftime_now('x' * 10**6) }}", "{{ messages|tojson(indent=10**9) }}", "{{ messages|map('x')|list }}",
    "{{ messages|nofilter }}", "{{ dict(a=1) }}", "{{ namespace(__x=1) }}", "{% include 'x' %}", "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ self }}", "{{ joiner }}", "{{ '%s' % 1 }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}", "{{ 'x'|center(10**9) }}", "{{ 'x'|indent(10**9) }}",
    "{{ ('a' * 50)|replace('', 'xxxxx')|replace('', 'yyyyy') }}", "{{ '\ud800' }}", "{{ '\\ud800' }}", "{{ bos_token * 3 }}",
    "{% break %}", "{% generation %}x{% endgeneration %}", "{% if %}", "{{", "{% raw %}", "{{ [1]|first|tojson }}",
    "{{ messages|sort }}", "{{ messages|groupby('role')|list }}", "{{ none }}", "{{ 'x'|attr('upper')() }}",
    "{% set messages = [] %}", "{{ messages.append(1) }}", "{{ 'ab'|urlize }}", "{{ '<image_soft_token>' }}", "{{ '\x00' }}",
    "{{ 'a'.join(range(10)) }}", "{{ (1,2)|sum(start='x') }}", "{{ 'x'|batch(0)|list }}", "{{ range(5)|slice(0)|list }}",
    "{{ 'x'|wordwrap(0) }}", "{{ 'x'|truncate(-5, true, 'y') }}", "{{ 3|round(10**6) }}", "{{ '9' * 5000|int }}", "{{ ('9' * 5000)|int }}",
    "{{ 1.5|round(method='x') }}", "{{ debug() }}", "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{{ caller() }}",
]  # fmt: skip


def template(rng: random.Random, root: Path) -> Draft:
    base = rng.choice([*CHAT, *(f"{family}-awq" for family in CHAT), "gemma2"])
    file = "model/chat_template.jinja"
    node = rng.choice(NODES)
    steps: list[Step] = []
    what = rng.random()
    place = root / base / file
    text = place.read_text(encoding="utf-8") if place.is_file() else ""
    if what < 0.35:
        steps.append(["write", file, node])
    elif what < 0.65 and text:
        steps.append(["splice", file, rng.randrange(len(text)), 0, node])
    elif what < 0.72:
        steps += text_steps(rng, file, len(text))
    elif what < 0.8:
        steps += [
            ["remove", file],
            ["write", "model/chat_template.json", {"chat_template": rng.choice([node, 3, [], None])}],
        ]
    elif what < 0.9:
        named = [{"name": "default", "template": node}]
        steps += [
            ["remove", file],
            [
                "set",
                "model/tokenizer_config.json",
                ["chat_template"],
                rng.choice(
                    [
                        node,
                        named,
                        [{"name": "tool_use", "template": node}],
                        {"default": node},
                        3,
                        [],
                        {},
                        True,
                        [node],
                        {"x": node},
                    ]
                ),
            ],
        ]
    elif what < 0.95:
        steps += [["remove", file], ["directory", "model/additional_chat_templates"]]
    else:
        steps.append(rng.choice([["link", file, "../outside/secret.txt"], ["directory", file], ["pipe", file],
                                 ["write", file, {"$repeat": ["{{ 1 }}", 200000]}], ["write", file, {"$repeat": ["{% if 1 %}", 3000]}],
                                 ["write", file, {"$repeat": ["(", 3000]}], ["write", file, "{{ " + "(" * 500 + " }}"]]))  # fmt: skip
    more = rng.choice([[], [], ["--system", "Be brief."]])
    arguments = rng.choice([[*RUN, *more, PROMPT], [*RUN, *more, PROMPT], BATCH, [*PLAN, "--calibration", "rows.jsonl"],
                            PUSH if base.endswith("-awq") else PLAN])  # fmt: skip
    return Draft(base, steps, arguments)
