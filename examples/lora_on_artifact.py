"""LoRA on top of an artifact: its 4-bit weights stay as they are, and an adapter is trained on conversations.

    pip install ".[examples]"
    python examples/lora_on_artifact.py my-awq conversations.jsonl my-lora

A weight is expanded for each product and again for its gradient, so that only the 4-bit weights are held. Runs on a
GPU, and, for small models and few steps, on a CPU. Experts stay as they are, without adapters. The adapter belongs to
this artifact: docs/fine-tuning.md says what can be done with it.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from conversations import FORMAT, conversations
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.kernels.reference import ReferenceLinear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.transformers_model import build_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Product(torch.autograd.Function):
    """x [..., K] times a packed weight: [..., N]. Between forward and backward only the packed tensors are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *packed: Tensor) -> Tensor:
        ctx.save_for_backward(*packed)
        return F.linear(x, expanded(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ expanded(ctx.saved_tensors, gradient.dtype), None, None, None


def expanded(packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that packed tensors stand for."""
    return dequantize(*unpack_weight(PackedWeight(*packed))).to(dtype)


class FrozenLinear(ReferenceLinear):
    """A linear that holds the tensors of the file and lets gradients through to its input."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__(packed)
        self.in_features, self.out_features = packed.qweight.shape[0], packed.scales.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.qweight, self.qzeros, self.scales)


def open_artifact(folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of an artifact, whose packed linears are `FrozenLinear`."""
    checkpoint = Checkpoint(Path(folder))
    if checkpoint.quantization is None:
        raise UsageError(f"{folder} holds 16-bit weights, not an artifact.", "finetune_qlora.py is for those.")
    model = build_model(
        checkpoint, device, dtype,
        lambda packed, device, _: FrozenLinear(PackedWeight(*(tensor.to(device) for tensor in packed))),
    )  # fmt: skip
    model.name_or_path = folder  # the adapter's config says what it was trained on
    return model


def on_frozen_linears(config: LoraConfig) -> LoraConfig:
    """A config whose adapters go around `FrozenLinear` as they go around the AWQ linears that PEFT knows."""
    warnings.filterwarnings("ignore", "Unsupported layer type", module="peft")  # it finds the sizes all the same
    config._register_custom_module({FrozenLinear: AwqLoraLinear})
    return config


def with_adapter(model: Any, adapter: str) -> PeftModel:
    """A model that `open_artifact` returned, with an adapter that was trained on its artifact."""
    return PeftModel.from_pretrained(model, adapter, config=on_frozen_linears(LoraConfig.from_pretrained(adapter)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FORMAT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="a 4-bit artifact: a folder")
    parser.add_argument("data")
    parser.add_argument("output", type=Path, help="folder for the adapter")
    parser.add_argument("--split", default="train_sft", help="of a hub dataset (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="conversations per step and device")
    parser.add_argument("--length", type=int, default=1024, help="most tokens of a conversation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    try:
        model = open_artifact(
            args.artifact, torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
        )
    except GemmaAwqError as error:
        parser.error(f"{error.message} {error.hint}")
    tokenizer = AutoTokenizer.from_pretrained(args.artifact)
    if tokenizer.chat_template is None:
        parser.error(f"{args.artifact} has no chat template; take an instruct model's artifact")
    model.set_attn_implementation("eager")  # as Google advises for training Gemma 2 and 3
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        get_peft_model(model, on_frozen_linears(lora)),
        train_dataset=conversations(args.data, args.split),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 20,
            max_length=args.length,
            bf16=False,  # the adapters are float32 between linears of bfloat16
            use_cpu=not gpu,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
    )
    trainer.train()
    trainer.save_model(str(args.output))


if __name__ == "__main__":
    main()
