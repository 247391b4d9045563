// Logit lens: a table of layers by positions, a few columns at a time; of one cell, its top tokens.

function view(main, data) {
  const { tokens, start: first, rows, words } = data;
  const P = rows[0].ids.length, WIDTH = 12, final = rows.at(-1);
  let from = Math.max(0, P - WIDTH), row = rows.length - 1, column = P - 1;

  const scroll = el("div", { class: "scroll", style: { "max-height": "none" } });
  const status = el("p", { class: "status", role: "status" });
  const panel = el("div", {});
  const byEntropy = el("input", { type: "checkbox", onchange: () => draw() });
  const slider = el("input", { type: "range", min: 0, max: Math.max(0, P - WIDTH), value: from, "aria-label": "First position shown", oninput: () => { from = Number(slider.value); column = clamp(column, from, Math.min(P, from + WIDTH) - 1); draw(); } });
  const most = Math.max(1, ...rows.flatMap((r) => r.entropy));
  const word = (id) => words[id];
  const said = (r, p) => `${rows[r].name}, after ${quoted(tokens[first + p])} (position ${first + p}): ${quoted(word(rows[r].ids[p][0]))} ${percent(rows[r].p[p][0])}, entropy ${rows[r].entropy[p].toFixed(2)} bits`;

  function draw(focus = false) {
    const shownColumns = Array.from({ length: Math.min(WIDTH, P) }, (_, i) => from + i);
    const head = el("tr", {}, el("th", { scope: "col" }, "after"), ...shownColumns.map((p) => el("th", { scope: "col", class: "name", title: `position ${first + p}` }, shown(tokens[first + p]))));
    const body = rows.map((one, r) => el("tr", {}, el("th", { scope: "row" }, one.name), ...shownColumns.map((p) => {
      const amount = byEntropy.checked ? one.entropy[p] / most : one.p[p][0];
      const same = one.ids[p][0] === final.ids[p][0];
      return el("td", {}, el("button", { class: same ? "cell same" : "cell", tabindex: r === row && p === column ? "0" : "-1", "data-r": r, "data-p": p, "aria-label": said(r, p), style: { "--tint": (45 * amount).toFixed(1) } }, shown(word(one.ids[p][0]))));
    })));
    scroll.replaceChildren(el("table", { class: "lens" }, el("caption", { class: "unseen" }, "The most probable next token, by layer and position"), el("thead", {}, head), el("tbody", {}, ...body)));
    slider.value = from;
    select(row, column, focus);
    const beyond = scroll.querySelector("[tabindex='0']").getBoundingClientRect().right - scroll.getBoundingClientRect().right;
    scroll.scrollLeft = column === from ? 0 : scroll.scrollLeft + Math.max(0, beyond + 2);
  }
  function select(r, p, focus) {
    scroll.querySelector("[tabindex='0']").tabIndex = -1;
    row = r; column = p;
    const cell = scroll.querySelector(`[data-r='${r}'][data-p='${p}']`);
    cell.tabIndex = 0;
    if (focus) cell.focus();
    status.textContent = said(r, p);
    panel.replaceChildren(table(`Most probable after ${quoted(tokens[first + p])}, ${rows[r].name}`, [["token", "name"], ["probability"]], rows[r].ids[p].map((id, i) => [shown(word(id)), percent(rows[r].p[p][i])])));
  }
  scroll.addEventListener("keydown", (event) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -P], End: [0, P] }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const r = clamp(row + by[0], 0, rows.length - 1), p = clamp(column + by[1], 0, P - 1);
    const moved = clamp(from, p - WIDTH + 1, p);
    if (moved === from) return select(r, p, true);
    from = moved; row = r; column = p; draw(true);
  });
  const point = (event, focus) => { const cell = event.target.closest(".cell"); if (cell) select(Number(cell.dataset.r), Number(cell.dataset.p), focus); };
  scroll.addEventListener("pointerover", (event) => point(event, false));
  scroll.addEventListener("click", (event) => point(event, true));
  const all = () => table(`After the last token, by layer`, [["layer", "name"], ["most probable", "name"], ["probability"], ["entropy, bits"]], rows.map((r) => [r.name, shown(word(r.ids[P - 1][0])), percent(r.p[P - 1][0]), r.entropy[P - 1].toFixed(2)]));
  main.append(
    el("div", { class: "bar" }, el("label", {}, byEntropy, " tint by entropy instead of probability"), P > WIDTH ? slider : null),
    scroll, status, panel,
    el("p", { class: "note" }, "In the table, arrows move from cell to cell, Home and End to the first and last position."),
    later("The last position as a table", all));
  draw();
  document.body.dataset.ready = "true";
}
