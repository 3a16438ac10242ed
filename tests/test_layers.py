"""The rules of the layout: who imports whom, which library is named where, how long the code is."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = (
    "chat.prompt chat.messages chat.reply chat.errors chat.config chat.logs chat.metrics",
    "chat.storage chat.llm",
    "chat.tokens chat.kept",
    "chat.service",
    "chat.replies",
    "chat.api",
    "server",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
HOMES = {
    "httpx": "chat.llm.groq",
    "httpx_aiohttp": "chat.llm.groq",
    "aiohttp": "chat.llm.groq",
    "redis": "chat.storage.redis",
    "prometheus_client": "chat.metrics",
}
PATHS = [ROOT / "server.py", *ROOT.glob("chat/**/*.py")]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in PATHS
    if path.name != "__init__.py"
}


def imports(module: str) -> set[str]:
    """Return the modules that a module imports; of a library, the name before the first dot."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name if name in TREES else name.partition(".")[0] for name in found} - {"chat"}


def level(module: str) -> int:
    return LEVEL[".".join(module.split(".")[:2])]


def test_imports_run_downwards_without_cycles() -> None:
    graph = {module: imports(module) & TREES.keys() for module in TREES}
    upwards = [(a, b) for a, others in graph.items() for b in others if level(b) > level(a)]
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert upwards == []


def test_a_library_is_named_in_one_place() -> None:
    found = {(name, module) for module in TREES for name in imports(module) & HOMES.keys()}
    assert found == set(HOMES.items()) & found
    assert {name for name, _ in found} >= {"httpx", "redis", "prometheus_client"}


def test_private_members_of_libraries_are_used_in_protocols_alone() -> None:
    found = {
        name
        for path in PATHS
        for name in re.findall(r"(?<!\bself)\.(_[a-z]\w*)|import.*\b_[a-z]", path.read_text())
        if path.stem != "protocols"
    }
    assert found <= {"_exit"}  # os._exit is public all the same


def test_the_code_stays_small() -> None:
    """A change that needs room makes it; only an issue that says so raises the limits."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PATHS}
    assert {name: count for name, count in lines.items() if count > 250} == {}
    assert sum(lines.values()) <= 3650
