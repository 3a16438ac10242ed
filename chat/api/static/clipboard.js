// Copying, also where the page came over plain http and the browser has no clipboard for it.

/** Copy the text, and let the button and the screen reader say so for a moment. */
export async function copyFor(button, text, announce) {
  const write = async () => navigator.clipboard.writeText(text);
  const isCopied = await write().then(() => true).catch(() => copyThroughSelection(text));
  const words = isCopied ? "Copied" : "Not copied";
  announce(words);
  const label = button.querySelector(".label") ?? button;
  label.textContent = words;
  clearTimeout(button.restoring);
  button.restoring = setTimeout(() => (label.textContent = "Copy"), 2000);
}

function copyThroughSelection(text) {
  const focused = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}
