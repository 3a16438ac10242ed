// Markdown as DOM nodes. A reply is built of elements and text nodes alone, so that nothing in it
// can become HTML; what is not understood is shown as it was written.
//
// The dialect is what language models write: CommonMark without HTML, references and indented code,
// with tables, and with each line end kept.

import { element, patchChild } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

/** Deeper lists and quotes are shown as paragraphs: no text may nest elements without end. */
const MAX_DEPTH = 10;

const FENCE = /^\s*(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s|$)/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^(\s*)([-*+]|\d{1,9}[.)])(?=\s|$)/;
const TASK = /^\[([ xX])\](?=\s)/;
const ALIGNMENT = /^:?-+:?$/;

/** What each container shows: its blocks, each with its source and its element. */
const shown = new WeakMap();

/**
 * Show a text in a container; what is shown there already stays untouched where it is the same, so
 * that a growing reply costs no more than its last block, and a selection in it is kept.
 *
 * @param {HTMLElement} container
 * @param {string} text
 * @param {boolean} isOpen whether more is to come
 */
export function showMarkdown(container, text, isOpen = false) {
  const before = shown.get(container) ?? [];
  shown.delete(container);
  if (before.length === 0) container.replaceChildren();
  const blocks = blocksOf(text.split(/\r\n|\r|\n/), 0);
  const after = blocks.map(({ source, build }, index) => {
    const isGrowing = isOpen && index === blocks.length - 1;
    const old = before[index];
    if (old?.source === source && old.isGrowing === isGrowing) return old;
    return { source, isGrowing, node: patchChild(container, old?.node, build(isGrowing)) };
  });
  for (const { node } of before.slice(blocks.length)) node.remove();
  shown.set(container, after);
}

/**
 * Split lines into blocks: each with its source and with a function that builds its element.
 *
 * Each kind of block has a reader that returns `{end, build}`: the number of the first line after
 * it. The readers of what may interrupt a paragraph come first, with a test for their first line.
 */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const { end, build } = readBlock(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const kind = kindAt(lines, at);
  if (depth >= MAX_DEPTH && (kind === readList || kind === readQuote))
    return readParagraph(lines, at);
  return kind(lines, at, depth);
}

/** Return the reader of the block that begins at the line. */
function kindAt(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return readFence;
  if (HEADING.test(line)) return readHeading;
  if (isRule(line)) return readRule;
  if (QUOTE.test(line)) return readQuote;
  if (MARKER.test(line)) return readList;
  if (isTable(lines, at)) return readTable;
  return readParagraph;
}

function buildBlocks(lines, depth, isOpen) {
  const blocks = blocksOf(lines, depth);
  return blocks.map(({ build }, index) => build(isOpen && index === blocks.length - 1));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end += 1;
  const own = lines.slice(at, end);
  const text = own
    .map((line) => line.trimStart())
    .join("\n")
    .trimEnd();
  const build = (isOpen) =>
    isOpen && mayBecomeTable(own)
      ? tableOf(
          own[0],
          cellsOf(own[0]).map(() => ""),
          [],
        )
      : element("p", {}, inline(text, { isOpen }));
  return { end, build };
}

/** A table shows as one from its first bar on, and not as text until its second line is whole. */
function mayBecomeTable([head, delimiters = "", ...more]) {
  return /^\s*\|/.test(head) && /^[\s|:-]*$/.test(delimiters) && more.length === 0;
}

/** Tell whether a paragraph ends before this line, though no blank line is between. */
function interrupts(lines, at) {
  const kind = kindAt(lines, at);
  if (kind !== readList) return kind !== readParagraph;
  // "In the year\n2024. Or" is no list: one within a paragraph begins with 1, and not empty.
  const [all, , marker] = MARKER.exec(lines[at]);
  return !isBlank(lines[at].slice(all.length)) && (!/\d/.test(marker) || /^1[.)]/.test(marker));
}

function readHeading(lines, at) {
  const [all, marks] = HEADING.exec(lines[at]);
  const text = lines[at]
    .slice(all.length)
    .trim()
    .replace(/(^|\s)#+$/, "");
  // Below the page's own two levels.
  const level = String(Math.min(6, marks.length + 2));
  const attributes = { class: `level-${marks.length}`, "aria-level": level };
  return {
    end: at + 1,
    build: (isOpen) => element("h3", attributes, inline(text.trim(), { isOpen })),
  };
}

function isRule(line) {
  return /^(-{3,}|\*{3,}|_{3,})$/.test(line.replace(/\s/g, ""));
}

function readRule(lines, at) {
  return { end: at + 1, build: () => element("hr") };
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  const build = (isOpen) => element("blockquote", {}, buildBlocks(inner, depth + 1, isOpen));
  return { end, build };
}

function readFence(lines, at) {
  const [, fence, info] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !isFenceEnd(lines[end], fence)) end += 1;
  const indent = indentOf(lines[at]);
  const code = lines
    .slice(at + 1, end)
    .map((line) => withoutIndent(line, indent))
    .join("\n");
  return {
    end: Math.min(end + 1, lines.length),
    build: () => codeBlock(code, info.trim().split(/\s/)[0]),
  };
}

