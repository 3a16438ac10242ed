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


def shape(page: Page, text: str, *, is_growing: bool = False) -> str:
    """Render a text; return its tags without attributes."""
    made: str = page.evaluate_handle(RENDER, [text, is_growing]).evaluate(SHAPE)
    return made


def code(language: str, text: str) -> str:
    head = f"<div><span>{language}</span><button>Copy</button></div>"
    return f"<div>{head}<pre><code>{text}</code></pre></div>"


def table(head: str, body: str = "") -> str:
    return f"<div><table><thead>{head}</thead>{body and f'<tbody>{body}</tbody>'}</table></div>"


SHAPES = {
    "one\ntwo\\\nthree\n\nfour": "<p>one<br>two<br>three</p><p>four</p>",
    "# A\n###### B ##\nC\n===": "<h3>A</h3><h3>B</h3><h3>C</h3>",
    "#no heading": "<p>#no heading</p>",
    "*a* **b** ***c*** _d_ __e__ ~~f~~ ~g": "<p><em>a</em> <strong>b</strong> "
        "<em><strong>c</strong></em> <em>d</em> <strong>e</strong> <s>f</s> ~g</p>",
    "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
    "**open *one": "<p>**open *one</p>",
    r"\*no\* \`no\` \a": r"<p>*no* `no` \a</p>",
    "`a *b*` ``c ` d`` `open": "<p><code>a *b*</code> <code>c ` d</code> `open</p>",
    "- a\n- b\n  - c\n\n  more": "<ul><li><p>a</p></li><li><p>b</p><ul><li>c</li></ul><p>more</p>"
        "</li></ul>",
    "- [ ] a\n- [x] b\n\n3. [x]c": "<ul><li>☐ a</li><li>☑ b</li></ul><ol><li>[x]c</li></ol>",
    "1. a\n   ```\n   x\n     y\n   ```\n2. b": "<ol><li>a" + code("text", "x\n  y") + "</li>"
        "<li>b</li></ol>",
    "In the year\n2024. Or so\n- not so": "<p>In the year<br>2024. Or so</p>"
        "<ul><li>not so</li></ul>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"
        "<p>c</p>",
    "a\n\n---\n***\nb": "<p>a</p><hr></hr><hr></hr><p>b</p>",
    "[a *b*](https://x.org) <https://y.org>": "<p><a>a <em>b</em></a> <a>https://y.org</a></p>",
    "(see https://x.org/a_b_(c)).": "<p>(see <a>https://x.org/a_b_(c)</a>).</p>",
    "main.py, README.md, a@b.org": "<p>main.py, README.md, a@b.org</p>",
    "[a](javascript:b) [c](/d) [e](//f) [g]": "<p>[a](javascript:b) c e [g]</p>",
    "![a](https://x.org/y.png) ![](/z) ![](data:x)": "<p><a>a</a> /z ![](data:x)</p>",
    "[a][1] <b>c</b> &amp;\n\n[1]: https://x.org": "<p><a>a</a> <b>c</b> &</p>",
    "| a | b |\n|---|:-:|\n| `x` | y \\| z<br>w |\n| only |": table("<tr><th>a</th><th>b</th></tr>",
        "<tr><td><code>x</code></td><td>y | z<br>w</td></tr><tr><td>only</td><td></td></tr>"),
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "```python\nif a:\n\tb\n\n": code("python", "<span>if</span> a:\n\tb\n"),
    "~~~\n```\n~~~\nafter\n\n    indented": code("text", "```") + "<p>after</p>"
        + code("text", "indented"),
}  # fmt: skip
"""Texts, and the tags that they become."""

ONE = "<tr><th>a</th><th>b</th></tr>"
GROWING = {
    "**a *b": "<p><strong>a <em>b</em></strong></p>",
    "a *b* **c*": "<p>a <em>b</em> <strong>c</strong></p>",
    "- ~~a `b": "<ul><li><s>a <code>b</code></s></li></ul>",
    r"\*a b_c ``d ` e": r"<p>*a b_c <code>d ` e</code></p>",
    "see [the **text**](https://x": "<p>see the <strong>text</strong></p>",
    "Text:\n-": "<p>Text:</p>",
    "Text:\n\n1.": "<p>Text:</p>",
    "4": "<p>4</p>",
    "| a | b": table(ONE),
    "| a | b |\n| -": table(ONE),
    "| a | b |\n|--|--|\n| **c": table(ONE, "<tr><td><strong>c</strong></td><td></td></tr>"),
    "a\n\n| a | b": f"<p>a</p>{table(ONE)}",
    "```js\n1": code("js", "<span>1</span>"),
    "```\na\n``": code("text", "a"),
}
"""Texts of which more is to come, and the tags that they become until then."""


