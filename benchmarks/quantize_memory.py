"""Peak memory of a whole `gemma-awq quantize`, its plan, and its seconds per layer. Linux only.

python benchmarks/quantize_memory.py CHECKPOINT_DIR OUT_DIR [any option of quantize]

RssAnon is the process's own memory. VmHWM also counts the pages of mapped files, which the kernel may drop.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

FIELDS = ("RssAnon", "VmHWM")


def main() -> None:
    checkpoint, output, *options = sys.argv[1:]
    command = [str(Path(sys.executable).with_name("gemma-awq")), "quantize", checkpoint, "-o", output, *options]
    plan = json.loads(subprocess.run([*command, "--dry-run", "--json"], stdout=subprocess.PIPE, check=True).stdout)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = dict.fromkeys(FIELDS, 0)
    while process.poll() is None:
        for field, kib in re.findall(
            r"^(\w+):\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
        ):
            if field in peaks:
                peaks[field] = max(peaks[field], int(kib) * 1024)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    report = json.loads((Path(output) / "quantization_report.json").read_text())
    for field, peak in peaks.items():
        print(f"{field} {peak / 1e9:.2f} GB")
    print(f"planned {plan['memory_bytes'] / 1e9:.2f} GB, {plan['estimated_seconds']:.0f} s")
    seconds = report["run"]["seconds_a_layer"]
    print(f"{report['run']['seconds']:.0f} s; per layer: {', '.join(f'{s:.0f}' for s in seconds)} s")


if __name__ == "__main__":
    main()
