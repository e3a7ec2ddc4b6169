"""The house's rules, read from the source: floors, cycles, third parties, names and sizes.

Each rule is a function from the sources to its breaches, so that a planted breach can prove that it sees.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "fm_jax.core": 0,
    "fm_jax.ops": 1,
    **dict.fromkeys(("fm_jax.layers", "fm_jax.objectives", "fm_jax.optim", "fm_jax.data", "fm_jax.worlds"), 2),
    "fm_jax.models": 3,
    **dict.fromkeys(("fm_jax.checkpoint", "fm_jax.hub", "fm_jax.peft"), 4),
    **dict.fromkeys(("fm_jax.train", "fm_jax.evals", "fm_jax.generate"), 5),
    "fm_jax.tasks": 6,
    **dict.fromkeys(("fm_jax.deploy", "fm_jax.interpret", "fm_jax.trust", "fm_jax.scaling", "fm_jax.cli"), 7),
    "experiments": 8,
}

# An experiment that runs others as its stages; these must not do the same.
STAGES = {
    ("experiments.quickstart", "experiments.language.lm_pretrain"),
    ("experiments.quickstart", "experiments.fetch"),
}
# composites: (the model's file, the leaf model it is made of)
COMPOSITES = {
    ("fm_jax.models.language.masked_lm", "fm_jax.models.language.encoder"),
    ("fm_jax.models.multimodal.clip", "fm_jax.models.language.decoder"),
    ("fm_jax.models.multimodal.clip", "fm_jax.models.vision.vit"),
    ("fm_jax.models.vision.faster_rcnn", "fm_jax.models.vision.resnet"),
    ("fm_jax.models.vision.mae", "fm_jax.models.vision.vit"),
}

CORE = {"jax", "flax", "optax", "orbax", "numpy", "fm_jax"}  # all that fm_jax may import at module level
# a tensorflow-datasets builder is a subclass, so these need theirs at module level, and are imported in functions only
BUILDERS = {"fm_jax/data/python_docs/dataset.py": {"tensorflow_datasets", "etils"}}
ARRAYS = {"jax", "flax", "optax", "orbax"}
JSON_READERS = {
    "fm_jax/core/json_file.py",
    "fm_jax/data/text/captions.py",  # what the tokenizers library has just written
    "fm_jax/data/text/chat_process.py",  # what its own parent process sent
    "fm_jax/data/text/tokenizer.py",  # what the tokenizers library has just written
    "experiments/benchmarks/hub_load.py",  # the last line that its own child process printed
    "experiments/benchmarks/_sides.py",  # what it and its own child processes told each other
}
# what is measured beside ours: torch is imported in their functions
PEERS = {"experiments/benchmarks/_torch.py", "experiments/benchmarks/_torch_detectors.py"}
NEVER = {"torch", "tensorflow", "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
VAGUE = {"utils", "util", "common", "lib", "helpers", "helper", "manager", "base", "factory", "registry", "misc"}

COMPARISONS = {"assert_allclose", "allclose", "isclose", "approx", "assert_almost_equal", "assert_array_almost_equal"}

Sources = dict[str, str]  # path from the root -> text


@cache
def house() -> Sources:
    files = [*ROOT.glob("fm_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


@cache
def proofs() -> Sources:
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in ROOT.glob("tests/**/*.py")}


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[0] if parts[0] == "experiments" else ".".join(parts[:2]) if parts[0] == "fm_jax" else None


def imported(text: str, *, top_only: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of what a file imports; `from a import b` gives a.b, which may name a value in a.

    Names under `if TYPE_CHECKING:` count for floors but are not imported when the module is.
    """
    tree = parse(text)
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test).endswith("TYPE_CHECKING"))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if top_only and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def target(name: str, modules: set[str]) -> str | None:
    """Return the module of the house that a dotted name stands in, if any."""
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def is_part(path: str, name: str, modules: set[str]) -> bool:
    """Say whether a file imports a part that the experiments of its own folder share: `_NAME.py`."""
    folder, _, stem = (target(name, modules) or name).rpartition(".")
    return stem.startswith("_") and folder == module(path).rpartition(".")[0]


