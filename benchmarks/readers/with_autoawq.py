"""AutoAWQ's `WQLinear_GEMM` in transformers' model, as AutoAWQ's own loader would put it there.

AutoAWQ 0.2.9 has Gemma 1 and 2 only, and its loader needs transformers of 2024; the class itself works. It computes in
float16 whatever the model does. On a CPU it dequantizes with AutoAWQ's `dequantize_gemm`.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from awq.modules.linear import gemm
from exchange import Opened, Request, serve
from safetensors.torch import load_file
from with_transformers import opened

gemm.TRITON_AVAILABLE = False  # Triton may be installed, but it has no product for CPUs


def open_model(request: Request) -> Opened:
    folder = Path(request["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = config.pop("quantization_config")
    tensors = {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    with tempfile.TemporaryDirectory() as plain:
        (Path(plain) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        parsed = transformers.AutoConfig.from_pretrained(plain)
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class._from_config(parsed, dtype=getattr(torch, request["dtype"]))
    for name, module in [*model.named_modules()]:
        if f"{name}.qweight" in tensors:
            made = gemm.WQLinear_GEMM.from_linear(module, section["bits"], section["group_size"], init_only=True)
            model.set_submodule(name, made)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    missing = [name for name in missing if name != "lm_head.weight"]
    found = {"missing": missing, "unexpected": unexpected}
    faults = [f"{kind}: {len(names)}, {names[:2]}" for kind, names in found.items() if names]
    return opened(model.eval(), ("autoawq", "transformers", "torch"), faults)


serve(open_model)
