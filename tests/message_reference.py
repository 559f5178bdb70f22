"""docs/messages.md: every message of an error that a user can meet, with its hint, read from the code.

`python -m tests.command_reference` writes it. A message is what is passed to an error of `gemma_awq_cli/errors.py` or
one derived from it; what is known only when it is raised becomes `…`. Where a function is given the text, its callers
are read.
"""

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gemma_awq_cli.system.extras import install_hint

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_awq_cli"
REFERENCE = ROOT / "docs" / "messages.md"
UNKNOWN = "…"
DEPTH = 3  # callers of callers of callers
MOST = 12  # ways of one text; beyond that what differs is left open
ENOUGH = 8  # letters by which a message can be found
NO_HINT = ("RequestError",)  # whose second argument is something else
# The folders of the package, in the order in which a user meets them.
SUBJECTS = {
    "cli": "The command line",
    "models.checkpoints": "Models, files and the hub",
    "models.gemma": "Values of config.json",
    "models.packed_formats": "4-bit formats",
    "models.text": "Tokenizers and chat templates",
    "models.forward": "Computing with a model",
    "calibration_text": "Calibration text",
    "quantize": "Quantizing and verifying",
    "fidelity": "Measuring fidelity",
    "reports": "Reports",
    "generate": "Running, chatting, schemas and tools",
    "kernels": "Kernels",
    "serve": "Serving",
    "bench": "Bench",
    "inspection": "Inspecting",
    "inventory": "List, show, rm",
    "export": "Export",
    "publish": "Push",
    "pages": "Pages",
    "system": "Files, disks and other things of the system",
}
HEAD = """# Every message

What an error of `gemma-awq` says, by subject, and the hint that comes with it. `…` stands for a name, a number or a
reason. Search this page for a part of your message without those. [Troubleshooting](troubleshooting.md) explains the
ones that people meet most. This file is generated: `python -m tests.command_reference` writes it from the code.
"""

Texts = frozenset[str]
Bound = Mapping[str, Texts]
NOTHING = frozenset({UNKNOWN})
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One message. subject: a key of SUBJECTS."""

    subject: str
    message: str
    hint: str


@dataclass(frozen=True)
class Place:
    """A call in the code. functions: those around it, outermost first."""

    module: "Module"
    call: ast.Call
    functions: tuple[Function, ...]


class Module:
    """One file of the package, with its constants and its calls."""

    def __init__(self, path: Path) -> None:
        self.name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.calls = list(self._calls(self.tree, ()))
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, Function)}
        self.constants = {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.imported = {
            alias.name for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }

    def _calls(self, node: ast.AST, functions: tuple[Function, ...]) -> Iterator[Place]:
        if isinstance(node, ast.Call):
            yield Place(self, node, functions)
        inner = (*functions, node) if isinstance(node, Function) else functions
        for child in ast.iter_child_nodes(node):
            yield from self._calls(child, inner)

    @property
    def subject(self) -> str:
        return next((name for name in SUBJECTS if f"{self.name}.".startswith(f"{name}.")), "system")


@cache
def modules() -> tuple[Module, ...]:
    return tuple(Module(path) for path in sorted(PACKAGE.rglob("*.py")))


@cache
def constants() -> dict[str, ast.expr]:
    """Constants of all modules that are imported by their names."""
    return {name: value for module in modules() for name, value in module.constants.items() if not name.startswith("_")}


@cache
def error_classes() -> frozenset[str]:
    """The names of GemmaAwqError and all that is derived from it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"GemmaAwqError"}
    while more := {name for name, of in bases.items() if of & found and name not in found}:
        found |= more
    return frozenset(found)


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


@cache
def calls() -> Mapping[str, list[Place]]:
    """Return all calls by the names of what they call."""
    found = defaultdict(list)
    for module in modules():
        for place in module.calls:
            found[name_of(place.call)].append(place)
    return found


