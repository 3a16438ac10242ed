"""The rendering of Markdown in replies, in a browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import HOSTILE, RICH, browser, closing_context, needs_browser
from tests.servers import Service

__all__ = ["browser"]
pytestmark = needs_browser

RENDER = """async ([text, isGrowing]) => {
  const { MarkdownView } = await import("/static/render.js");
  const container = document.createElement("div");
  new MarkdownView(container).show(text, isGrowing);
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
    """Render a text; return its tags without attributes."""
    made: str = page.evaluate_handle(RENDER, text).evaluate(SHAPE)
    return made


SHAPES = {
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n###### B ##": "<h3>A</h3><h3>B</h3>",
    "#no heading": "<p>#no heading</p>",
    "*a* **b** ***c*** _d_ __e__": "<p><em>a</em> <strong>b</strong> "
        "<em><strong>c</strong></em> <em>d</em> <strong>e</strong></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
    "~~gone~~ ~5 ~6": "<p><del>gone</del> ~5 ~6</p>",
    "**Note:**text": "<p><strong>Note:</strong>text</p>",
    "**open *one": "<p>**open *one</p>",
    "***a******b***": "<p><em><strong>a</strong></em><em><strong>b</strong></em></p>",
    "**a*b** **2*3=6**": "<p><strong>a*b</strong> <strong>2*3=6</strong></p>",
    "*a **b*": "<p><em>a **b</em></p>",
    r"\*no\* \`no\` \a \(x\) \[y\]": r"<p>*no* `no` \a \(x\) \[y\]</p>",
    "`a *b*` ``c ` d`` `open": "<p><code>a *b*</code> <code>c ` d</code> `open</p>",
    "- a\n- b\n  - c\n\n  more\n- d": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li>"
        "</ul><p>more</p></li><li><p>d</p></li></ul>",
    "- [ ] a\n- [x] b": "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>",
    "1. a\n2. b\n\ntext": "<ol><li><p>a</p></li><li><p>b</p></li></ol><p>text</p>",
    "1. a\n   ```\n   x\n     y\n   ```\n2. b": "<ol><li><p>a</p><div><div><span>text</span>"
        "<button>Copy</button></div><pre><code>x\n  y</code></pre></div></li><li><p>b</p></li>"
        "</ol>",
    "In the year\n2024. Or so\n- not so": "<p>In the year<br>2024. Or so</p>"
        "<ul><li><p>not so</p></li></ul>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"
        "<p>c</p>",
    "a\n\n---\n***\nb": "<p>a</p><hr></hr><hr></hr><p>b</p>",
    "[a *b*](https://x.org) <https://y.org>": "<p><a>a <em>b</em></a> <a>https://y.org</a></p>",
    "(see https://x.org/a_b_(c)).": "<p>(see <a>https://x.org/a_b_(c)</a>).</p>",
    "[a](javascript:b) [c](/d) [e]": "<p>[a](javascript:b) [c](/d) [e]</p>",
    "| a | b |\n|---|:-:|\n| `x` | y \\| z<br>w |\n| only |": "<div><table><thead><tr>"
        "<th>a</th><th>b</th></tr></thead><tbody><tr><td><code>x</code></td><td>y | z<br>w</td>"
        "</tr><tr><td>only</td><td></td></tr></tbody></table></div>",
    "| a | b | c |\n|-|-|-|\n| x |": "<div><table><thead><tr><th>a</th><th>b</th><th>c</th>"
        "</tr></thead><tbody><tr><td>x</td><td></td></tr></tbody></table></div>",
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "```python\nif a:\n\tb\n\n": "<div><div><span>python</span><button>Copy</button></div>"
        "<pre><code><span>if</span> a:\n\tb\n\n</code></pre></div>",
    "~~~\n```\n~~~\nafter": "<div><div><span>text</span><button>Copy</button></div>"
        "<pre><code>```</code></pre></div><p>after</p>",
}  # fmt: skip
"""Texts, and the tags that they become."""


def test_markdown_becomes_elements(renderer: Page) -> None:
    assert {text: shape(renderer, text) for text in SHAPES} == SHAPES


CODE: list[tuple[str, str, dict[str, list[str]]]] = [
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
]  # fmt: skip
"""Languages, code in them, and its parts by their kind."""


def test_code_is_highlighted_and_stays_the_same_text(renderer: Page) -> None:
    for language, code, kinds in CODE:
        block = renderer.evaluate_handle(RENDER, f"```{language}\n{code}\n```")
        assert block.evaluate("(node) => node.querySelector('pre').textContent") == code
        found: list[list[str]] = block.evaluate(
            "(node) => [...node.querySelectorAll('pre span')]"
            ".map((part) => [part.className, part.textContent])"
        )
        shown = {name: [text for kind, text in found if kind == name] for name, _ in found}
        assert shown == kinds, code


@pytest.mark.parametrize("text", [RICH, HOSTILE], ids=["rich", "hostile"])
def test_a_growing_text_ends_like_one_rendered_at_once(renderer: Page, text: str) -> None:
    """Every prefix is rendered, both as growing and as complete."""
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


NESTED = [
    ("[", "x", "](http://a)"), ("![", "x", "](http://a)"), ("[", "x", "](javascript:a)"),
    ("[a](http://b", "", ")"), ("*", "a", "*"), ("*_", "a", "_*"), ("**~~", "a", "~~**"),
    ("> *", "a", "*"),
]  # fmt: skip
REPEATED = [
    "*", "_", "**a ", "*a_", "[", "[a](", "![", "](", "`", "`a``", "<", "> ", "- ", "1. ", "| ",
    "\\", "~~", "# ", "```\n", "http://", "http://[", "https://a)", "\t- a\n", "\n", " ", "|-",
    "```js\n/*", "```js\n'\\", '```py\n"""', "1_", "``` py\n",
]  # fmt: skip
MANY = ["a\n\n", "a\n", "- a\n", "**a** ", "`a` ", "|a\n"]  # more than a call takes arguments
LONGEST = 5_000  # milliseconds for one text; most take less than 100 on an idle machine


def test_no_text_nests_deeply_takes_long_or_is_too_much(renderer: Page) -> None:
    nested = [begin * n + text + end * n for begin, text, end in NESTED for n in (10, 1000, 20_000)]
    repeated = [part * (100_000 // len(part)) for part in REPEATED]
    many = [("|a\n|-|\n" if part[0] == "|" else "") + part * 150_000 for part in MANY]
    for text in (*nested, *repeated, *many, "[a](" + " " * 400_000 + "x"):
        start: float = renderer.evaluate("performance.now()")
        made = renderer.evaluate_handle(RENDER, text)
        assert made.evaluate("node => node.querySelector(Array(60).fill('*').join('>'))") is None
        assert renderer.evaluate("performance.now()") - start < LONGEST, text[:20]
