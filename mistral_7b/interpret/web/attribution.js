// Attribution: the text tinted by sign and size, by either method, and all values as a table.

function view(main, data) {
  const { tokens, target, log_probability: score, gradients, left_out: leftOut, notes } = data;
  const left = new Map(leftOut), byGradient = new Map((gradients || []).map((a, i) => [i, a]));
  const methods = { ...(gradients ? { "Gradient × input": byGradient } : {}), "Leave one out": left };
  let method = Object.keys(methods)[0], current = tokens.length - 1;

  const signed = (x) => (x === undefined ? "" : `${x > 0 ? "+" : ""}${x.toFixed(4)}`);
  const status = el("p", { class: "status", role: "status" });
  const buttons = Object.keys(methods).map((name) => el("button", { "aria-pressed": "false", onclick: () => { method = name; draw(); } }, name));
  const text = tokenText(tokens, choose, "The prompt: orange tokens speak for the target, blue ones against it");
  const legend = el("p", { class: "legend" }, ...[["in-favor", "for the target (+)"], ["against", "against it (−)"]].map(([tone, name]) => el("span", {}, el("i", { style: { background: `color-mix(in srgb, var(--${tone}) 45%, transparent)` } }), name)));

  function draw() {
    const values = methods[method], most = Math.max(1e-12, ...[...values.values()].map(Math.abs));
    tokens.forEach((_, i) => { const x = values.get(i) || 0; text.tint(i, Math.abs(x) / most, x < 0 ? "against" : "in-favor"); });
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === method)));
    choose(current);
  }
  function choose(i) {
    current = i;
    const parts = Object.entries(methods).map(([name, values]) => `${name.toLowerCase()} ${values.has(i) ? `${signed(values.get(i))} nats` : "not computed"}`);
    status.textContent = `Token ${i} ${quoted(tokens[i])}: ${parts.join(", ")}`;
  }
  text.node.addEventListener("pointerover", (event) => { const span = event.target.closest(".tok"); if (span) choose(Number(span.dataset.i)); });
  const columns = [["token", "name"], ["position"], ...(gradients ? [["gradient × input"]] : []), ["leave one out"]];
  const rows = tokens.map((word, i) => [shown(word), String(i), ...(gradients ? [signed(byGradient.get(i))] : []), signed(left.get(i))]);
  main.append(
    el("p", {}, "Target: ", el("strong", {}, quoted(target)), `, log-probability ${score.toFixed(4)} (${percent(Math.exp(score))})`),
    el("div", { class: "bar", role: "group", "aria-label": "Method" }, ...buttons, legend),
    text.node, status, ...notes.map((note) => el("p", { class: "note" }, note)),
    later("All values as a table", () => table("Contributions in nats", columns, rows)));
  text.go(current, false);
  draw();
  document.body.dataset.ready = "true";
}