def floors(sources: Sources) -> Iterator[str]:
    modules = {module(path) for path in sources}
    for path, text in sources.items():
        here = room(module(path))
        if here == "fm_jax":
            continue  # fm_jax/__init__.py, a docstring
        if here not in FLOORS:
            yield f"{path}: room {here} stands on no floor"
            continue
        for line, name in imported(text):
            if name.startswith("."):
                yield f"{path}:{line}: relative import"
            if name.split(".")[0] == "tests":
                yield f"{path}:{line}: imports the tests"
            there = room(name)
            if there is None or there == "fm_jax":
                continue
            if there == "experiments":
                if (module(path), target(name, modules) or name) not in STAGES and not is_part(path, name, modules):
                    yield f"{path}:{line}: nobody imports an experiment"
            elif there not in FLOORS:
                yield f"{path}:{line}: {name} is in no room"
            elif there != here and FLOORS[there] >= FLOORS[here]:
                yield f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
            elif there == here == "fm_jax.models":
                pair = (module(path), target(name, modules) or name)
                if pair not in COMPOSITES:
                    yield f"{path}:{line}: {pair} is not in the list of composites"


def cycles(sources: Sources) -> Iterator[str]:
    modules = {module(path) for path in sources}
    graph = {
        module(path): {found for _, name in imported(text) if (found := target(name, modules))} - {module(path)}
        for path, text in sources.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> Iterator[str]:
        if name in trail:
            yield " -> ".join((*trail[trail.index(name) :], name))
        elif name not in done:
            for other in sorted(graph[name]):
                yield from visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, ())


