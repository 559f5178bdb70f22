"""Supervised fine-tuning of all weights, shared out over processes by PyTorch's FSDP: more GPUs, or more machines.

    pip install ".[examples]"
    torchrun --nproc-per-node 8 examples/finetune_fsdp.py google/gemma-3-1b-it HuggingFaceH4/ultrachat_200k my-model
    gemma-awq quantize my-model -o my-awq

Each process holds its part of the weights, gradients and optimizer states. The result is one ordinary 16-bit
checkpoint. Without GPUs the processes compute on the CPU, to try it with a small model.
"""

import argparse
import os
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.distributed as dist
from conversations import FORMAT, conversations
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100  # the label of what is not learned


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FORMAT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a 16-bit Gemma: a hub id or a folder")
    parser.add_argument("data")
    parser.add_argument("output", type=Path, help="folder for the model")
    parser.add_argument("--split", default="train_sft", help="of a hub dataset (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="conversations per step and process")
    parser.add_argument("--length", type=int, default=1024, help="most tokens of a conversation")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        parser.error(f"{args.model} has no chat template; take an instruct model")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    torch.manual_seed(0)
    # float32: the optimizer's small steps would be lost in bfloat16; each process keeps its part of it only
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    if gpu:
        model.gradient_checkpointing_enable()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if gpu else None
    shared = {} if policy is None else {"mp_policy": policy}
    for layer in model.get_decoder().layers:
        fully_shard(layer.to(device), **shared)
    fully_shard(model.to(device), **shared)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    def batch(rows: list[dict]) -> dict[str, torch.Tensor]:
        made = tokenizer.apply_chat_template(
            [row["messages"] for row in rows], padding=True, truncation=True, max_length=args.length,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORED)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "labels": labels}

    data = conversations(args.data, args.split)
    loader = DataLoader(data, args.batch, sampler=DistributedSampler(data, seed=0), collate_fn=batch)
    model.train()
    for step, inputs in enumerate(islice(cycle(loader), args.steps), 1):
        loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % max(1, args.steps // 20) == 0:
            print(f"step {step}/{args.steps}, loss {loss.item():.3f}", flush=True)
    # every process takes part; the first has all weights then
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        whole = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        whole.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()})
        whole.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"Next: gemma-awq quantize {args.output}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