def test_markdown_becomes_elements(renderer: Page) -> None:
    assert {text: shape(renderer, text) for text in SHAPES} == SHAPES


def test_what_is_half_written_looks_as_if_it_were_finished(renderer: Page) -> None:
    assert {text: shape(renderer, text, is_growing=True) for text in GROWING} == GROWING


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
    for language, text, kinds in CODE:
        block = renderer.evaluate_handle(RENDER, [f"```{language}\n{text}\n```"])
        assert block.evaluate("(node) => node.querySelector('pre').textContent") == text
        found: list[list[str]] = block.evaluate(
            "(node) => [...node.querySelectorAll('pre span')]"
            ".map((part) => [part.className, part.textContent])"
        )
        shown = {name: [part for kind, part in found if kind == name] for name, _ in found}
        assert shown == kinds, text


@pytest.mark.parametrize("text", [RICH, HOSTILE, *SHAPES])
def test_a_growing_text_ends_like_one_rendered_at_once(renderer: Page, text: str) -> None:
    text = f"start\n\n{text}\n\n- a\n\n{text}"
    grown = renderer.evaluate_handle(
        """async (text) => {
          const { MarkdownView } = await import("/static/render.js");
          const container = document.createElement("div");
          const view = new MarkdownView(container);
          for (let end = 0; end <= text.length; end += 1) view.show(text.slice(0, end), true);
          view.show(text);
          return container;
        }""",
        text,
    )
    whole = renderer.evaluate_handle(RENDER, [text])
    assert grown.evaluate("(one, other) => one.isEqualNode(other)", whole)


# Returns the milliseconds of each step and of the layout after it, by the browser's own clock.
GROW = """async ([text, step]) => {
  const { MarkdownView } = await import("/static/render.js");
  const container = document.getElementById("log");
  container.className = "text";
  const view = new MarkdownView(container);
  const first = [];
  for (let end = step; end <= text.length; end += step) {
    performance.mark("start");
    view.show(text.slice(0, end), true);
    container.getBoundingClientRect();
    performance.measure("step", "start");
    first.push(container.firstChild);
  }
  const lengths = performance.getEntriesByName("step").map(({ duration }) => duration);
  return { lengths, isKept: first.every((node) => node === first[0]) };
}"""


def test_a_reply_of_100_kilobytes_grows_without_a_frame_over_50_milliseconds(
    renderer: Page,
) -> None:
    text = (RICH + "\n\n") * (100_000 // len(RICH))
    grown = renderer.evaluate(GROW, [text, 100])
    assert grown["isKept"]
    # Single steps show what else the machine does; most are long if finished blocks are read.
    assert len(grown["lengths"]) > 900
    assert sorted(grown["lengths"])[len(grown["lengths"]) * 95 // 100] < 50


NESTED = [
    ("[", "x", "](http://a)"), ("![", "x", "](http://a)"), ("[", "x", "](javascript:a)"),
    ("[a](http://b", "", ")"), ("*", "a", "*"), ("*_", "a", "_*"), ("**~~", "a", "~~**"),
    ("> *", "a", "*"), ("> ", "a", ""), ("- ", "a", ""),
]  # fmt: skip
REPEATED = [
    "*", "_", "**a ", "*a_", "[", "[a](", "![", "](", "`", "`a``", "<", "> ", "- ", "1. ", "| ",
    "\\", "~~", "# ", "```\n", "http://", "http://[", "https://a)", "\t- a\n", "\n", " ", "|-",
    "```js\n/*", "```js\n'\\", '```py\n"""', "1_", "``` py\n", "`` ", "[a]: ", "&", "\n|", "<br>",
]  # fmt: skip
MANY = ["a\n\n", "a\n", "- a\n", "**a** ", "`a` ", "|a\n"]  # more than a call takes arguments
LONGEST = 5_000  # milliseconds for one text; most take less than 100 on an idle machine


def test_no_text_nests_deeply_takes_long_or_is_too_much(renderer: Page) -> None:
    nested = [begin * n + text + end * n for begin, text, end in NESTED for n in (10, 1000, 20_000)]
    repeated = [part * (100_000 // len(part)) for part in REPEATED]
    many = [("|a\n|-|\n" if part[0] == "|" else "") + part * 150_000 for part in MANY]
    for text in (*nested, *repeated, *many, "[a](" + " " * 400_000 + "x"):
        start: float = renderer.evaluate("performance.now()")
        made = renderer.evaluate_handle(RENDER, [text, True])
        assert made.evaluate("node => node.querySelector(Array(60).fill('*').join('>'))") is None
        assert renderer.evaluate("performance.now()") - start < LONGEST, text[:20]
