// Markdown within a line: emphasis, code, links. One pass over the text, whatever it holds.

import { element } from "./dom.js";

const SPECIAL = /https?:\/\/|[\\`*_~[!<\n]/g;
/** But brackets: with them, models begin and end formulas. */
const ESCAPABLE = /[!-'*-/:-@\\^-`{-~]/;
const TICKS = /`+/g;
const RUN = /([*_~])\1*/y;
const ANGLED_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BREAK_TAG = /<br *\/?>/iy;
const BARE_LINK = /https?:\/\/[^\s<>"`|]{1,2000}/y;
// Each run of white space has a limit: three that may share one run would try each way to do so.
const DESTINATION =
  /\(\s{0,9}(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:\s{1,9}(?:"[^"]*"|'[^']*'))?\s{0,9}\)/y;
const SAFE_PROTOCOLS = ["http:", "https:", "mailto:"];
/** Deeper emphasis is shown as it was written: no text may nest elements without end. */
const MAX_DEPTH = 20;

/**
 * Turn the text of a paragraph, heading or cell into elements and strings.
 *
 * @param {string} text
 * @param {{isOpen?: boolean, isInLink?: boolean, isInCell?: boolean}} place whether more text is to
 *   come, so that bold text or code that has no end yet is shown as such; and what is around it.
 * @returns {(HTMLElement | string)[]}
 */
export function inline(text, place = {}) {
  return new InlineReader(text, place).read();
}

class InlineReader {
  /** Delimiters that may yet turn out to begin an emphasis, outermost first; the first is none. */
  #frames = [{ mark: "", length: 0, children: [] }];
  /** Lengths of runs of backticks of which there is no other further on. */
  #unclosedTicks = new Set();
  #at = 0;

  constructor(text, place) {
    this.text = text;
    this.place = place;
    this.closingBrackets = matchBrackets(text);
  }

  read() {
    while (this.#at < this.text.length) {
      SPECIAL.lastIndex = this.#at;
      const found = SPECIAL.exec(this.text);
      const end = found ? found.index : this.text.length;
      this.#say(this.text.slice(this.#at, end));
      this.#at = end;
      if (found && !this.#readSpecial(found[0])) this.#say(found[0], found[0].length);
    }
    while (this.#frames.length > 1) this.#endFrame(this.place.isOpen);
    return this.#children;
  }

  get #children() {
    return this.#frames.at(-1).children;
  }

  /** Add text, and move on by so many characters. */
  #say(text, length = 0) {
    this.#at += length;
    const children = this.#children;
    if (typeof children.at(-1) === "string") children.push(children.pop() + text);
    else if (text) children.push(text);
  }

  #add(node, end) {
    this.#children.push(node);
    this.#at = end;
  }

  /** Read what may begin here; tell whether it did. */
  #readSpecial(mark) {
    if (mark === "\\") return this.#readEscape();
    if (mark === "`") return this.#readCode();
    if (mark === "\n") return this.#readLineEnd();
    if (mark === "<") return this.#readAngle();
    if (mark === "[") return this.#readLink(this.#at);
    if (mark === "!") return this.text[this.#at + 1] === "[" && this.#readLink(this.#at + 1);
    if (mark.startsWith("http")) return this.#readBareLink();
    return this.#readDelimiters();
  }

  #match(pattern, at = this.#at) {
    pattern.lastIndex = at;
    return pattern.exec(this.text);
  }

  #readEscape() {
    const next = this.text[this.#at + 1] ?? "";
    if (!ESCAPABLE.test(next)) return false;
    this.#say(next, 2);
    return true;
  }

  #readLineEnd() {
    const children = this.#children;
    if (typeof children.at(-1) === "string") children.push(children.pop().trimEnd());
    this.#add(element("br"), this.#at + 1);
    return true;
  }

  #readCode() {
    const length = this.#match(TICKS)[0].length;
    const begin = this.#at + length;
    const end = this.#closingTicks(begin, length);
    if (end === -1) this.#say(this.text.slice(this.#at, begin), length);
    else this.#add(element("code", {}, codeText(this.text.slice(begin, end))), end + length);
    return true;
  }

  #closingTicks(begin, length) {
    if (!this.#unclosedTicks.has(length)) {
      TICKS.lastIndex = begin;
      for (let run; (run = TICKS.exec(this.text));) {
        if (run[0].length === length) return run.index;
      }
      this.#unclosedTicks.add(length);
    }
    return this.place.isOpen && begin < this.text.length ? this.text.length : -1;
  }

  #readAngle() {
    const tag = this.place.isInCell && this.#match(BREAK_TAG);
    if (tag) this.#add(element("br"), this.#at + tag[0].length);
    const found = !tag && this.#match(ANGLED_LINK);
    return Boolean(tag) || (found && this.#addLink(found[1], this.#at + found[0].length));
  }

  #readBareLink() {
    if (/\w/.test(this.text[this.#at - 1] ?? "")) return false;
    const url = withoutPunctuation(this.#match(BARE_LINK)?.[0] ?? "");
    return this.#addLink(url, this.#at + url.length);
  }

  #readLink(bracket) {
    const closing = this.closingBrackets.get(bracket);
    const found = closing && this.#match(DESTINATION, closing + 1);
    if (!found) return false;
    const url = (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
    const text = this.text.slice(bracket + 1, closing);
    return this.#addLink(url, closing + 1 + found[0].length, text);
  }

  /** Add a link if the address is one to follow; tell whether it is. */
  #addLink(url, end, text = "") {
    const href = this.place.isInLink ? null : safeAddress(url);
    if (href === null) return false;
    // Read only now: what is no link is read again, and links within links would be without end.
    const children = text ? inline(text, { ...this.place, isInLink: true }) : [url];
    const attributes = { href, target: "_blank", rel: "noopener noreferrer" };
    this.#add(element("a", attributes, children), end);
    return true;
  }

  #readDelimiters() {
    const [run, mark] = this.#match(RUN);
    const { canOpen, canClose } = this.#sides(mark, run.length);
    this.#at += run.length;
    let left = run.length;
    while (canClose && left > 0) {
      const used = this.#close(mark, left, canOpen);
      if (used === 0) break;
      left -= used;
    }
    if (left > 0 && canOpen && this.#depth + left <= MAX_DEPTH) {
      this.#frames.push({ mark, length: left, children: [], canClose });
    } else {
      this.#say(mark.repeat(left));
    }
    return true;
  }

  /** As deep as the delimiters that were not closed yet can nest elements. */
  get #depth() {
    return this.#frames.reduce((sum, frame) => sum + frame.length, 0);
  }

  /** Tell whether a run of delimiters may begin an emphasis, and whether it may end one. */
  #sides(mark, length) {
    const before = this.text[this.#at - 1] ?? " ";
    const after = this.text[this.#at + length] ?? " ";
    const isWord = /[\p{L}\p{N}_]/u;
    // An underscore stands within names, an asterisk does not; a single ~ means "about".
    const canOpen = /\S/.test(after) && !(mark === "_" && isWord.test(before));
    const canClose = /\S/.test(before) && !(mark === "_" && isWord.test(after));
    const isKnown = mark !== "~" || length === 2;
    return { canOpen: isKnown && canOpen, canClose: isKnown && canClose };
  }

  /** Close the nearest emphasis with this mark; return how many of the delimiters it took. */
  #close(mark, length, canOpen) {
    const opener = this.#openerOf(mark, length, canOpen);
    if (opener === -1) return 0;
    while (this.#frames.length > opener + 1) this.#endFrame(false);
    const used = Math.min(2, length, this.#frames[opener].length);
    this.#wrap(used);
    return used;
  }

  /** Return the nearest that is as long as its end, else the nearest. */
  #openerOf(mark, length, canOpen) {
    const isSame = (frame) => frame.mark === mark && frame.length === length;
    const same = this.#frames.findLastIndex(isSame);
    if (same !== -1) return same;
    // CommonMark's rule of three: of **a*b**, the single one is no end of the first.
    return this.#frames.findLastIndex(
      (frame) =>
        frame.mark === mark &&
        !((frame.canClose || canOpen) && (frame.length + length) % 3 === 0 && length % 3 !== 0),
    );
  }

  /** Make an emphasis of the innermost frame, with so many of its delimiters. */
  #wrap(used) {
    const frame = this.#frames.at(-1);
    const name = frame.mark === "~" ? "del" : used === 2 ? "strong" : "em";
    const node = element(name, {}, frame.children);
    frame.length -= used;
    frame.children = [node];
    if (frame.length === 0) {
      this.#frames.pop();
      this.#children.push(node);
    }
  }

  /** End the innermost frame, which was never closed: as emphasis, or as it was written. */
  #endFrame(isEmphasis) {
    if (isEmphasis && this.#frames.at(-1).length >= 2) return this.#wrap(2);
    const { mark, length, children } = this.#frames.pop();
    this.#say(mark.repeat(length));
    for (const child of children) {
      if (typeof child === "string") this.#say(child);
      else this.#children.push(child);
    }
  }
}

/** Return where each opening bracket's closing one stands. */
function matchBrackets(text) {
  const open = [];
  const found = new Map();
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) found.set(open.pop(), at);
  }
  return found;
}

function codeText(source) {
  const text = source.replace(/\n/g, " ");
  const isPadded = text.startsWith(" ") && text.endsWith(" ") && text.trim();
  return isPadded ? text.slice(1, -1) : text;
}

/** Leave off what more likely ends the sentence than the address. */
function withoutPunctuation(url) {
  let unopened = url.split(")").length - url.split("(").length;
  let end = url.length;
  for (; /[.,;:!?*_~'\])]/.test(url[end - 1] ?? ""); end -= 1) {
    if (url[end - 1] !== ")") continue;
    if (unopened <= 0) break;
    unopened -= 1;
  }
  return url.slice(0, end);
}

/** Return the address if it leads to another site or a mail; else null. */
function safeAddress(text) {
  if (!URL.canParse(text)) return null;
  const { protocol, href } = new URL(text);
  return SAFE_PROTOCOLS.includes(protocol) ? href : null;
}
