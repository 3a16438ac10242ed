// Colours for code: what most languages have in common, told apart by one pass of one pattern.

import { element } from "./dom.js";

/** How comments begin, by the languages' names. */
const COMMENTS = {
  "bash dockerfile elixir graphql makefile nix perl py python r rb ruby sh shell toml yaml yml zsh":
    /(?<!\S)#.*/,
  "c c# c++ cpp cs csharp css dart go java javascript js json jsonc jsx kotlin php proto rs rust \
scala scss swift ts tsx typescript zig": /\/\/.*|\/\*[^]*?(?:\*\/|$)/,
  "elm haskell hs lua sql": /--.*/,
};
const STRING =
  /"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`/;
const NUMBER = /\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b/;
const WORD = /[A-Za-z_$][\w$]*/;
const KEYWORDS = new Set(
  `abstract and as assert async await begin bool break by case catch char class const continue def
  default defer del delete distinct do done double echo elif else end enum esac except export
  extends false False fi final finally float fn for foreach from func function go group having if
  impl implements import in insert instanceof int interface into is join lambda left let limit
  local long loop match mod module mut namespace new nil none None nonlocal not null of on or
  order override package pass private protected pub public raise readonly return select self set
  short signed sizeof static string struct super switch table then this throw trait true True try
  type typedef typeof undefined union unless unsafe unsigned until update use using val values
  var void where while with yield`.split(/\s+/),
);
/** Longer code is shown plain: nobody reads it here. */
const LONGEST = 20_000;

const PATTERNS = new Map(
  Object.entries(COMMENTS).flatMap(([languages, comment]) => {
    const kinds = Object.entries({ comment, string: STRING, number: NUMBER, word: WORD });
    const source = kinds.map(([kind, pattern]) => `(?<${kind}>${pattern.source})`).join("|");
    return languages.split(" ").map((language) => [language, new RegExp(source, "g")]);
  }),
);

/** Split code into strings and coloured elements; in a language not known here it stays one. */
export function highlight(code, language) {
  const pattern = PATTERNS.get(language.toLowerCase());
  if (!pattern || code.length > LONGEST) return [code];
  const parts = [];
  let end = 0;
  for (const found of code.matchAll(pattern)) {
    const kind = kindOf(found, language);
    if (!kind) continue;
    parts.push(code.slice(end, found.index), element("span", { class: kind }, found[0]));
    end = found.index + found[0].length;
  }
  parts.push(code.slice(end));
  return parts.filter((part) => part !== "");
}

function kindOf({ groups, index, input, 0: text }, language) {
  if (!groups.word) return Object.keys(groups).find((kind) => groups[kind]);
  const word = /^sql$/i.test(language) ? text.toLowerCase() : text;
  if (KEYWORDS.has(word) && input[index - 1] !== ".") return "keyword";
  return input[index + text.length] === "(" ? "call" : null;
}
