// Token probabilities: the text, tinted; of one token, its alternatives.

function view(main, data) {
  const { tokens, predictions, following } = data;
  const panel = el("div", { id: "panel" });
  const status = el("p", { class: "status", role: "status" });
  const text = tokenText(tokens, choose, "The text: each token is tinted by how unlikely it is");
  const columns = [["token", "name"], ["probability"]];
  const rows = (alternatives) => alternatives.map(([word, p]) => [shown(word), percent(p)]);

  predictions.forEach(([p], i) => text.tint(i + 1, Math.min(1, -Math.log2(Math.max(p, 1e-300)) / 10), "in-favor"));
  function choose(i) {
    if (i === 0) {
      status.textContent = `${quoted(tokens[0])} is the first token: nothing comes before it.`;
      panel.replaceChildren();
      return;
    }
    const [p, rank, alternatives] = predictions[i - 1];
    status.textContent = `Token ${i} ${quoted(tokens[i])}: ${percent(p)}, rank ${rank}`;
    panel.replaceChildren(table(`Alternatives at token ${i}`, columns, rows(alternatives)));
  }
  text.node.addEventListener("pointerover", (event) => { const span = event.target.closest(".tok"); if (span) choose(Number(span.dataset.i)); });
  const steps = [[1, "certain"], [0.5, "50%"], [0.1, "10%"], [0.01, "1%"], [0.001, "0.1% or less"]];
  const legend = el("p", { class: "legend" }, ...steps.map(([p, name]) => el("span", {}, el("i", { style: { background: `color-mix(in srgb, var(--in-favor) ${45 * Math.min(1, -Math.log2(p) / 10)}%, transparent)` } }), name)));
  const all = () => table("All tokens", [["token", "name"], ["position"], ["probability"], ["rank"], ["most probable", "name"]], predictions.map(([p, rank, best], i) => [shown(tokens[i + 1]), String(i + 1), percent(p), String(rank), best.length ? `${shown(best[0][0])} ${percent(best[0][1])}` : ""]));
  main.append(
    el("div", { class: "columns", style: { "grid-template-columns": "minmax(0, 1.6fr) minmax(260px, 1fr)" } },
      el("div", {}, legend, text.node, el("p", { class: "note" }, "Point at a token, or focus the text: arrows move by one token, up and down by ten.")),
      el("div", {}, status, panel, el("h2", {}, "What comes next"), table("The next token", columns, rows(following)))),
    later("All tokens as a table", all));
  text.go(Math.min(1, tokens.length - 1), false);
  choose(Math.min(1, tokens.length - 1));
  document.body.dataset.ready = "true";
}
