"""This tool. python decode_ours.py MODEL_DIR 16bit|int8|int4"""

import sys
import time

START = time.time()

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from decode_server import serve  # noqa: E402

from gemma_awq_cli.models.forward.loading import open_model  # noqa: E402

opened = open_model(Path(sys.argv[1]), torch.device("cpu"), head=sys.argv[2])
print("\n".join(opened.kernel_report()), file=sys.stderr)


def open_row():
    session = opened.session(1, 4096)
    return lambda ids: session.next_logits([ids])[0]


serve(START, open_row)
