"""OpenAI's requests, read strictly: a field whose meaning would be lost is an error, a harmless one is ignored.

Knows JSON and what a request asks for; knows neither models nor HTTP. The other direction is in `answers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate import MOST_LOGPROBS
from gemma_awq_cli.generate.grammar import ANY_OBJECT, Grammar, GrammarError, schema_grammar
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.text.prompter import Message, Tool
from gemma_awq_cli.models.text.tool_calls import MOST_TOOLS, NAME, NAME_RULE, read_tool
from gemma_awq_cli.serve.json_fields import JsonFields, RequestError, shown
from gemma_awq_cli.system.json_input import parse_json, parse_json_object

MOST_CHOICES = 128  # n, OpenAI's own bound
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
MOST_PROMPTS = 128
MOST_MESSAGES = 10_000
MOST_BIASES = 1024  # OpenAI takes 300
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's answer may fill the context
LARGEST = 2**63 - 1
# They change nothing in an answer: bookkeeping of OpenAI's service.
HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
_EFFORTS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

PromptLike = str | list[int] | list[Message]


@dataclass(frozen=True)
class GenerationRequest:
    """What a request asks for.

    chat: whether it is a conversation to answer, else prompts to continue. prompts: one conversation; or texts, or
    prompts as token ids. model: the name that was asked for. n: answers per prompt. max_tokens: None for as many as the
    context holds. logprobs, grammar: see `GenerationOptions`. think: see `Prompter.chat`. ignore_eos: whether answers
    go on after a token that ends them, for load tests. tools: that may be called. forced: one of these must be.
    most_calls: of tools, per answer; None for as many as the model wants.
    """

    chat: bool
    prompts: Sequence[PromptLike]
    model: str | None
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    logprobs: int | None
    think: bool | None
    grammar: Grammar | None
    tools: Sequence[Tool]
    forced: Sequence[Tool]
    most_calls: int | None
    stream: bool
    include_usage: bool
    ignore_eos: bool


def parse_body(body: bytes) -> JsonFields:
    """Return the fields of a request's body. Raises RequestError for what is not a JSON object in UTF-8."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"The request is not UTF-8 at byte {error.start}.") from None
    try:
        return JsonFields(parse_json(text, "The request", ""))
    except GemmaAwqError as error:
        raise error if isinstance(error, RequestError) else RequestError(error.message) from None


def read_chat(body: bytes, vocabulary: int) -> GenerationRequest:
    """Read a request to /v1/chat/completions. vocabulary: how many tokens the model has."""
    fields = parse_body(body)
    messages = _messages(fields)
    wants = fields.flag("logprobs")
    count = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if count is not None and not wants:
        raise fields.wrong("top_logprobs", "needs logprobs to be true")
    longest = [fields.integer(name, 1, LARGEST) for name in ("max_completion_tokens", "max_tokens")]
    fields.neutral("functions", ([],), "give tools instead, which have replaced functions")
    fields.neutral("function_call", ("none", "auto"), "give tool_choice instead, which has replaced function_call")
    tools, forced = _tool_choice(fields, _tools(fields))
    fields.neutral("modalities", (["text"],), "only text is generated")
    think = _think(fields)
    grammar = _response_format(fields, think or False)
    if grammar is not None and tools:
        raise fields.wrong("response_format", "cannot be combined with tools, unless tool_choice is none")
    return _request(
        fields,
        chat=True,
        grammar=grammar,
        tools=tools,
        forced=forced,
        most_calls=1 if fields.flag("parallel_tool_calls") is False else None,
        prompts=[messages],
        max_tokens=next((value for value in longest if value is not None), None),
        logprobs=(count or 0) if wants else None,
        think=think,
        vocabulary=vocabulary,
    )


def read_completion(body: bytes, vocabulary: int) -> GenerationRequest:
    """Read a request to /v1/completions. vocabulary: how many tokens the model has."""
    fields = parse_body(body)
    prompts = _prompts(fields, vocabulary)
    fields.neutral("echo", (False,), "the prompt is not repeated")
    fields.neutral("suffix", ("",), "text is not inserted")
    fields.neutral("best_of", (1,), "answers are not ranked; ask for several with n")
    return _request(
        fields,
        chat=False,
        grammar=_response_format(fields, False),
        tools=(),
        forced=(),
        most_calls=None,
        prompts=prompts,
        max_tokens=fields.integer("max_tokens", 1, LARGEST) or COMPLETION_TOKENS,
        logprobs=fields.integer("logprobs", 0, MOST_LOGPROBS),
        think=None,
        vocabulary=vocabulary,
    )


