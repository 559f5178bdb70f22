"""What looks like a secret, in every form that hides one from a plain search; and what does not."""

import base64
import html
import json
import random
import string
from pathlib import Path
from urllib.parse import quote

import pytest

from gemma_awq_cli.publish.secret_search import find_secret
from tests.documents import full_bench, full_report

ROOT = Path(__file__).parent.parent.parent
_CHANCE = random.Random(7)
_ALNUM = string.ascii_letters + string.digits


def chance(count: int, of: str = _ALNUM) -> str:
    return "".join(_CHANCE.choice(of) for _ in range(count))


def _encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


HEX, UPPER, DASHED = "0123456789abcdef", string.ascii_uppercase + "234567", _ALNUM + "-_"
PROVIDERS = {
    "hugging face": f"hf_{chance(34)}", "hugging face organization": f"api_org_{chance(34)}",
    "github": f"ghp_{chance(36)}", "github app": f"ghs_{chance(36)}", "github fine": f"github_pat_{chance(82)}",
    "gitlab": f"glpat-{chance(20)}", "aws": f"AKIA{chance(16, UPPER)}", "aws session": f"ASIA{chance(16, UPPER)}",
    "openai": f"sk-{chance(48)}", "openai project": f"sk-proj-{chance(120, DASHED)}9",
    "anthropic": f"sk-ant-api03-{chance(93, DASHED)}AA1", "openrouter": f"sk-or-v1-{chance(64, HEX)}",
    "deepseek": f"sk-{chance(32, HEX)}", "google": f"AIza{chance(35, _ALNUM)}", "google oauth": f"GOCSPX-{chance(28)}",
    "google token": f"ya29.{chance(60)}", "groq": f"gsk_{chance(52)}", "xai": f"xai-{chance(80)}",
    "replicate": f"r8_{chance(37)}", "nvidia": f"nvapi-{chance(64)}", "perplexity": f"pplx-{chance(48)}",
    "tavily": f"tvly-dev-{chance(32)}", "databricks": f"dapi{chance(32, HEX)}",
    "slack": f"xoxb-123456789012-{chance(24)}",
    "slack app": f"xapp-1-A0-{chance(24)}", "slack hook": f"https://hooks.slack.com/services/T0/B0/{chance(24)}",
    "discord hook": f"https://discord.com/api/webhooks/12345/{chance(68)}", "stripe": f"sk_live_{chance(24)}",
    "stripe restricted": f"rk_live_{chance(24)}", "square": f"sq0atp-{chance(22)}",
    "shopify": f"shpat_{chance(32, HEX)}",
    "npm": f"npm_{chance(36)}", "pypi": f"pypi-AgEIcHlwaS5vcmc{chance(80)}", "docker": f"dckr_pat_{chance(27)}",
    "sendgrid": f"SG.{chance(22)}.{chance(43)}", "mailgun": f"key-{chance(32, HEX)}", "twilio": f"SK{chance(32, HEX)}",
    "digitalocean": f"dop_v1_{chance(64, HEX)}", "vault": f"hvs.{chance(90)}", "figma": f"figd_{chance(40)}",
    "linear": f"lin_api_{chance(40)}", "notion": f"ntn_{chance(46)}", "atlassian": f"ATATT3x{chance(180)}",
    "postman": f"PMAK-{chance(24, HEX)}-{chance(34, HEX)}", "grafana": f"glsa_{chance(32)}_{chance(8, HEX)}",
    "new relic": f"NRAK-{chance(27, UPPER)}", "doppler": f"dp.pt.{chance(43)}", "supabase": f"sbp_{chance(40, HEX)}",
    "pinecone": f"pcsk_{chance(70)}", "langsmith": f"lsv2_pt_{chance(32, HEX)}_{chance(10, HEX)}",
    "telegram": f"123456789:AA{chance(33)}", "discord": f"M{chance(23)}.{chance(6)}.{chance(30)}",
    "age": f"AGE-SECRET-KEY-1{chance(58, UPPER)}", "pem": "-----BEGIN PRIVATE KEY-----",
    "openssh": "-----BEGIN OPENSSH PRIVATE KEY-----", "pgp": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "jwt": f"{_encoded({'alg': 'HS256'})}.{_encoded({'sub': 'x'})}.{chance(43)}",
    "login in an address": "https://ann:hunter2x@example.com/x",
    "database": "postgres://ann:pa55word@db.example.com:5432/x",
    "token in an address": "https://oauth2:abc123def456@git.example.com/x.git",
}  # fmt: skip
NAMED = {
    "key in an address": f"https://api.example.com/v1?api_key={chance(32)}",
    "signature": f"https://x.blob.example.net/y?sv=1&sig={chance(40)}",
    "bearer": f"Authorization: Bearer {chance(40)}", "aws secret": f"aws_secret_access_key = {chance(40)}7",
    "wandb": f"WANDB_API_KEY={chance(38, HEX)}1f", "azure": f"AccountKey={chance(84)}1a==",
    "password": "password: hunter2!",
    "json": f'"client_secret": "{chance(30)}1a"', "netrc": "machine huggingface.co login ann password hunter2",
}  # fmt: skip


