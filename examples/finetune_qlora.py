"""Supervised fine-tuning with QLoRA: the base model in 4 bits (bitsandbytes nf4), and a LoRA adapter that is trained on
conversations.

    pip install ".[examples]"
    python examples/finetune_qlora.py google/gemma-3-1b-it HuggingFaceH4/ultrachat_200k my-lora
    gemma-awq quantize google/gemma-3-1b-it --adapter my-lora -o my-awq

Runs on a GPU, and, for small models and few steps, on a CPU.
"""

import argparse
from pathlib import Path

import torch
from conversations import FORMAT, conversations
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FORMAT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a 16-bit Gemma: a hub id or a folder")
    parser.add_argument("data")
    parser.add_argument("output", type=Path, help="folder for the adapter")
    parser.add_argument("--split", default="train_sft", help="of a hub dataset (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="conversations per step and device")
    parser.add_argument("--accumulate", type=int, default=4, help="steps whose gradients are added up")
    parser.add_argument("--length", type=int, default=1024, help="most tokens of a conversation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        parser.error(f"{args.model} has no chat template; take an instruct model")
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.bfloat16,
        device_map={"": 0 if gpu else "cpu"},
        attn_implementation="eager",  # as Google advises for training Gemma 2 and 3
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    trainer = SFTTrainer(
        model,
        train_dataset=conversations(args.data, args.split),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05, target_modules=LINEARS, task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 20,
            max_length=args.length,
            bf16=gpu,
            use_cpu=not gpu,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
    )
    trainer.train()
    trainer.save_model(str(args.output))
    print(f"Next: gemma-awq quantize {args.model} --adapter {args.output}")


if __name__ == "__main__":
    main()
