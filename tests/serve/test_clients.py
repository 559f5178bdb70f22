"""The clients that people use: OpenAI's own library and simonw's llm, against a running server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Serve, Served, until

pytest.importorskip("uvicorn")

LONG = {"max_tokens": 100, "temperature": 0, "logit_bias": {"1": -100, "5": -100}}
SHORT = {**LONG, "max_tokens": 12}


@pytest.fixture
def client(chat: Served) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_openais_client_answers_and_streams(client: Any, chat: Served) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    asked = {
        "model": model.id,
        "messages": [{"role": "user", "content": "Hello"}],
        "seed": 3,
        "max_completion_tokens": 9,
    }
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    text, usage = "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.total_tokens == whole.usage.total_tokens
    completed = client.completions.create(model=model.id, prompt="Hello", max_tokens=4, n=2, extra_body={"min_p": 0.1})
    assert len(completed.choices) == 2
    ended = {**asked, "logit_bias": {"5": 100}}  # the token that ends a turn
    with client.chat.completions.stream(**ended) as stream:
        assert list(stream)
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_openais_client_knows_the_errors(client: Any, serve: Serve, chat_folder: Path) -> None:
    import openai

    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.chat.completions.create(model="gpt", messages=messages)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="gemma-4-tiny-it", messages=messages, temperature=-1)
    assert wrong.value.param == "temperature"
    served = serve(chat_folder, keys=("key",), max_rows=1, max_waiting=0, timeout=1.0)
    other = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    other = openai.OpenAI(base_url=f"{served.url}/v1", api_key="key", max_retries=0)
    with served.held():
        waiting = served.connect(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 15\r\n\r\n"
            b'{"prompt": "x"}'
        )
        until(lambda: served.service.engine.live == 1)
        with pytest.raises(openai.RateLimitError) as busy:
            other.completions.create(model="gemma-4-tiny-it", prompt="x")
        assert int(busy.value.response.headers["retry-after"]) >= 1
        waiting.close()
        until(lambda: served.service.engine.live == 0)
        with pytest.raises(openai.APIError, match="took more than 1 s"):
            list(other.completions.create(model="gemma-4-tiny-it", prompt="x", stream=True))


def test_openais_client_leaves_in_mid_stream(client: Any, chat: Served) -> None:
    for chunk in client.completions.create(model="gemma-4-tiny-it", prompt="x", stream=True, **LONG):
        assert chunk.choices
        break
    client.close()
    until(chat.idle)


def test_many_at_once_with_the_asynchronous_client(client: Any, chat: Served) -> None:
    import asyncio

    import openai

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key="none", timeout=60) as many:
            asked = [
                many.completions.create(model="gemma-4-tiny-it", prompt=f"Hello {index}", **SHORT)
                for index in range(16)
            ]
            return [completion.choices[0].text for completion in await asyncio.gather(*asked)]

    texts = asyncio.run(run())
    for index in (0, 7, 15):
        alone = client.completions.create(model="gemma-4-tiny-it", prompt=f"Hello {index}", **SHORT)
        assert texts[index] == alone.choices[0].text


@pytest.mark.slow
def test_llm(chat: Served, tmp_path: Path) -> None:
    """simonw's llm, as its documentation sets up a compatible server."""
    pytest.importorskip("llm")
    models = [{"model_id": "tiny", "model_name": "gemma-4-tiny-it", "api_base": f"{chat.url}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    wanted = chat.chat("Hello", temperature=0, max_tokens=12).json["choices"][0]["message"]["content"]
    for stream in ([], ["--no-stream"]):
        command = [
            sys.executable,
            "-m",
            "llm",
            "-m",
            "tiny",
            "Hello",
            "-o",
            "temperature",
            "0",
            "-o",
            "max_tokens",
            "12",
        ]
        done = subprocess.run([*command, *stream], env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().strip() == wanted.strip()
