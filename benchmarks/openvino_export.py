"""Write an artifact as an OpenVINO model whose linears are u4 with zero points: the same integers and scales.

    gemma-awq export ARTIFACT --to bf16 -o DENSE
    gemma-awq export ARTIFACT --to compressed-tensors -o PACKED
    python benchmarks/openvino_export.py DENSE PACKED OUTPUT

optimum-intel draws the graph of transformers' model; OpenVINO's PyTorch frontend turns linears that hold
compressed-tensors' packed tensors into u4 constants. It needs an environment of its own, because optimum-intel 2.2 does
not take the transformers that gemma-awq needs:
    pip install optimum-intel==2.2.0 openvino==2026.4.1 transformers==5.0.0 compressed-tensors==0.20.0 torch==2.13.0
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from optimum.exporters.openvino import export_from_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

METHOD = "compressed-tensors"


class Section(dict[str, str]):
    """What OpenVINO's frontend asks of a model's quantization section."""

    quant_method = METHOD


def main(dense: Path, packed: Path, output: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tensors = {name: one for file in sorted(packed.glob("*.safetensors")) for name, one in load_file(file).items()}
    section = json.loads((packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    (group,) = section["config_groups"].values()
    scheme = SimpleNamespace(weights=SimpleNamespace(**group["weights"]), format=section["format"])
    attached = 0
    for name, module in model.named_modules():
        if f"{name}.weight_packed" not in tensors:
            continue
        module.register_buffer("weight_packed", tensors[f"{name}.weight_packed"])
        module.register_buffer("weight_zero_point", tensors[f"{name}.weight_zero_point"])
        module.register_buffer("weight_scale", tensors[f"{name}.weight_scale"].float())
        module.quantization_scheme = scheme
        attached += 1
    stored = sum(name.endswith(".weight_packed") for name in tensors)
    if attached != stored:  # multimodal files have other names, and transformers has no linears for single experts
        raise SystemExit(f"{attached} of {stored} packed linears are linears of transformers' model: not exported.")
    model.config.quantization_config = Section(quant_method=METHOD)
    export_from_model(model, output, task="text-generation-with-past", stateful=True)
    print(f"{attached} linears as u4 in {output}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
