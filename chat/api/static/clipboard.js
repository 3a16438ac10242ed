// Copying, also where the page came over plain http and the browser has no clipboard for it.

/**
 * Copy the text, and let the button say so for a moment.
 *
 * @param {string} text
 * @param {HTMLButtonElement} button
 * @param {(message: string) => void} announce
 */
export async function copyFor(button, text, announce) {
  const isCopied = (await copy(text)) || copyThroughSelection(text);
  const words = isCopied ? "Copied" : "Not copied";
  announce(words);
  const label = button.querySelector(".label") ?? button;
  label.textContent = words;
  clearTimeout(button.restoring);
  button.restoring = setTimeout(() => (label.textContent = "Copy"), 2000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
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