def texts(node: ast.expr | None, place: Place, bound: Bound) -> Texts:
    """Return what an expression may give, with UNKNOWN for what is not known here."""
    match node:
        case ast.Constant(value=str(value)):
            return frozenset({value})
        case ast.JoinedStr(values=values):
            return joined([texts(value, place, bound) for value in values])
        case ast.FormattedValue(value=value):
            return texts(value, place, bound)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return joined([texts(left, place, bound), texts(right, place, bound)])
        case ast.IfExp(body=body, orelse=other):
            return texts(body, place, bound) | texts(other, place, bound)
        case ast.BoolOp(values=values):
            return frozenset().union(*(texts(value, place, bound) for value in values))
        case ast.Call(func=ast.Attribute(value=value, attr="strip" | "rstrip")):
            return texts(value, place, bound)
        case ast.Call(func=ast.Name(id="install_hint"), args=[ast.Constant(value=str(extra))]):
            return frozenset({install_hint(extra)})
        case ast.Call(func=ast.Name(id=name)) if name in place.module.functions:
            returned = [part.value for part in ast.walk(place.module.functions[name]) if isinstance(part, ast.Return)]
            if all(isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp) for value in returned):
                inside = Place(place.module, place.call, (place.module.functions[name],))
                return frozenset().union(*(texts(value, inside, {}) for value in returned)) or NOTHING
            return NOTHING
        case ast.Name(id=name):
            return named(name, place, bound)
    return NOTHING


def named(name: str, place: Place, bound: Bound) -> Texts:
    """Return what a name may stand for: an argument, what the function assigns, or a constant of a module."""
    if name in bound:
        return bound[name]
    for function in reversed(place.functions):
        if name in parameters(function):
            return NOTHING
        if found := assigned(name, function, place.module):
            inside = {**bound, name: NOTHING}  # it may be assigned from itself
            return frozenset().union(*(texts(value, place, inside) for value in found))
    constant = place.module.constants.get(name)
    if constant is None and name in place.module.imported:
        constant = constants().get(name)
    return texts(constant, place, {}) if isinstance(constant, ast.Constant | ast.JoinedStr) else NOTHING


@cache
def assigned(name: str, function: Function, module: Module) -> tuple[ast.expr | None, ...]:
    """Return what a function assigns to a name; None for what cannot be followed."""
    return tuple(_assigned(name, function, module))


def _assigned(name: str, function: Function, module: Module) -> Iterator[ast.expr | None]:
    for node in ast.walk(function):
        if isinstance(node, ast.NamedExpr) and node.target.id == name:
            yield node.value
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield node.value
            elif isinstance(target, ast.Tuple):
                inside = [getattr(part, "id", "") for part in target.elts]
                if name in inside:
                    yield from parts_of(node.value, inside.index(name), module)


def parts_of(value: ast.expr, index: int, module: Module) -> Iterator[ast.expr | None]:
    """Yield the elements at `index` of the tuples that an expression may give."""
    if isinstance(value, ast.Tuple):
        yield value.elts[index]
    elif isinstance(value, ast.Call) and name_of(value) in module.functions:
        for node in ast.walk(module.functions[name_of(value)]):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                yield node.value.elts[index]
    else:
        yield None


@cache
def parameters(function: Function) -> list[str]:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    return [name for name in names if name not in ("self", "cls")] + [each.arg for each in arguments.kwonlyargs]


def joined(parts: list[Texts]) -> Texts:
    """Return all ways to put one of each part behind another; parts with too many ways are left open."""
    ways = 1
    kept = []
    for part in parts:
        ways *= len(part)
        kept.append(part if ways <= MOST else NOTHING)
        if ways > MOST:
            ways //= len(part)
    return frozenset("".join(way) for way in itertools.product(*kept))


@cache
def uses(values: tuple[ast.expr, ...], function: Function) -> bool:
    """Whether expressions in a function use its parameters."""
    names = set(parameters(function))
    return any(isinstance(node, ast.Name) and node.id in names for value in values for node in ast.walk(value))


@cache
def bindings(function: Function, subject: str, depth: int = DEPTH) -> tuple[Bound, ...]:
    """Return what each caller of a function gives to its parameters. A method's callers are in its own subject."""
    given = {frozenset(bound.items()): bound for bound in _bindings(function, subject, depth)}
    return tuple(given.values())


