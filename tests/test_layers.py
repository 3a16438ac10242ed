"""The house rules that a machine can see: who imports whom, and who may name what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    ["errors", "watchdog", "quota", "recent"],
    ["logs", "metrics", "redis_client"],
    ["config", "messages", "link", "connection", "breaker", "signals"],
    ["framing", "history", "reply", "addresses", "workers"],
    ["context", "tokens", "groq", "limits", "places", "shared_history"],
    ["upstream", "middleware"],
    ["service", "http", "protocols", "page"],
    ["origins", "drain", "side_server"],
    ["websocket"],
    ["server"],
]
MODULES = {path.stem: path for path in [*ROOT.glob("chat/*.py"), ROOT / "server.py"]}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

HOMES = {
    "starlette": {
        "config",
        "connection",
        "http",
        "middleware",
        "origins",
        "page",
        "websocket",
        "server",
        "side_server",
    },
    "uvicorn": {"server", "protocols", "side_server", "signals", "workers"},
    "httpx": {"groq"},
    "httpx_aiohttp": {"groq"},
    "aiohttp": {"groq"},
    "redis": {"redis_client"},
    "prometheus_client": {"metrics"},
    "os": {"config", "signals", "workers"},
}


def imports(name: str) -> set[str]:
    """Return the full names of the modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "chat":
            found |= {f"chat.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def names() -> list[str]:
    return sorted(name for name in MODULES if name != "__init__")


@pytest.mark.parametrize("name", names())
def test_imports_run_downward_only(name: str) -> None:
    ours = {found.split(".")[1] for found in imports(name) if found.startswith("chat.")}
    assert {other for other in ours if LEVEL[other] >= LEVEL[name]} == set()


@pytest.mark.parametrize("name", names())
def test_a_library_is_named_only_in_its_home(name: str) -> None:
    libraries = {found.split(".")[0] for found in imports(name)}
    assert {x for x in libraries if name not in HOMES.get(x, {name})} == set()


@pytest.mark.parametrize("name", ["framing", "messages", "context", "addresses"])
def test_the_core_does_no_input_or_output_and_knows_no_clock(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))
    assert imports(name).isdisjoint({"asyncio", "time", "datetime", "socket"})


def test_the_code_can_be_read_in_an_hour_or_two() -> None:
    """What callers and networks do to each line is in it; let nothing grow unseen."""
    assert max(len(path.read_text().splitlines()) for path in MODULES.values()) <= 400
    assert sum(map(lines_of_code, MODULES.values())) <= 3800


def lines_of_code(path: Path) -> int:
    """Return how many lines are neither blank, nor comments, nor docstrings."""
    text = path.read_text()
    documentation = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documentation
        for number, line in enumerate(text.splitlines(), 1)
    )
