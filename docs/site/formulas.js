// Formulas as MathML, by the copy of Temml that the chat page uses.
for (const place of document.querySelectorAll(".arithmatex")) {
  const source = place.textContent.trim();
  temml.render(source.slice(2, -2), place, { displayMode: source.startsWith("\\[") });
}
