/**
 * Make an element. Text given as a child stays text: nothing here is ever parsed as HTML.
 *
 * @param {string} name
 * @param {Record<string, string>} attributes
 * @param {...(Node | string)} children
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

/** Change the children of a node into the fresh ones, and leave alone what is the same already. */
export function patchChildren(node, fresh) {
  fresh.forEach((each, index) => patchChild(node, node.childNodes[index], each));
  while (node.childNodes.length > fresh.length) node.lastChild.remove();
}

/** The same for one child; `old` is undefined where there is none yet. */
export function patchChild(parent, old, fresh) {
  if (!old) parent.append(fresh);
  else if (old.isEqualNode(fresh)) return;
  else if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE)
    old.data = fresh.data;
  else if (isSameElement(old, fresh)) patchChildren(old, [...fresh.childNodes]);
  else old.replaceWith(fresh);
}

function isSameElement(one, other) {
  return (
    one.nodeType === Node.ELEMENT_NODE &&
    other.nodeType === Node.ELEMENT_NODE &&
    one.cloneNode(false).isEqualNode(other.cloneNode(false))
  );
}
