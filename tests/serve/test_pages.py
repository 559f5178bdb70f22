"""A browser's fetch, as Node has it: a stream is read piece by piece, and only pages of an allowed origin may."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import Serve

pytest.importorskip("uvicorn")

PAGE = """
const reply = await fetch(process.argv[1] + "/v1/chat/completions", {
  method: "POST",
  headers: {"content-type": "application/json", origin: process.argv[2]},
  body: JSON.stringify({messages: [{role: "user", content: "Hello"}], stream: true, max_tokens: 12, temperature: 0}),
});
let text = "", rest = "", events = 0;
for await (const part of reply.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + part).split("\\n");
  rest = lines.pop();
  for (const line of lines) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    events += 1;
    text += JSON.parse(line.slice(6)).choices[0]?.delta?.content ?? "";
  }
}
const allowed = reply.headers.get("access-control-allow-origin");
console.log(JSON.stringify({status: reply.status, allowed, events, text}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_fetch_reads_a_stream(serve: Serve, chat_folder: Path) -> None:
    served = serve(chat_folder, origins=("https://a.example",))
    wanted = served.chat("Hello", max_tokens=12, temperature=0).json["choices"][0]["message"]["content"]

    def page(origin: str) -> dict[str, object]:
        command = ["node", "--input-type=module", "-e", PAGE, served.url, origin]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        seen: dict[str, object] = json.loads(done.stdout)
        return seen

    seen = page("https://a.example")
    assert (seen["status"], seen["allowed"], seen["text"]) == (200, "https://a.example", wanted)
    assert isinstance(seen["events"], int)
    assert seen["events"] > 3
    assert (page("https://b.example")["status"], page("null")["status"]) == (403, 403)
