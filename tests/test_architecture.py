"""The rules of the house, read from the source: who imports whom, how long a file is, what is never called.

A checker takes a module's name and source and returns one line per breach, so each is also tested
on a source that breaks it. README's file tree is compared with the files that git knows or would add.
Format of that tree: below a heading `## Files`, a fenced block of lines `path  # phrase`; a folder
outside the packages is one line that ends in a slash (`docs/  # phrase`).
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODES = ("trainer_node", "predictor_node", "monitor_node")
PACKAGES = ("common", *NODES)
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
LIGHT_PACKAGES = ("common", "monitor_node")  # never torch: they start fast and fit in 120 MB

# The shells of a node: they own processes, sockets and threads. All other modules are domain.
SHELLS = frozenset(
    {"__main__", "cli", "serve", "node", "up", "replay", "web", "inbox", "hybrid", "connection", "own_nodes"}
)
# Whatever talks to a server. `common.bus` itself (the contract and EntryId) is open to all.
TRANSPORT = frozenset({
    "redis", "valkey", "fakeredis", "common.redis_bus", "common.redis_link", "common.memory_bus",
    "common.open_bus", "common.embedded", "common.embedded_keeper", "common.outbox", "common.publisher",
    "common.service", "common.blobs", "common.healthcheck",
})  # fmt: skip
REDIS_USERS = frozenset({"common.redis_bus", "common.redis_link"})
VAGUE_NAMES = frozenset({"util", "utils", "helper", "helpers", "misc", "manager", "managers"})
CODE_FROM_DATA = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})


def imported_modules(source: str, module: str) -> set[str]:
    """Dotted names of all that is imported anywhere in the source; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], base]).rstrip(".")
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def within(name: str, roots: frozenset[str] | tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def breaches_of_imports(module: str, source: str) -> list[str]:
    package, *inner = module.split(".")
    imports = imported_modules(source, module)
    own = tuple(name for name in PACKAGES if name != package)
    forbidden: dict[str, tuple[str, ...] | frozenset[str]] = {"tests": ("tests", "conftest")}
    if package == "common":
        forbidden["a node"] = own
    else:
        forbidden["another node"] = tuple(name for name in own if name != "common")
    if package in LIGHT_PACKAGES:
        forbidden["torch"] = ("torch", "torchvision", "safetensors.torch")
    if module not in REDIS_USERS:
        forbidden["a Redis client"] = ("redis", "valkey")
    if package in NODES and inner and inner[-1] not in SHELLS:
        forbidden["the transport from a domain module"] = TRANSPORT
    return [
        f"{module} imports {what}: {name}"
        for what, roots in forbidden.items()
        for name in sorted(imports)
        if within(name, roots)
    ]


def breaches_of_size(module: str, source: str) -> list[str]:
    breaches = []
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        breaches.append(f"{module} has {lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                breaches.append(f"{module}.{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return breaches


def breaches_of_naming(module: str, source: str) -> list[str]:
    words = {word for part in module.split(".") for word in part.split("_")}
    vague = sorted(words & VAGUE_NAMES)
    breaches = [f"{module}: '{word}' says nothing about what is in it" for word in vague]
    if source.strip() and not module.endswith("__main__") and not ast.get_docstring(ast.parse(source)):
        breaches.append(f"{module} has no docstring that says what it owns")
    return breaches


def breaches_of_data_as_code(module: str, source: str) -> list[str]:
    """Nothing that is read may run: no pickle in any disguise, no eval, no exec."""
    breaches = [
        f"{module} imports {name}"
        for name in sorted(imported_modules(source, module))
        if within(name, CODE_FROM_DATA)
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "__import__", "builtins.eval", "builtins.exec"}:
            breaches.append(f"{module}:{node.lineno} calls {called}")
        if called in {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load"}:
            breaches.append(f"{module}:{node.lineno} calls {called}, which is pickle")
        if any(keyword.arg == "allow_pickle" for keyword in node.keywords) and "False" not in ast.unparse(
            node
        ):
            breaches.append(f"{module}:{node.lineno} allows pickle")
    return breaches


Checker = Callable[[str, str], list[str]]
CHECKERS: tuple[Checker, ...] = (
    breaches_of_imports,
    breaches_of_size,
    breaches_of_naming,
    breaches_of_data_as_code,
)


def modules() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path.read_text(encoding="utf-8")


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_every_module_keeps_the_rules_of_the_house(checker: Checker) -> None:
    breaches = [breach for name, source in modules() for breach in checker(name, source)]
    assert not breaches, "\n" + "\n".join(breaches)


BROKEN: list[tuple[Checker, str, str]] = [
    (breaches_of_imports, "common.bus", "from trainer_node import loop"),
    (breaches_of_imports, "common.bus", "import torch.nn"),
    (breaches_of_imports, "common.bus", "def f():\n    import torch"),
    (breaches_of_imports, "monitor_node.node", "from torch import cuda"),
    (breaches_of_imports, "monitor_node.node", "import predictor_node.policy"),
    (breaches_of_imports, "predictor_node.cli", "from trainer_node.delta import apply"),
    (breaches_of_imports, "trainer_node.loop", "import redis"),
    (breaches_of_imports, "trainer_node.node", "from redis import Redis"),
    (breaches_of_imports, "trainer_node.loop", "from common.redis_bus import RedisBus"),
    (breaches_of_imports, "trainer_node.model.gpt", "from common import memory_bus"),
    (breaches_of_imports, "trainer_node.loop", "from common.publisher import Publisher"),
    (breaches_of_imports, "trainer_node.up", "from tests.faults import drop"),
    (breaches_of_imports, "common.config", "from ..monitor_node import web"),
    (breaches_of_size, "common.bus", "x = 1\n" * 301),
    (breaches_of_size, "common.bus", "class A:\n    def f(self):\n" + "        x = 1\n" * 60),
    (breaches_of_size, "common.bus", "async def f():\n" + "    x = 1\n" * 60),
    (breaches_of_naming, "common.utils", '"""Owns."""'),
    (breaches_of_naming, "trainer_node.data_helpers", '"""Owns."""'),
    (breaches_of_naming, "monitor_node.misc.page", '"""Owns."""'),
    (breaches_of_naming, "common.bus", "x = 1"),
    (breaches_of_data_as_code, "common.codec", "import pickle"),
    (breaches_of_data_as_code, "common.codec", "from joblib import load"),
    (breaches_of_data_as_code, "common.codec", "eval('1')"),
    (breaches_of_data_as_code, "common.codec", "def f(x):\n    exec(x)"),
    (breaches_of_data_as_code, "trainer_node.state", "torch.load(path)"),
    (breaches_of_data_as_code, "trainer_node.state", "torch.load(path, weights_only=True)"),
    (breaches_of_data_as_code, "trainer_node.state", "np.load(path, allow_pickle=True)"),
]  # fmt: skip

SOUND: list[tuple[Checker, str, str]] = [
    (breaches_of_imports, "common.redis_bus", "import redis\nfrom common.bus import Bus"),
    (breaches_of_imports, "trainer_node.node", "from common.outbox import Outbox\nimport torch"),
    (
        breaches_of_imports,
        "trainer_node.loop",
        "from common.bus import EntryId\nfrom trainer_node import step",
    ),
    (breaches_of_size, "common.bus", "x = 1\n" * 300),
    (breaches_of_size, "common.bus", "def f():\n" + "    x = 1\n" * 59),
    (breaches_of_naming, "monitor_node.device", '"""Owns the readings."""'),
    (breaches_of_naming, "common", ""),
    (breaches_of_data_as_code, "trainer_node.step", "model.eval()\ntorch.compile(model)"),
    (breaches_of_data_as_code, "trainer_node.data", "np.load(path, allow_pickle=False)"),
]


@pytest.mark.parametrize(("checker", "module", "source"), BROKEN)
def test_a_breach_is_named_together_with_its_module(checker: Checker, module: str, source: str) -> None:
    breaches = checker(module, source)
    assert breaches
    assert all(breach.startswith(module) for breach in breaches)


@pytest.mark.parametrize(("checker", "module", "source"), SOUND)
def test_sound_source_has_no_breach(checker: Checker, module: str, source: str) -> None:
    assert checker(module, source) == []


def test_every_package_with_modules_is_installed() -> None:
    """The list in pyproject.toml is written by hand, so a new folder is easily forgotten."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
    }
    assert listed == found


def listed_paths(readme: str) -> list[str]:
    """Paths of the tree in README; raises ValueError with the line that breaks the format."""
    section = re.search(r"^## Files\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
    block = section and re.search(r"^```\w*\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    if not block:
        raise ValueError("README.md has no fenced block below a heading '## Files'")
    paths = []
    for line in filter(str.strip, block[1].splitlines()):
        entry = re.fullmatch(r"(\S+) +# (\S.*)", line)
        if not entry:
            raise ValueError(f"not of the form 'path  # phrase': {line!r}")
        paths.append(entry[1])
    return paths


def tree_entries(files: list[str], is_empty: Callable[[str], bool]) -> set[str]:
    """What the tree must list: package files, top-level files and other folders; nothing hidden or empty."""
    entries = set()
    for file in files:
        top, _, rest = file.partition("/")
        if top.startswith(".") or (file.endswith(("__init__.py", "py.typed")) and is_empty(file)):
            continue
        entries.add(file if not rest or top in PACKAGES else f"{top}/")
    return entries


def test_the_file_tree_of_the_readme_is_the_real_one() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to tell our files from yours")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [file for file in known if (ROOT / file).is_file()]
    real = tree_entries(files, lambda file: not (ROOT / file).read_bytes().strip())
    listed = listed_paths(readme.read_text(encoding="utf-8"))
    listed_visible = {path for path in listed if not path.startswith(".")}
    assert listed_visible - real == set(), "listed in README.md but not there"
    assert real - listed_visible == set(), "there but not listed in README.md"
    assert len(listed) == len(set(listed)), "listed twice"


def test_the_tree_reader_takes_one_path_and_phrase_per_line() -> None:
    tree = "```text\ncommon/bus.py    # the contract\n\ndocs/  # pages\n```\n"
    readme = f"# x\n## Files\n\n{tree}## Next\n```\nno\n```\n"
    assert listed_paths(readme) == ["common/bus.py", "docs/"]
    with pytest.raises(ValueError, match="path  # phrase"):
        listed_paths("## Files\n```\ncommon/bus.py\n```\n")
    with pytest.raises(ValueError, match="Files"):
        listed_paths("## Commands\n```\nmake up  # go\n```\n")


def test_the_tree_lists_package_files_one_by_one_and_other_folders_once() -> None:
    files = [".gitignore", "Makefile", "docs/a.md", "docs/b.md", "common/__init__.py", "common/bus.py"]
    assert tree_entries(files, lambda file: True) == {"Makefile", "docs/", "common/bus.py"}
    assert "common/__init__.py" in tree_entries(files, lambda file: False)
