/** Make an element. A child that is a string stays text: nothing here is ever parsed as HTML. An array
 * holds as many as there may be: a call takes only some ten thousand arguments. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  for (const child of children.flat()) made.append(child);
  return made;
}

/** Change a child into the fresh one, or append that; leave alone what is the same. */
export function patchChild(parent, old, fresh) {
  if (!old) parent.append(fresh);
  else if (old.isEqualNode(fresh)) return;
  else if (isText(old) && isText(fresh)) patchText(old, fresh.data);
  else if (old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) patchChildren(old, fresh);
  else old.replaceWith(fresh);
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

const isText = (node) => node.nodeType === Node.TEXT_NODE;