def _request(
    fields: JsonFields,
    *,
    chat: bool,
    prompts: Sequence[PromptLike],
    max_tokens: int | None,
    logprobs: int | None,
    think: bool | None,
    grammar: Grammar | None,
    tools: Sequence[Tool],
    forced: Sequence[Tool],
    most_calls: int | None,
    vocabulary: int,
) -> GenerationRequest:
    """Read what both kinds of requests have, and refuse what is left."""
    stream = fields.flag("stream") or False
    include_usage = _stream_options(fields, stream)
    ignore_eos = fields.flag("ignore_eos") or False
    if ignore_eos and (grammar is not None or forced):
        raise fields.wrong("ignore_eos", "cannot be used with a grammar, which ends")
    request = GenerationRequest(
        chat,
        prompts,
        fields.text("model"),
        fields.integer("n", 1, MOST_CHOICES) or 1,
        max_tokens,
        _stop(fields),
        _sampling(fields, vocabulary),
        logprobs,
        think,
        grammar,
        tools,
        forced,
        most_calls,
        stream,
        include_usage,
        ignore_eos,
    )
    fields.finish(HARMLESS)
    return request


def _messages(fields: JsonFields) -> list[Message]:
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "must be a list of at least one message")
    if len(given) > MOST_MESSAGES:
        raise fields.wrong("messages", f"must have at most {MOST_MESSAGES} messages")
    called: dict[str, str] = {}
    messages = [_message(JsonFields(item, f"messages[{index}]."), called) for index, item in enumerate(given)]
    if messages[-1]["role"] not in ("user", "tool"):
        raise fields.wrong("messages", "must end with a message of the user or of a tool")
    return messages


def _message(fields: JsonFields, called: dict[str, str]) -> Message:
    """Read a message. called: the tools by the ids of their calls; those of this message are added."""
    role = fields.choice("role", _ROLES)
    if role is None:
        raise fields.wrong("role", f"must be one of {', '.join(_ROLES)}")
    message: Message = {"role": role}
    calls = _past_calls(fields) if role == "assistant" else []
    message["content"] = _content(fields, optional=bool(calls))
    if calls:
        message["tool_calls"] = calls
        called |= {call["id"]: call["function"]["name"] for call in calls}
    if role == "tool":
        message["tool_call_id"] = fields.text("tool_call_id")
        if message["tool_call_id"] not in called:
            raise fields.wrong("tool_call_id", "must be the id of an earlier call")
        message["name"] = called[message["tool_call_id"]]
    # thoughts are no part of a conversation; a name is not shown to the model
    fields.finish(("name", "reasoning_content", "reasoning", "refusal", "annotations", "audio"))
    return message


def _past_calls(fields: JsonFields) -> list[dict[str, Any]]:
    """Read the tool_calls of an earlier answer; their arguments are objects then, as chat templates want them."""
    calls = []
    for index, item in enumerate(fields.items("tool_calls", MOST_TOOLS)):
        call = JsonFields(item, f"{fields.place}tool_calls[{index}].")
        identity, kind = call.text("id"), call.text("type")
        function = JsonFields(call.take("function"), f"{call.place}function.")
        name, text = _tool_name(function), function.text("arguments")
        if identity is None or kind not in (None, "function"):
            raise call.wrong("id" if identity is None else "type", "must be the call's id, and its type function")
        try:
            arguments = parse_json_object(text or "{}", f"{function.place}arguments", "")
        except GemmaAwqError as error:
            raise RequestError(error.message, f"{function.place}arguments") from None
        function.finish()
        call.finish(("index",))
        calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _tools(fields: JsonFields) -> list[Tool]:
    def read(index: int, item: Any) -> Tool:
        def wrong(place: str, why: str) -> RequestError:
            param = f"tools[{index}]" + (f".{place}" if place else "")
            return RequestError(f"{param} {why}.", param)

        return read_tool(item, wrong)

    return [read(index, item) for index, item in enumerate(fields.items("tools", MOST_TOOLS))]


def _tool_name(function: JsonFields) -> str:
    name = function.text("name")
    if name is None or not NAME.fullmatch(name):
        raise function.wrong("name", NAME_RULE)
    return name


def _tool_choice(fields: JsonFields, tools: list[Tool]) -> tuple[list[Tool], list[Tool]]:
    """Return the tools that the model is told of, and those of which it must call one."""
    choice = fields.take("tool_choice")
    if choice is None or choice == "auto":
        return tools, []
    if choice == "none":
        return [], []
    if choice == "required" and tools:
        return tools, tools
    if not isinstance(choice, dict):
        raise fields.wrong("tool_choice", "must be none, auto, or with tools required or a function")
    given = JsonFields(choice, "tool_choice.")
    kind = given.text("type")
    name = _tool_name(JsonFields(given.take("function"), "tool_choice.function."))
    given.finish()
    forced = [tool for tool in tools if tool["function"]["name"] == name]
    if kind != "function" or not forced:
        raise fields.wrong("tool_choice", "must name a function of tools")
    return tools, forced


