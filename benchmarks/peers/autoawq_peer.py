"""AutoAWQ 0.2.9's quantizer on a Gemma 3 text model, 4 bits, groups of 128. A peer that needs its own environment.

pip install torch==2.13.0 && pip install autoawq==0.2.9 transformers==4.51.3 "datasets<4"
python benchmarks/peers/autoawq_peer.py CHECKPOINT_DIR OUT_DIR --text FILE [--rows 16] [--layers N]

The algorithm is AutoAWQ's, unchanged. Three things around it are changed:
- Gemma 3 is added to its tables like Gemma 2, with the rotary table that each layer really uses.
- Its fold into norms knows the `1 + weight` of Gemma 1 and 2 by their classes; Gemma 3's class is added.
- On a CPU, its saved copy of the weights aliases the live ones (`.cpu()` copies nothing there), so that the first
  in-place scale would spoil every later restore. Here the copy is a real one.

Prints the seconds that its `quantize` took. --layers keeps only the first layers, to time one layer.
"""

import time
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.models import auto, base
from awq.models.gemma2 import Gemma2AWQForCausalLM
from awq.quantize import scale
from awq.quantize.quantizer import AwqQuantizer
from rows import SEQ_LEN, arguments, windows
from transformers import AutoTokenizer
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

parser = arguments(__doc__)
parser.add_argument("--layers", type=int)
args = parser.parse_args()


class Gemma3(Gemma2AWQForCausalLM):
    layer_type = "Gemma3DecoderLayer"

    @staticmethod
    def get_layers_for_scaling(module: Any, input_feat: Any, module_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        which = "local" if module.is_sliding else "global"
        own = {**module_kwargs, "position_embeddings": module_kwargs[f"position_embeddings_{which}"]}
        return Gemma2AWQForCausalLM.get_layers_for_scaling(module, input_feat, own)


class Quantizer(AwqQuantizer):
    def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any) -> Any:
        live = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in live().items()}
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
        finally:
            del module2inspect.state_dict


auto.AWQ_CAUSAL_LM_MODEL_MAP["gemma3_text"] = Gemma3
scale.Gemma2RMSNorm = (Gemma2RMSNorm, Gemma3RMSNorm)  # it asks `isinstance`
scale.allowed_norms.append(Gemma3RMSNorm)
base.TRANSFORMERS_AUTO_MAPPING_DICT["gemma3_text"] = "AutoModelForCausalLM"
tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
model = AutoAWQForCausalLM.from_pretrained(
    args.checkpoint, torch_dtype=torch.bfloat16, device_map="cpu", use_cache=False, attn_implementation="eager"
)
if args.layers is not None:
    del model.model.model.layers[args.layers :]
started = time.perf_counter()
model.quantize(
    tokenizer,
    quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
    calib_data=windows(tokenizer, args.text, args.rows),
    max_calib_samples=args.rows,
    max_calib_seq_len=SEQ_LEN,
    quantizer_cls=Quantizer,
)
print(f"seconds {time.perf_counter() - started:.1f}")
if args.layers is None:
    model.save_quantized(args.output)
    tokenizer.save_pretrained(args.output)