def hidden(secret: str) -> dict[str, bytes]:
    """The same secret as files may hold it."""
    return {
        "plain": f"x {secret} y".encode(),
        "utf-16": f"x {secret} y".encode("utf-16"),
        "utf-16-be": f"x {secret} y".encode("utf-16-be"),
        "utf-32": f"x {secret} y".encode("utf-32"),
        "json": json.dumps({"a": [{"b": f"x {secret} y"}]}).encode(),
        "json key": json.dumps({f"x {secret} y": 1}).encode(),
        "escaped": ('{"a": "' + "".join(f"\\u{ord(c):04x}" for c in secret) + '"}').encode(),
        "html": "".join(f"&#{ord(c)};" for c in secret).encode(),
        "address": quote(secret, safe="").replace("_", "%5F").encode(),
    }


@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_keys_are_found_however_they_are_written(name: str) -> None:
    for how, data in hidden(PROVIDERS[name]).items():
        assert find_secret(data, is_json=data.startswith(b"{")) is not None, how
    found = find_secret(hidden(PROVIDERS[name])["plain"])
    assert found is not None
    assert PROVIDERS[name] not in f"{found.what} {found.place}"
    if name not in ("telegram", "discord"):
        assert find_secret(hidden(PROVIDERS[name])["json"], is_json=True, vocabulary=True) is not None


def test_base64_hides_nothing() -> None:
    for name in ("hugging face", "aws", "openai", "pem"):
        word = base64.b64encode(f"token={PROVIDERS[name]}\n".encode())
        assert find_secret(b'{"x": "' + word + b'"}', is_json=True) is not None, name


@pytest.mark.parametrize("name", NAMED)
def test_what_is_called_a_secret_is_found(name: str) -> None:
    for how, data in hidden(NAMED[name]).items():
        if how != "address":
            assert find_secret(data, is_json=data.startswith(b"{")) is not None, how


@pytest.mark.parametrize(
    "field",
    ["password", "api_key", "apiKey", "use_auth_token", "hf_token", "secret", "client_secret", "db.password", "key"],
)  # fmt: skip
def test_fields_of_json_by_their_names(field: str) -> None:
    data = json.dumps({"a": {field: chance(18) + "1a"}}).encode()
    found = find_secret(data, is_json=True)
    assert found is not None
    assert find_secret(json.dumps({"a": {field: "<bos>"}}).encode(), is_json=True) is None
    assert find_secret(json.dumps({"a": {field: None}}).encode(), is_json=True) is None


def test_a_random_text_of_json_under_any_name() -> None:
    found = [find_secret(json.dumps({"x": chance(40)}).encode(), is_json=True) for _ in range(500)]
    assert sum(one is not None for one in found) > 480


WORDS = (
    "Gemma3ForConditionalGeneration", "SiglipVisionModelForImageClassification", "gemma-3-27b-it-qat-q4_0-unquantized",
    "0123456789abcdef" * 4, "550e8400-e29b-41d4-a716-446655440000", "2026-11-26T07:34:23+00:00", "<start_of_image>",
    "https://huggingface.co/google/gemma-3-1b-it?library=transformers&tab=files",
    "sk-learn, task-oriented, hf_transfer",
    "transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer", "google/gemma-3-1b-it", "key: value",
    "token = '<bos>'",
    "password", "The password is secret.", "https://example.com:8080/x@y", "ssh://git@github.com/x/y",
    "Intel64 Family 6",
    "model.language_model.layers.25.self_attn.q_proj.weight", "Linux-6.1.0-x86_64-with-glibc2.36",
    "13th Gen Intel(R) i7",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_what_is_no_secret(word: str) -> None:
    assert find_secret(word.encode()) is None
    assert find_secret(json.dumps({"a": word}).encode(), is_json=True) is None
    assert len(word) == 64 or find_secret(json.dumps({"bos_token": word}).encode(), is_json=True) is None


def test_our_own_files_and_the_licences_are_none() -> None:
    for document in (full_report(), full_bench()):
        assert find_secret(json.dumps(document).encode(), is_json=True) is None
    for path in (ROOT / "LICENSE", ROOT / "README.md", *(ROOT / "gemma_awq_cli" / "publish" / "licences").iterdir()):
        assert find_secret(path.read_bytes()) is None, path
        assert find_secret(html.escape(path.read_text()).encode()) is None, path


def test_a_large_vocabulary_is_searched_and_is_no_secret() -> None:
    pieces = [chance(_CHANCE.randint(1, 9), _ALNUM + "_-/+.='") for _ in range(5000)]
    words = ["".join(_CHANCE.choices(pieces, k=_CHANCE.randint(1, 3))) for _ in range(60_000)]
    tokenizer = {
        "model": {"vocab": {word: index for index, word in enumerate(words)}, "merges": [[w, "x"] for w in words]}
    }
    assert find_secret(json.dumps(tokenizer).encode(), is_json=True, vocabulary=True) is None
    tokenizer["model"]["vocab"][PROVIDERS["github"]] = 1  # type: ignore[index]
    assert find_secret(json.dumps(tokenizer).encode(), is_json=True, vocabulary=True) is not None
