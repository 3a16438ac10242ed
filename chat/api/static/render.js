// Markdown as DOM nodes. The tokens of the parser become elements and text nodes, and never HTML, so
// that nothing in a reply can become code.

import { element, patchChild } from "./dom.js";
import { highlight } from "./highlight.js";
import { completed } from "./unfinished.js";
import MarkdownIt from "./vendor/markdown-it.esm.min.mjs";

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
// Otherwise "main.py" and "README.md" lead to sites in Paraguay and Moldova.
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

/** Deeper elements are left out, and not what is in them: no text may nest without end. */
const DEEPEST = 25;
/** A definition gives links an address, also those that stand before it. */
const DEFINITION = /\[[^[\]]+\]:/;
const TASK = /^\[([ xX])\](?=\s)/;
const SAFE_PROTOCOLS = ["http:", "https:", "mailto:"];
const SIDES = { "text-align:right": "right", "text-align:center": "centred" };

/** A text in a container. What has not changed since the last look at it is left alone, so that a
 * growing text costs no more than its last blocks, and a selection in it is kept. */
export class MarkdownView {
  #container;
  #text = "";
  /** The source of each block that is shown. */
  #sources = [];
  /** How many blocks are finished, and where in the text the others begin. */
  #finished = 0;
  #start = 0;

  constructor(container) {
    this.#container = container;
  }

  /** Show the text, of which more is to come if it is growing. */
  show(text, isGrowing = false) {
    if (!text.startsWith(this.#text) || (!isGrowing && DEFINITION.test(text))) {
      [this.#sources, this.#finished, this.#start] = [[], 0, 0];
    }
    this.#text = text;
    const rest = text.slice(this.#start);
    const tokens = parser.parse(rest, {});
    const whole = isGrowing ? completed(rest, tokens) : rest;
    const blocks = blocksOf(whole === rest ? tokens : parser.parse(whole, {}));
    this.#showBlocks(blocks, whole.split("\n"), isGrowing);
  }

  #showBlocks(blocks, lines, isGrowing) {
    const children = this.#container.childNodes;
    blocks.forEach((tokens, index) => {
      const at = this.#finished + index;
      const source = lines.slice(...tokens[0].map).join("\n");
      if (source === this.#sources[at]) return;
      this.#sources[at] = source;
      patchChild(this.#container, children[at], fragmentOf(tokens).firstChild);
    });
    this.#sources.length = this.#finished + blocks.length;
    while (children.length > this.#sources.length) children[children.length - 1].remove();
    if (isGrowing && blocks.length > 2) this.#finish(blocks, lines);
  }

  /** The last line may yet join its block to the one before: all blocks but these two are final. */
  #finish(blocks, lines) {
    const [line] = blocks.at(-2)[0].map;
    this.#finished += blocks.length - 2;
    this.#start += lines.slice(0, line).reduce((length, each) => length + each.length + 1, 0);
  }
}

/** Split tokens into those of each block that is in no other. */
function blocksOf(tokens) {
  const blocks = [];
  let start = 0;
  tokens.forEach(({ level, nesting }, index) => {
    if (level > 0 || nesting > 0) return;
    blocks.push(tokens.slice(start, index + 1));
    start = index + 1;
  });
  return blocks;
}

function fragmentOf(tokens) {
  const open = [document.createDocumentFragment()];
  tokens.forEach((token, index) => {
    if (token.nesting < 0) return open.pop();
    if (tokens[index - 2]?.type === "list_item_open") showTask(token, open.at(-1).closest("li"));
    const isTooDeep = token.nesting > 0 && open.length > DEEPEST;
    const made = isTooDeep ? null : (NODES[token.type] ?? NODES.any)(token);
    const parent = open.at(-1);
    if (made) parent.append(made);
    if (token.nesting > 0) open.push(made?.querySelector("table") ?? made ?? parent);
  });
  return open[0];
}

/** What each type of token becomes, where that is more than its element or less. */
const NODES = {
  any: ({ tag }) => element(tag),
  inline: ({ children }) => fragmentOf(children),
  text: ({ content }) => {
    const [first, ...others] = content.split(/<br *\/?>/i);
    return fragment([first, ...others.flatMap((part) => [element("br"), part])]);
  },
  code_inline: ({ content }) => element("code", {}, content),
  paragraph_open: ({ hidden }) => (hidden ? null : element("p")),
  heading_open: ({ tag }) => {
    const level = Number(tag.slice(1)); // below the page's own two
    return element("h3", { class: `level-${level}`, "aria-level": Math.min(6, level + 2) });
  },
  ordered_list_open: ({ attrs }) => element("ol", Object.fromEntries(attrs ?? [])), // its start
  fence: ({ content, info }) => codeBlock(content, info.trim().split(/\s/)[0]),
  code_block: ({ content }) => codeBlock(content, ""),
  table_open: () => {
    const attributes = { class: "table", tabindex: 0, role: "group", "aria-label": "Table" };
    return element("div", attributes, element("table"));
  },
  th_open: cell,
  td_open: cell,
  link_open: (token) => link(token.attrGet("href")),
  image: (token) => {
    const address = token.attrGet("src");
    const made = link(address) ?? fragment([]);
    made.append(token.content || address);
    return made;
  },
};

function fragment(nodes) {
  const made = document.createDocumentFragment();
  for (const node of nodes) made.append(node);
  return made;
}

function cell(token) {
  const side = SIDES[token.attrGet("style")];
  return element(token.tag, side ? { class: side } : {});
}

/** An address within this site is none that a model can know of. */
function link(address) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!SAFE_PROTOCOLS.includes(url?.protocol)) return null;
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function showTask({ children }, item) {
  const [text] = children ?? [];
  if (text?.type !== "text" || !TASK.test(text.content)) return;
  text.content = text.content.replace(TASK, (_, mark) => (mark === " " ? "☐" : "☑"));
  item?.classList.add("task");
}

function codeBlock(content, language) {
  const name = language ? `Code in ${language}` : "Code";
  const copy = element("button", { type: "button", class: "copy-code" }, "Copy");
  const head = element("div", { class: "code-head" }, element("span", {}, language || "text"), copy);
  const code = element("code", {}, highlight(content.replace(/\n$/, ""), language));
  const pre = element("pre", { tabindex: 0, role: "group", "aria-label": name }, code);
  return element("div", { class: "code", dir: "ltr" }, head, pre);
}