def by_string(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                yield f"{path}:{node.lineno}: imports by string"


def third_parties(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        for line, name in imported(text):
            if name.split(".")[0] in NEVER - ({"torch"} if path in PEERS else set()):
                yield f"{path}:{line}: imports {name}"
        for line, name in imported(text, top_only=True):
            first = name.split(".")[0]
            if first == "torch" and path in PEERS:
                yield f"{path}:{line}: torch must be imported where it is used"
            if path.startswith("fm_jax/") and first not in CORE | BUILDERS.get(path, set()) | set(
                sys.stdlib_module_names
            ):
                yield f"{path}:{line}: {first} must be imported where it is used"
            if target(name, {module(builder) for builder in BUILDERS}):
                yield f"{path}:{line}: {name} must be imported where it is used"
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"{path}:{node.lineno}: allows pickle"


def unchecked_json(sources: Sources) -> Iterator[str]:
    """JSON is read by core/json_file.py, which checks it; what this process or its child wrote needs no check."""
    for path, text in sources.items():
        for node in ast.walk(parse(text)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("json.load", "json.loads") and path not in JSON_READERS:
                yield f"{path}:{node.lineno}: {called} instead of core/json_file.py"
            if isinstance(node, ast.ImportFrom) and node.module == "json":
                yield f"{path}:{node.lineno}: imports from json; import json"


def arrays_in_data(sources: Sources) -> Iterator[str]:
    """A loader's worker process must start without JAX: follow the imports of data/, but for device.py."""
    modules = {module(path): text for path, text in sources.items()}

    for start in modules:
        if room(start) != "fm_jax.data" or start == "fm_jax.data.stream.device":
            continue
        trails = {start: (start,)}  # every module once: the ways to it are many
        for name in (waiting := [start]):
            for line, other in imported(modules[name], top_only=name != start):
                if other.split(".")[0] in ARRAYS:
                    yield f"{' -> '.join(trails[name])}:{line} imports {other}"
                found = target(other, set(modules))
                if found and found not in trails:
                    trails[found] = (*trails[name], found)
                    waiting.append(found)


def names_and_sizes(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        if vague := VAGUE & set(PurePosixPath(path).with_suffix("").parts):
            yield f"{path}: {vague.pop()} says nothing"
        if (lines := text.count("\n")) > 500:
            yield f"{path}: {lines} lines are more than 500"
        if re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError", text):
            yield f"{path}: unfinished work"
        body = parse(text).body
        if path.endswith("__init__.py") and not all(_is_docstring(node) for node in body):
            yield f"{path}: an __init__ holds at most a docstring"


def long_functions(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                longer = path == "fm_jax/train/loop.py" or (path.startswith("experiments/") and node.name == "run")
                limit = 120 if longer else 60
                if (lines := (node.end_lineno or 0) - node.lineno + 1) > limit:
                    yield f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {limit}"


def bare_signatures(sources: Sources) -> Iterator[str]:
    """Public functions and methods, and what Flax calls (`__call__`, `setup`), say their types."""
    for path, text in sources.items():
        scopes = [parse(text), *(node for node in parse(text).body if isinstance(node, ast.ClassDef))]
        for scope in scopes:
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and node.name != "__call__"):
                    continue
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    yield f"{path}:{node.lineno}: {node.name} is not annotated ({', '.join(bare) or 'return'})"


def other_comparisons(sources: Sources) -> Iterator[str]:
    """Tests compare floats through tests/close.py, whose tolerances have units and are measured."""
    for path, text in sources.items():
        if not path.startswith("tests/") or path == "tests/close.py" or not any(name in text for name in COMPARISONS):
            continue
        for node in ast.walk(parse(text)):
            named: set[str] = set()
            if isinstance(node, ast.ImportFrom):
                named = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                named = {node.attr}
            elif isinstance(node, ast.Name):
                named = {node.id}
            yield from (f"{path}:{node.lineno}: {name} instead of tests/close.py" for name in named & COMPARISONS)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


RULES = (
    floors, cycles, by_string, third_parties, unchecked_json, arrays_in_data, names_and_sizes, long_functions,
    bare_signatures,
)  # fmt: skip
TESTS_RULES = (other_comparisons,)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    assert not list(rule(house()))


@pytest.mark.parametrize("rule", TESTS_RULES, ids=lambda rule: rule.__name__)
def test_the_tests_keep_the_rule(rule):
    assert not list(rule(proofs()))


BREACHES = [
    (floors, {"fm_jax/core/a.py": "import fm_jax.ops.b", "fm_jax/ops/b.py": ""}),
    (floors, {"fm_jax/train/a.py": "def f():\n    from fm_jax.evals import b", "fm_jax/evals/b.py": ""}),
    (floors, {"fm_jax/cli.py": "from fm_jax.interpret import a", "fm_jax/interpret/a.py": ""}),
    (floors, {"fm_jax/train/a.py": "from fm_jax.tasks import b", "fm_jax/tasks/b.py": ""}),
    (
        floors,
        {"fm_jax/models/vision/a.py": "from fm_jax.models.language.b import C", "fm_jax/models/language/b.py": ""},
    ),
    (floors, {"fm_jax/attic/a.py": ""}),
    (floors, {"fm_jax/core/a.py": "from . import b"}),
    (floors, {"fm_jax/deploy/a.py": "from experiments import quickstart"}),
    (floors, {"fm_jax/deploy/a.py": "from tests import toy"}),
    (floors, {"experiments/hub/a.py": "from experiments.benchmarks import _b", "experiments/benchmarks/_b.py": ""}),
    (floors, {"experiments/hub/a.py": "from experiments.hub import b", "experiments/hub/b.py": ""}),
    (cycles, {"fm_jax/core/a.py": "from fm_jax.core import b", "fm_jax/core/b.py": "import fm_jax.core.a"}),
    (by_string, {"fm_jax/core/a.py": "import importlib\nimportlib.import_module('x')"}),
    (by_string, {"fm_jax/core/a.py": "__import__('x')"}),
    (third_parties, {"fm_jax/hub/a.py": "def f():\n    import torch.nn"}),
    (third_parties, {"experiments/a.py": "from pickle import loads"}),
    (third_parties, {"experiments/hub/a.py": "def f():\n    import torch"}),
    (third_parties, {"experiments/benchmarks/_torch.py": "import torch"}),
    (third_parties, {"fm_jax/data/a.py": "import grain"}),
    (third_parties, {"fm_jax/data/a.py": "import numpy as np\nnp.load('x', allow_pickle=True)"}),
    (third_parties, {"fm_jax/data/a.py": "from fm_jax.data.python_docs import dataset"}),
    (unchecked_json, {"fm_jax/data/a.py": "import json\nx = json.loads('1')"}),
    (unchecked_json, {"experiments/a.py": "import json\nx = json.load(open('a'))"}),
    (unchecked_json, {"fm_jax/data/a.py": "from json import loads"}),
    (arrays_in_data, {"fm_jax/data/a.py": "def f():\n    import jax"}),
    (arrays_in_data, {"fm_jax/data/a.py": "from fm_jax.core.b import c", "fm_jax/core/b.py": "import flax.struct"}),
    (names_and_sizes, {"fm_jax/core/utils.py": ""}),
    (names_and_sizes, {"fm_jax/helpers/a.py": ""}),
    (names_and_sizes, {"fm_jax/core/a.py": "\n" * 501}),
    (names_and_sizes, {"fm_jax/core/__init__.py": "from fm_jax.core import a"}),
    (names_and_sizes, {"fm_jax/core/a.py": "# TO" + "DO: later"}),
    (long_functions, {"fm_jax/core/a.py": "def f():\n" + "    x = 1\n" * 60}),
    (long_functions, {"experiments/a.py": "def run():\n" + "    x = 1\n" * 120}),
    (bare_signatures, {"fm_jax/core/a.py": "def f(x) -> int: ..."}),
    (bare_signatures, {"fm_jax/core/a.py": "class A:\n    def f(self, *, x: int): ..."}),
    (other_comparisons, {"tests/core/test_a.py": "np.testing.assert_allclose(1.0, 1.0)"}),
    (other_comparisons, {"tests/core/test_a.py": "assert jnp.allclose(1.0, 1.0)"}),
    (other_comparisons, {"tests/core/test_a.py": "assert 1.0 == pytest.approx(1.0)"}),
    (other_comparisons, {"tests/core/test_a.py": "from numpy.testing import assert_almost_equal as equal"}),
]


@pytest.mark.parametrize(("rule", "sources"), BREACHES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_breach_is_seen(rule, sources):
    assert len(list(rule(sources))) == 1


def test_what_is_allowed_passes():
    sources = {
        "fm_jax/data/stream/device.py": "import jax",
        "fm_jax/data/a.py": '"""A."""\nimport os\n\nimport numpy as np\nfrom fm_jax.core.errors import DataError\n\n\n'
        "def f(x: int) -> int:\n    import grain\n\n    return x\n",
        "fm_jax/core/errors.py": "class DataError(Exception): ...",
        "fm_jax/data/python_docs/dataset.py": "import tensorflow_datasets",
        "experiments/quickstart.py": "import matplotlib\nfrom fm_jax.data import a",
        "experiments/__init__.py": '"""One paper or stage a module."""',
        "experiments/hub/a.py": "from experiments.hub._b import c",
        "experiments/hub/_b.py": "c = 1",
        "experiments/benchmarks/_torch.py": "def f() -> None:\n    import torch",
    }
    assert not [breach for rule in RULES for breach in rule(sources)]
    sources = {
        "tests/close.py": "import numpy as np\nnp.testing.assert_allclose(1.0, 1.0)",
        "tests/core/test_a.py": "from tests.close import close\n# approx\nnp.testing.assert_array_equal(1, 1)",
    }
    assert not [breach for rule in TESTS_RULES for breach in rule(sources)]
