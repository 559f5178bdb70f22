"""The baseline: round a checkpoint to nearest in the same layout, without calibration.

python benchmarks/round_to_nearest.py CHECKPOINT_DIR OUT_DIR [--group-size 128]
"""

import argparse
from pathlib import Path

import torch

from gemma_awq_cli.awq.grid import minmax_grid, quantize
from gemma_awq_cli.awq.packing import pack_weight
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files, side_files
from gemma_awq_cli.models.checkpoints.staging import StagedFolder
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize.plan import choose_group_size, make_plan, stored_dtype
from gemma_awq_cli.quantize.report import artifact_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint)
    stack = TextStack(checkpoint, torch.device("cpu"))
    choose_group_size(checkpoint.shape.layouts, args.group_size)
    none = torch.zeros(0, 8)
    plan = make_plan(checkpoint, stack, args.group_size, stored_dtype(checkpoint, None), Rows(none, none, "", "", ""))
    quantized = {tensor.name.rpartition(".")[0] for tensor in plan.tensors if tensor.name.endswith(".qweight")}
    with StagedFolder(args.output) as staged:
        folder = staged.folder
        writer = TensorWriter(folder, plan.tensors)
        for name in stack.shapes:
            key = checkpoint.key(name)
            weight = checkpoint.read([name])[name].to(plan.dtype)
            base = key.removesuffix(".weight")
            if base not in quantized:
                writer.write(key, weight)
                continue
            grid = minmax_grid(weight.float(), args.group_size)
            for kind, tensor in pack_weight(quantize(weight.float(), grid), grid)._asdict().items():
                writer.write(f"{base}.{kind}", tensor)
        writer.finish()
        copy_side_files(side_files(checkpoint.folder), folder)
        write_json(folder / CONFIG, artifact_config(checkpoint, plan))
    print(args.output)


if __name__ == "__main__":
    main()
