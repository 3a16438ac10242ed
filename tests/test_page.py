"""The files of the chat page, as they are served; what the page does is in test_browser.py."""

import itertools
import re
from pathlib import Path

import pytest

from tests.conftest import StartService
from tests.demo import REPLIES
from tests.servers import ROOT, Service

STATIC = ROOT / "chat" / "static"
FILES = sorted(path.name for path in STATIC.iterdir())
ADDRESSES = ["/", *(f"/static/{name}" for name in FILES)]
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
XML_NAMES = "http://www.w3.org/2000/svg"


@pytest.mark.parametrize("address", ADDRESSES)
def test_each_file_is_served_as_it_is_with_its_type(service: Service, address: str) -> None:
    path = STATIC / (Path(address).name or "index.html")
    answer = service.http.get(address)
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"] == TYPES[path.suffix]


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_headers_let_the_page_do_little(service: Service, address: str) -> None:
    headers = service.http.get(address).headers
    policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_file_that_the_browser_has_is_not_sent_again(service: Service, address: str) -> None:
    first = service.http.get(address)
    assert first.headers["cache-control"] == "no-cache"
    again = service.http.get(address, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = service.http.get(address, headers={"If-None-Match": '"another"'})
    assert other.status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "%2e%2e", ".", "page.css/", ""])
def test_nothing_else_is_served(service: Service, name: str) -> None:
    answer = service.http.get(f"/static/{name}")
    assert answer.status_code == 404
    assert answer.json() == {"error": "there is no such path"}


def test_it_is_read_only(service: Service) -> None:
    answer = service.http.post("/")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert service.http.head("/").content == b""


def test_it_can_be_turned_off(start_service: StartService) -> None:
    service = start_service(CHAT_PAGE="false")
    for method, address in itertools.product(("GET", "POST"), ADDRESSES):
        answer = service.http.request(method, address)
        assert answer.status_code == 404
        assert answer.json() == {"error": "there is no such path"}


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name: str) -> None:
    text = (STATIC / name).read_text().replace(XML_NAMES, "")
    assert re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", text) == []


@pytest.mark.parametrize("name", FILES)
def test_no_text_becomes_html_or_code(name: str) -> None:
    text = (STATIC / name).read_text()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser"
    assert re.findall(rf"{sinks}|\son\w+=|\sstyle=|javascript:", text) == []


def test_each_script_is_fetched_at_once() -> None:
    page = (STATIC / "index.html").read_text()
    preloaded = re.findall(r'rel="modulepreload" href="static/([^"]+)"', page)
    assert sorted([*preloaded, "page.js"]) == [name for name in FILES if name.endswith(".js")]


def test_the_demo_has_replies_to_the_examples() -> None:
    page = (STATIC / "index.html").read_text()
    assert re.findall(r'class="example">([^<]+)<', page) == list(REPLIES)


def test_the_page_is_small() -> None:
    assert sum(len((STATIC / name).read_bytes()) for name in FILES) < 80_000