function isFenceEnd(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && trimmed === fence[0].repeat(trimmed.length);
}

function codeBlock(code, language) {
  const name = language ? `Code in ${language}` : "Code";
  return element(
    "div",
    { class: "code", dir: "ltr" },
    element(
      "div",
      { class: "code-head" },
      element("span", {}, language || "text"),
      element("button", { type: "button", class: "copy-code" }, "Copy"),
    ),
    element(
      "pre",
      { tabindex: "0", role: "group", "aria-label": name },
      element("code", {}, highlight(code, language)),
    ),
  );
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-"))
    return false;
  const delimiters = cellsOf(lines[at + 1]);
  return (
    delimiters.every((cell) => ALIGNMENT.test(cell)) &&
    delimiters.length === cellsOf(lines[at]).length
  );
}

function readTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) end += 1;
  const sides = cellsOf(lines[at + 1]).map(sideOf);
  return { end, build: () => tableOf(lines[at], sides, lines.slice(at + 2, end)) };
}

function tableOf(head, sides, lines) {
  return element(
    "div",
    { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    element(
      "table",
      {},
      element("thead", {}, tableRow("th", sides, head)),
      element(
        "tbody",
        {},
        lines.map((line) => tableRow("td", sides, line)),
      ),
    ),
  );
}

function tableRow(name, sides, line) {
  const cells = cellsOf(line).slice(0, sides.length);
  const missing = sides.length - cells.length;
  return element(
    "tr",
    {},
    cells.map((text, index) => tableCell(name, sides[index], text)),
    // One for all: a cell for each would let a short text make millions of elements.
    missing > 0 ? [element(name, { colspan: String(missing) })] : [],
  );
}

function tableCell(name, side, text) {
  return element(name, side ? { class: side } : {}, inline(text, { isInCell: true }));
}

function sideOf(delimiter) {
  if (!delimiter.endsWith(":")) return "";
  return delimiter.startsWith(":") ? "centred" : "right";
}

/** Split a row at its bars; an escaped one is part of a cell. */
function cellsOf(line) {
  const row = line.trim().replace(/^\|/, "");
  const cells = [""];
  for (let at = 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") cells[cells.length - 1] += row[(at += 1)];
    else if (row[at] === "|") cells.push("");
    else cells[cells.length - 1] += row[at];
  }
  if (cells.length > 1 && !cells.at(-1).trim()) cells.pop();
  return cells.map((cell) => cell.trim());
}

function readList(lines, at, depth) {
  const first = markerAt(lines, at);
  const items = [];
  let end = at;
  for (
    let marker = first;
    isSibling(marker, first);
    marker = markerAt(lines, skipBlank(lines, end))
  ) {
    const begin = skipBlank(lines, end);
    end = endOfItem(lines, begin, marker);
    const [head, ...rest] = lines.slice(begin, end);
    items.push([
      head.slice(marker.width).replace(TASK, (_, mark) => (mark === " " ? "☐" : "☑")),
      ...rest.map((line) => withoutIndent(line, marker.width)),
    ]);
  }
  const build = (isOpen) => {
    const children = items.map((item, index) =>
      element("li", {}, buildBlocks(item, depth + 1, isOpen && index === items.length - 1)),
    );
    return element(first.isOrdered ? "ol" : "ul", listAttributes(first), children);
  };
  return { end, build };
}

function listAttributes({ isOrdered, number }) {
  return isOrdered && number !== 1 ? { start: String(number) } : {};
}

/** Return what the marker of a list's item at the line says; null where there is none. */
function markerAt(lines, at) {
  const found = at < lines.length && !isRule(lines[at]) && MARKER.exec(lines[at]);
  if (!found) return null;
  const [all, indent, mark] = found;
  return {
    kind: mark.at(-1),
    isOrdered: /\d/.test(mark),
    number: Number.parseInt(mark, 10),
    indent: indentOf(indent),
    width: all.length + (all.length < lines[at].length ? 1 : 0),
  };
}

function isSibling(marker, first) {
  return marker !== null && marker.kind === first.kind && marker.indent < first.indent + 2;
}

/** Return the number of the first line after an item: what is indented belongs to it. */
function endOfItem(lines, at, marker) {
  let end = at + 1;
  while (end < lines.length) {
    const next = skipBlank(lines, end);
    if (next === lines.length) return end;
    const isInner = indentOf(lines[next]) >= marker.indent + 2;
    const isContinued = next === end && !MARKER.test(lines[next]) && !interrupts(lines, next);
    if (!isInner && !isContinued) return end;
    end = next + 1;
  }
  return end;
}

function isBlank(line) {
  return !/\S/.test(line);
}

function skipBlank(lines, at) {
  let next = at;
  while (next < lines.length && isBlank(lines[next])) next += 1;
  return next;
}

/** Return how far a line is indented, in columns; a tab goes to the next multiple of four. */
function indentOf(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns += 1;
    else if (character === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

function withoutIndent(line, columns) {
  let at = 0;
  for (let left = columns; left > 0 && /[ \t]/.test(line[at] ?? ""); at += 1) {
    left -= line[at] === "\t" ? 4 : 1;
  }
  return line.slice(at);
}