def _bindings(function: Function, subject: str, depth: int) -> Iterator[Bound]:
    is_method = bool(function.args.args) and function.args.args[0].arg == "self"
    names = parameters(function)
    defaults = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
    for place in calls().get(function.name, ()) if depth else ():
        if is_method and place.module.subject != subject:
            continue
        given: dict[str, ast.expr] = dict(zip(names, place.call.args, strict=False))
        given |= {each.arg: each.value for each in place.call.keywords if each.arg in names}
        outer = place.functions[-1] if place.functions else None
        uses_parameters = outer is not None and uses(tuple(given.values()), outer)
        around: list[Bound] = [{}]
        if outer is not None and uses_parameters and outer is not function:
            around = list(bindings(outer, place.module.subject, depth - 1)) or [{}]
        for bound in around:
            known = {name: texts(value, place, bound) for name, value in given.items()}
            missing = {name: texts(value, place, {}) for name, value in defaults.items() if name not in known}
            yield {**missing, **known}


def entries() -> list[Entry]:
    """Return every message of the code, each once, ordered by subject and text."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for module in modules():
        for place in module.calls:
            if is_raised(place):
                for message, hint in messages(place):
                    found[module.subject, message].add(hint)
    listed = [Entry(subject, message, best(hints)) for (subject, message), hints in found.items()]
    order = list(SUBJECTS)
    return sorted(listed, key=lambda entry: (order.index(entry.subject), entry.message.lower(), entry.message))


def is_raised(place: Place) -> bool:
    """Whether a call makes an error of a user: the class's, or that of its constructor to the class above."""
    if name_of(place.call) in error_classes():
        return bool(place.call.args)
    is_constructor = bool(place.functions) and place.functions[-1].name == name_of(place.call) == "__init__"
    first = place.call.args[0] if place.call.args else None
    return is_constructor and isinstance(first, ast.JoinedStr | ast.Constant) and place.module.name != "errors"


def messages(place: Place) -> set[tuple[str, str]]:
    """Return the messages that a call may make, with the hint of each."""
    call = place.call
    hinted = next((each.value for each in call.keywords if each.arg == "hint"), None)
    if hinted is None and len(call.args) > 1 and name_of(call) not in NO_HINT:
        hinted = call.args[1]
    made = pairs(call.args[0], hinted, place, {})
    if place.functions and any(letters(message) < ENOUGH for message, _ in made):
        # the text is what callers give
        for bound in bindings(place.functions[-1], place.module.subject):
            made |= pairs(call.args[0], hinted, place, bound)
        made = {(message, hint) for message, hint in made if letters(message) >= ENOUGH} or made
    return {(message, hint) for message, hint in made if letters(message)}


def pairs(message: ast.expr, hint: ast.expr | None, place: Place, bound: Bound) -> set[tuple[str, str]]:
    """Return what a message may be, with the hint that says most."""
    said = best(tidy(text) for text in texts(hint, place, bound)) if hint is not None else ""
    return {(tidy(text), said) for text in texts(message, place, bound)}


def letters(message: str) -> int:
    """How many letters of a message are known."""
    return sum(map(str.isalpha, message))


def words(message: str) -> str:
    """What is known of a message."""
    return message.replace(UNKNOWN, "").strip()


def tidy(text: str) -> str:
    """Return a text on one line; of what is known of a place in a request (`tools[3].`), only what every place has."""
    line = re.sub(r"\s+", " ", text).strip()
    return re.sub(rf"\A\w+\[{UNKNOWN}\]\.?|{UNKNOWN}(?:\.\.\.)?{UNKNOWN}*(?:\.\.\.)?", UNKNOWN, line)


def best(hints: Iterable[str]) -> str:
    """Return the hint that says most."""
    return max(sorted(hints), key=lambda hint: (len(words(hint)), hint), default="")


def as_code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def as_text(text: str) -> str:
    """Markdown that shows a hint as it is; what stands in backquotes is code there too."""
    parts = text.split("`")
    return "`".join(
        part if index % 2 else re.sub(r"([*<\[\\]|\b_|_\b)", r"\\\1", part) for index, part in enumerate(parts)
    )


def message_reference() -> str:
    """The text of docs/messages.md."""
    lines = [HEAD]
    by_subject = defaultdict(list)
    for entry in entries():
        by_subject[entry.subject].append(entry)
    for subject, title in SUBJECTS.items():
        if not by_subject[subject]:
            continue
        lines.append(f"## {title}\n")
        for entry in by_subject[subject]:
            hint = "" if not words(entry.hint) else f"  \n  {as_text(entry.hint)}"
            lines.append(f"- {as_code(entry.message)}{hint}")
        lines.append("")
    return "\n".join(lines)
