"""The Modelfile. What Go's text/template makes of these templates was checked with Go 1.27."""

import pytest

from gemma_awq_cli.export.ollama import modelfile

SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "do_sample": True, "pad_token_id": 0}


@pytest.mark.parametrize(("end", "begin"), [("<end_of_turn>", "<start_of_turn>"), ("<turn|>", "<|turn>")])
def test_a_chat_model(end: str, begin: str) -> None:
    text = modelfile("model-Q5_0.gguf", end, True, SAMPLING)
    assert text.startswith("FROM ./model-Q5_0.gguf\nTEMPLATE")
    assert f"{begin}user\n" in text
    assert text.count(f"{begin}model\n") == 2  # earlier turns, and the one to be written
    assert f'PARAMETER stop "{end}"\nPARAMETER temperature 1.0\nPARAMETER top_k 64\nPARAMETER top_p 0.95\n' in text
    assert "<bos>" not in text


def test_a_base_model_continues_the_prompt() -> None:
    text = modelfile("a.gguf", "<end_of_turn>", False, {"temperature": "hot", "top_k": True})
    assert text == 'FROM ./a.gguf\nTEMPLATE """{{ .Prompt }}"""\n'