def _content(fields: JsonFields, optional: bool) -> str:
    content = fields.take("content")
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise fields.wrong("content", "must be a string or a list of text parts")
    texts = []
    for index, item in enumerate(content):
        part = JsonFields(item, f"{fields.place}content[{index}].")
        kind, text = part.text("type"), part.text("text")
        if kind != "text":
            raise part.wrong("type", f"must be text, not {shown(kind)}: this server reads only text")
        if text is None:
            raise part.wrong("text", "must be a string")
        texts.append(text)
    return "".join(texts)


def _prompts(fields: JsonFields, vocabulary: int) -> list[PromptLike]:
    given = fields.take("prompt")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(item, int) for item in given):
            return [_ids(fields, given, vocabulary)]
        if len(given) > MOST_PROMPTS:
            raise fields.wrong("prompt", f"must have at most {MOST_PROMPTS} prompts")
        if all(isinstance(item, str) for item in given):
            return list(given)
        if all(isinstance(item, list) and item for item in given):
            return [_ids(fields, item, vocabulary) for item in given]
    raise fields.wrong("prompt", "must be a string, a list of token ids, or a list of either")


def _ids(fields: JsonFields, given: list[Any], vocabulary: int) -> list[int]:
    for token in given:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise fields.wrong("prompt", f"has {shown(token)}; token ids run from 0 to {vocabulary - 1}")
    return list(given)


def _stream_options(fields: JsonFields, stream: bool) -> bool:
    given = fields.take("stream_options")
    if given is None:
        return False
    if not stream:
        raise fields.wrong("stream_options", "needs stream to be true")
    options = JsonFields(given, "stream_options.")
    include = options.flag("include_usage") or False
    options.finish(("include_obfuscation",))
    return include


def _response_format(fields: JsonFields, thinks: bool) -> Grammar | None:
    """The grammar that the answer must match."""
    given = fields.take("response_format")
    if given is None:
        return None
    form = JsonFields(given, "response_format.")
    kind = form.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise form.wrong("type", f"must be text, json_object or json_schema, not {shown(kind)}")
    schema: Any = ANY_OBJECT if kind == "json_object" else None
    strict: bool | None = None
    if kind == "json_schema":
        described = JsonFields(form.take("json_schema"), "response_format.json_schema.")
        schema, strict = described.take("schema"), described.flag("strict")
        described.finish(("name", "description"))
        if not isinstance(schema, dict | bool):
            raise described.wrong("schema", "must be a JSON schema")
    form.finish()
    return None if schema is None else _grammar_of(schema, strict is not False, thinks, "response_format")


def _grammar_of(schema: Any, strict: bool, thinks: bool, param: str) -> Grammar:
    try:
        return schema_grammar(schema, strict, thinks)
    except GrammarError as error:
        raise RequestError(error.message, param) from None


def _stop(fields: JsonFields) -> tuple[str, ...]:
    given = fields.take("stop")
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.wrong("stop", "must be a string or a list of strings, none of them empty")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise fields.wrong("stop", f"must have at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters")
    return tuple(stops)


def _sampling(fields: JsonFields, vocabulary: int) -> Sampling:
    top_k = fields.integer("top_k", -1, 2**31)
    return Sampling(
        temperature=fields.number("temperature", 0, 100),
        top_k=0 if top_k == -1 else top_k,  # both turn it off
        top_p=fields.number("top_p", 0, 1),
        min_p=fields.number("min_p", 0, 1),
        seed=fields.integer("seed", -LARGEST, LARGEST),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=_bias(fields, vocabulary),
    )


def _bias(fields: JsonFields, vocabulary: int) -> tuple[tuple[int, float], ...]:
    given = fields.take("logit_bias")
    if given is None:
        return ()
    if not isinstance(given, dict) or len(given) > MOST_BIASES:
        raise fields.wrong("logit_bias", f"must be an object of at most {MOST_BIASES} token ids")
    numbers = JsonFields(given, "logit_bias.")
    bias: dict[int, float] = {}
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocabulary):
            raise fields.wrong("logit_bias", f"has {shown(name)}; token ids run from 0 to {vocabulary - 1}")
        bias[int(name)] = numbers.number(name, -100, 100) or 0.0
    return tuple(bias.items())


def _think(fields: JsonFields) -> bool | None:
    """Whether the model is to think, by either of the two ways that clients ask for it."""
    effort: bool | None = fields.choice("reasoning_effort", _EFFORTS)
    given = fields.take("chat_template_kwargs")
    if given is None:
        return effort
    switches = JsonFields(given, "chat_template_kwargs.")
    think = switches.flag("enable_thinking")
    switches.finish()
    if effort is not None and think is not None and effort != think:
        raise fields.wrong("reasoning_effort", "contradicts chat_template_kwargs.enable_thinking")
    return effort if think is None else think
