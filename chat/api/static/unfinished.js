// Markdown that is still being written, made to look as it will once it is finished: what is open
// is closed, and what may still become anything waits.

/** A line of marks alone: a list's item, a rule, a heading or an underline that has yet to come. */
const MARKS = /^[ \t>]*(?:\d{1,9}[.)]?)?[-+*=_~`#|: \t]*$/;
const DELIMITERS_AT_END = /(?<![*_~`])[*_~`]+$/;
const LINK_AT_END = /!?\[([^[\]]*)\]\([^()\s]*$/;
/** More columns are no table that is being written, but would keep the browser busy for seconds. */
const MOST_COLUMNS = 50;
const TABLE_HEAD = /(?:^|\n)( {0,3}\|[^\n]*)\n?$/;

/** Return the text, which is the tokens as it stands, as it is to be read while more is to come. */
export function completed(text, tokens) {
  const leaf = tokens.findLast(({ nesting }) => nesting === 0);
  const start = text.lastIndexOf("\n") + 1;
  const [before, line] = [text.slice(0, start), text.slice(start)];
  if (leaf?.type === "fence") return isPartOfEnd(line.trim(), leaf.markup) ? before : text;
  if (leaf?.type === "code_block") return text;
  const isInTable = tokens.at(-1)?.type === "table_close";
  text = before !== "" && !isInTable && MARKS.test(line) ? before : before + withClosers(line);
  return tokens.at(-1)?.type === "paragraph_close" ? withTable(text) : text;
}

const isPartOfEnd = (marks, fence) => marks && marks !== fence && fence.startsWith(marks);

/** Close the emphasis, strike-through and code that a line leaves open; a link waits for its end. */
function withClosers(line) {
  const text = line.replace(DELIMITERS_AT_END, "").replace(LINK_AT_END, "$1");
  const open = openIn(text);
  return open.length > 0 ? text.trimEnd() + open.reverse().join("") : text;
}

function openIn(line) {
  const delimiters = /\\.|`+|\*+|_+|~~/gs;
  const open = [];
  for (let found = delimiters.exec(line); found; found = delimiters.exec(line)) {
    const run = found[0];
    if (run[0] === "`") {
      const end = new RegExp(`(?<!\`)${run}(?!\`)`, "g");
      end.lastIndex = delimiters.lastIndex;
      if (!end.test(line)) return [...open, run];
      delimiters.lastIndex = end.lastIndex;
    } else if (run[0] !== "\\") {
      balance(open, run, line[found.index - 1] ?? " ", line[delimiters.lastIndex] ?? " ");
    }
  }
  return open;
}

/** Let a run of delimiters close what is open, or else open something. */
function balance(open, run, before, after) {
  if (run[0] === "_" && /\w/.test(before) && /\w/.test(after)) return;
  while (/\S/.test(before) && run && open.at(-1)?.[0] === run[0]) {
    const last = open.pop();
    if (last.length > run.length) open.push(last.slice(run.length));
    run = run.slice(last.length);
  }
  if (run && /\S/.test(after)) open.push(run);
}

/** A table shows as one from its first bar on, and not as text until its second line is whole. */
function withTable(text) {
  const head = TABLE_HEAD.exec(text)?.[1].trim();
  if (!head) return text;
  const columns = head.slice(1).replace(/\|$/, "").split(/(?<!\\)\|/).length;
  return columns > MOST_COLUMNS ? text : `${text.trimEnd()}\n${"|-".repeat(columns)}|`;
}
