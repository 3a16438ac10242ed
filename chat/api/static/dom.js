/**
 * Make an element. Text given as a child stays text: nothing here is ever parsed as HTML.
 *
 * @param {string} name
 * @param {Record<string, string>} attributes
 * @param {...(Node | string | (Node | string)[])} children an array for as many as there may be: a
 *   call takes only some ten thousand arguments.
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  for (const child of children.flat()) made.append(child);
  return made;
}

/** Change a child into the fresh one; leave alone what is the same; return the one that stands. */
export function patchChild(parent, old, fresh) {
  if (old?.isEqualNode(fresh)) return old;
  if (old && isSameElement(old, fresh)) patchChildren(old, fresh);
  else if (old && isText(old) && isText(fresh)) patchText(old, fresh.data);
  else {
    if (old) old.replaceWith(fresh);
    else parent.append(fresh);
    return fresh;
  }
  return old;
}

function patchChildren(node, fresh) {
  const old = [...node.childNodes];
  const wanted = [...fresh.childNodes];
  wanted.forEach((child, index) => patchChild(node, old[index], child));
  for (const child of old.slice(wanted.length)) child.remove();
}

/** A text that only grows keeps the selection that the reader has in it. */
function patchText(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

function isText(node) {
  return node.nodeType === Node.TEXT_NODE;
}

function isSameElement(one, other) {
  return (
    one.nodeType === Node.ELEMENT_NODE &&
    other.nodeType === Node.ELEMENT_NODE &&
    one.cloneNode(false).isEqualNode(other.cloneNode(false))
  );
}
