"""The files of the chat page as they are served; test_browser.py has what the page does."""

import hashlib
import re

import httpx

from tests.conftest import StartService
from tests.demo import REPLIES
from tests.servers import ROOT, Service

(STATIC,) = ROOT.glob("chat/**/static")
VENDOR = STATIC / "vendor"
PATHS = sorted(path for path in STATIC.rglob("*") if path.is_file())
FILES = {str(path.relative_to(STATIC)): path for path in PATHS}
OWN = {name: path for name, path in FILES.items() if VENDOR not in path.parents}
ADDRESSES = {"/": FILES["index.html"], **{f"/static/{name}": FILES[name] for name in FILES}}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def test_every_file_is_served_unchanged_and_may_do_little(service: Service) -> None:
    for address, path in ADDRESSES.items():
        answer = service.http.get(address)
        assert (answer.status_code, answer.content) == (200, path.read_bytes()), address
        assert answer.headers["content-type"] == TYPES[path.suffix], address
        assert HEADERS.items() <= answer.headers.items(), address


def test_an_unchanged_file_is_not_sent_again(service: Service) -> None:
    for address in ADDRESSES:
        tag = service.http.get(address).headers["etag"]
        again = service.http.get(address, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b""), address
        assert again.headers["etag"] == tag, address
        other = service.http.get(address, headers={"If-None-Match": '"another"'})
        assert other.status_code == 200, address


def test_nothing_else_is_served_and_the_page_is_read_only(service: Service) -> None:
    for name in ("nothing.js", "..%2fhttp.py", "%2e%2e", ".", "vendor", "vendor/", ""):
        assert is_no_such_path(service.http.get(f"/static/{name}")), name
    answer = service.http.post("/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert service.http.head("/").content == b""


def test_the_page_can_be_turned_off(start_service: StartService) -> None:
    service = start_service(CHAT_PAGE="false")
    for address in ADDRESSES:
        assert is_no_such_path(service.http.get(address)), address
        assert is_no_such_path(service.http.post(address)), address


def is_no_such_path(answer: httpx.Response) -> bool:
    return answer.status_code == 404 and answer.json()["error"].startswith("no such path; ")


def test_no_file_names_another_host_or_turns_text_into_html_or_code() -> None:
    hosts = r"(?:https?:)?//[\w-]+\.[\w.-]+"
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser"
    for name, path in OWN.items():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        found = re.findall(rf"{hosts}|{sinks}|\son\w+=|\sstyle=|javascript:", text)
        assert found == [], name


def test_the_page_is_small_preloads_its_scripts_and_shows_the_examples_of_the_demo() -> None:
    assert sum(path.stat().st_size for path in OWN.values()) < 60_000
    scripts = [name for name in FILES if name.endswith(("js", "mjs"))]
    assert sum(OWN[name].read_text().count("\n") for name in scripts if name in OWN) < 900
    page = FILES["index.html"].read_text()
    preloaded = re.findall(r'rel="modulepreload" href="static/([^"]+)"', page)
    assert sorted([*preloaded, "page.js"]) == scripts
    assert re.findall(r'class="example">([^<]+)<', page) == list(REPLIES)


def test_what_is_vendored_is_unchanged_and_named_with_its_version() -> None:
    readme = (VENDOR / "README.md").read_text()
    checksums = dict(re.findall(r"^    (\w{64})  (\S+)$", readme, re.MULTILINE))
    for checksum, name in checksums.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == checksum, name
    assert {*checksums.values(), "README.md"} == {path.name for path in VENDOR.iterdir()}
    (version,) = re.findall(r"markdown-it@(\S+)", (ROOT / "Makefile").read_text())
    assert f"# markdown-it {version}\n" in readme
