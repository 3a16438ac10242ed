"""Markdown in replies: what becomes of it, in a browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import HOSTILE, RICH, browser, closing_context, needs_browser
from tests.servers import Service

__all__ = ["browser"]
pytestmark = needs_browser

RENDER = """async (text) => {
  const { showMarkdown } = await import("/static/markdown.js");
  const container = document.createElement("div");
  showMarkdown(container, text);
  return container;
}"""
SHAPE = """(container) => {
  const shape = (node) => node.nodeType === Node.TEXT_NODE
    ? node.data
    : `<${node.localName}>${[...node.childNodes].map(shape).join("")}</${node.localName}>`;
  return [...container.childNodes].map(shape).join("").replaceAll("></br>", ">");
}"""


@pytest.fixture(scope="module")
def renderer(browser: Browser, service: Service) -> Iterator[Page]:
    with closing_context(browser) as context:
        page = context.new_page()
        page.goto(service.url)
        yield page


def shape(page: Page, text: str) -> str:
    """Return what the renderer makes of the text, as tags without attributes."""
    made: str = page.evaluate_handle(RENDER, text).evaluate(SHAPE)
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# A\n###### B ##", "<h3>A</h3><h3>B</h3>"),
        ("#no heading", "<p>#no heading</p>"),
        ("*a* **b** ***c*** _d_ __e__", "<p><em>a</em> <strong>b</strong> "
         "<em><strong>c</strong></em> <em>d</em> <strong>e</strong></p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("~~gone~~ ~5 ~6", "<p><del>gone</del> ~5 ~6</p>"),
        ("**Note:**text", "<p><strong>Note:</strong>text</p>"),
        ("**open *one", "<p>**open *one</p>"),
        ("***a******b***", "<p><em><strong>a</strong></em><em><strong>b</strong></em></p>"),
        ("**a*b** **2*3=6**", "<p><strong>a*b</strong> <strong>2*3=6</strong></p>"),
        ("*a **b*", "<p><em>a **b</em></p>"),
        (r"\*no\* \`no\` \a \(x\) \[y\]", r"<p>*no* `no` \a \(x\) \[y\]</p>"),
        ("`a *b*` ``c ` d`` `open", "<p><code>a *b*</code> <code>c ` d</code> `open</p>"),
        ("- a\n- b\n  - c\n\n  more\n- d", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li>"
         "</ul><p>more</p></li><li><p>d</p></li></ul>"),
        ("- [ ] a\n- [x] b", "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>"),
        ("1. a\n2. b\n\ntext", "<ol><li><p>a</p></li><li><p>b</p></li></ol><p>text</p>"),
        ("1. a\n   ```\n   x\n     y\n   ```\n2. b", "<ol><li><p>a</p><div><div><span>text</span>"
         "<button>Copy</button></div><pre><code>x\n  y</code></pre></div></li><li><p>b</p></li>"
         "</ol>"),
        ("In the year\n2024. Or so\n- not so", "<p>In the year<br>2024. Or so</p>"
         "<ul><li><p>not so</p></li></ul>"),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"
         "<p>c</p>"),
        ("a\n\n---\n***\nb", "<p>a</p><hr></hr><hr></hr><p>b</p>"),
        ("[a *b*](https://x.org) <https://y.org>", "<p><a>a <em>b</em></a> <a>https://y.org</a></p>"),
        ("(see https://x.org/a_b_(c)).", "<p>(see <a>https://x.org/a_b_(c)</a>).</p>"),
        ("[a](javascript:b) [c](/d) [e]", "<p>[a](javascript:b) [c](/d) [e]</p>"),
        ("| a | b |\n|---|:-:|\n| `x` | y \\| z<br>w |\n| only |", "<div><table><thead><tr>"
         "<th>a</th><th>b</th></tr></thead><tbody><tr><td><code>x</code></td><td>y | z<br>w</td>"
         "</tr><tr><td>only</td><td></td></tr></tbody></table></div>"),
        ("| a | b | c |\n|-|-|-|\n| x |", "<div><table><thead><tr><th>a</th><th>b</th><th>c</th>"
         "</tr></thead><tbody><tr><td>x</td><td></td></tr></tbody></table></div>"),
        ("a | b\nno table", "<p>a | b<br>no table</p>"),
        ("```python\nif a:\n\tb\n\n", "<div><div><span>python</span><button>Copy</button></div>"
         "<pre><code><span>if</span> a:\n\tb\n\n</code></pre></div>"),
        ("~~~\n```\n~~~\nafter", "<div><div><span>text</span><button>Copy</button></div>"
         "<pre><code>```</code></pre></div><p>after</p>"),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(renderer: Page, text: str, expected: str) -> None:
    assert shape(renderer, text) == expected


@pytest.mark.parametrize(
    ("language", "code", "kinds"),
    [
        ("python", "def f(x):  # why\n    return 'a'", {
            "keyword": ["def", "return"], "call": ["f"], "comment": ["# why"], "string": ["'a'"]}),
        ("python", 'x = """a\nb', {"string": ['"""a\nb']}),
        ("js", "if (a) b(1.5); // c\n/* d\n", {
            "keyword": ["if"], "call": ["b"], "number": ["1.5"], "comment": ["// c", "/* d\n"]}),
        ("SQL", "SELECT count(*) -- all", {
            "keyword": ["SELECT"], "call": ["count"], "comment": ["-- all"]}),
        ("bash", "echo ${a#b} # c", {"keyword": ["echo"], "comment": ["# c"]}),
        ("js", "a.with(for_)", {"call": ["with"]}),
        ("klingon", "if (x) 'y' # z", {}),
    ],
)  # fmt: skip
def test_code_has_colours_and_stays_the_same_text(
    renderer: Page, language: str, code: str, kinds: dict[str, list[str]]
) -> None:
    block = renderer.evaluate_handle(RENDER, f"```{language}\n{code}\n```")
    found: list[list[str]] = block.evaluate(
        "(node) => [...node.querySelectorAll('pre span')].map((x) => [x.className, x.textContent])"
    )
    assert block.evaluate("(node) => node.querySelector('pre').textContent") == code
    assert {name: [text for kind, text in found if kind == name] for name, _ in found} == kinds


@pytest.mark.parametrize("text", [RICH, HOSTILE], ids=["rich", "hostile"])
def test_a_text_that_grows_shows_the_same_as_one_that_came_whole(renderer: Page, text: str) -> None:
    """Every beginning of it is rendered on the way, as open and as ended."""
    grown = renderer.evaluate_handle(
        """async (text) => {
          const { showMarkdown } = await import("/static/markdown.js");
          const container = document.createElement("div");
          for (let end = 0; end <= text.length; end += 1) {
            showMarkdown(container, text.slice(0, end), true);
            showMarkdown(document.createElement("div"), text.slice(0, end));
          }
          showMarkdown(container, text);
          return container;
        }""",
        text,
    )
    whole = renderer.evaluate_handle(RENDER, text)
    assert grown.evaluate("(one, other) => one.isEqualNode(other)", whole)


@pytest.mark.parametrize(
    ("opening", "middle", "closing"),
    [
        ("[", "x", "](http://a)"),
        ("![", "x", "](http://a)"),
        ("[", "x", "](javascript:a)"),
        ("[a](http://b", "", ")"),
        ("*", "a", "*"),
        ("*_", "a", "_*"),
        ("**~~", "a", "~~**"),
        ("> *", "a", "*"),
    ],
)
def test_nor_does_what_is_closed_as_often_as_it_is_opened(
    renderer: Page, opening: str, middle: str, closing: str
) -> None:
    for count in (10, 40, 1000, 20_000):
        text = opening * count + middle + closing * count
        assert depth_of(renderer, text) < 60


@pytest.mark.parametrize(
    "text",
    ["*", "_", "**a ", "*a_", "[", "[a](", "![", "](", "`", "`a``", "<", "> ", "- ", "1. ", "| ",
     "\\", "~~", "# ", "```\n", "http://", "http://[", "https://a)", "\t- a\n", "\n", " ", "|-",
     "```js\n/*", "```js\n'\\", '```py\n"""', "1_", "``` py\n"],
)  # fmt: skip
def test_no_text_takes_long_or_nests_without_end(renderer: Page, text: str) -> None:
    assert depth_of(renderer, text * (100_000 // len(text))) < 50


@pytest.mark.parametrize("many", ["a\n\n", "a\n", "- a\n", "**a** ", "`a` ", "|a\n"])
def test_any_number_of_parts_is_shown(renderer: Page, many: str) -> None:
    """More of them than a call takes arguments, and than a look at each for each would bear."""
    beginning = "|a|\n|-|\n" if many.startswith("|") else ""
    assert depth_of(renderer, beginning + many * 150_000) < 10


def test_any_number_of_spaces_is_looked_at_once(renderer: Page) -> None:
    assert depth_of(renderer, "[a](" + " " * 400_000 + "x") == 2


def depth_of(renderer: Page, text: str) -> int:
    """Return how deep the elements of a text nest."""
    depth: int = renderer.evaluate_handle(RENDER, text).evaluate(
        """(node) => {
          const deeper = (most, each) => Math.max(most, depth(each));
          const depth = (each) => 1 + [...each.children].reduce(deeper, 0);
          return depth(node);
        }"""
    )
    return depth
