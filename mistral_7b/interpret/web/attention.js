// Attention: a map of one head at a time, the text tinted by one query's weights, and what each head does.

function view(main, data) {
  const { tokens, window: W, groups, layers, tile, heads } = data;
  const T = tokens.length, H = heads[0].length, n = Math.ceil(T / tile), exact = tile === 1;
  let layer = 0, head = 0, query = T - 1, key = 0, read = [], serial = 0;

  const picker = el("select", { id: "layer", onchange: () => show(Number(picker.value), head) }, ...layers.map((number, i) => el("option", { value: i }, `layer ${number}`)));
  const strip = el("div", { class: "heads", role: "group", "aria-label": "Heads of this layer, by key/value head" });
  const map = el("canvas", { id: "map", tabindex: "0", role: "application", "aria-roledescription": "attention map", width: "640", height: "640", "aria-describedby": "keys", "aria-label": "Attention map" });
  const status = el("p", { class: "status", role: "status", id: "status" });
  const text = tokenText(tokens, (i) => move(i, key), "The text: a token is the query, the others are tinted by their weight");
  const rows = el("div", { id: "rows" });
  const thumbs = Array.from({ length: H }, (_, h) => el("button", { "aria-pressed": "false", onclick: () => show(layer, h) }, el("canvas", { width: n, height: n, "aria-hidden": "true" }), `head ${h}`));
  for (let g = 0; g < groups; g++)
    strip.append(el("div", { class: "group", role: "group", "aria-label": `key/value head ${g}` }, el("span", {}, `keys ${g}`), ...thumbs.slice(g * H / groups, (g + 1) * H / groups)));

  const columns = [["layer, head", "name"], ["kept"], ["first token"], ["own token"], ["token before"], ["mean distance"], ["entropy, bits"]];
  const all = () => table("Mean over all queries from the second on, of each head", columns, heads.flatMap((l, i) => l.map((h, j) => [`${layers[i]}, ${j}`, percent(h[6]), percent(h[0]), percent(h[1]), percent(h[2]), h[3].toFixed(1), h[4].toFixed(2)])));
  const band = W !== null && W < T ? "; the dashed line is the window's edge: keys left of it are never read" : "";
  main.append(
    el("div", { class: "bar" }, el("label", {}, "Layer ", picker), strip),
    el("div", { class: "columns" },
      el("div", {}, map, el("p", { class: "note", id: "keys" }, `Rows are queries, columns keys${band}. Point at the map, or focus it: arrows move by one ${exact ? "token" : `token, with Shift by a tile of ${tile}`}, Home and End to the first and last key.`), status),
      el("div", {}, el("h2", {}, "Text"), text.node, el("h2", {}, "The query's largest weights"), rows)),
    later("All heads as a table", all));

  /** One layer's heads: the map (rows of the lower triangle) and, by query, keys and weights kept one by one. */
  async function decode(i) {
    const bytes = await part(`layer-${layers[i]}`);
    let at = 0;
    return Array.from({ length: H }, () => {
      const triangle = bytes.subarray(at, at += n * (n + 1) / 2);
      if (exact) return { triangle };
      const counts = bytes.subarray(at, at += T), starts = new Uint32Array(T + 1);
      counts.forEach((count, q) => { starts[q + 1] = starts[q] + count; });
      const E = starts[T];
      const [low, high, codes] = [0, 1, 2].map(() => bytes.subarray(at, at += E));
      return { triangle, starts, low, high, codes };
    });
  }
  const weight = (code) => (code / 255) ** 2;
  const tileWeight = (h, q, k) => weight(read[h].triangle[q * (q + 1) / 2 + k]);
  /** The weights of a query that are known one by one, as a Map of keys. */
  function known(h, q) {
    const found = new Map();
    if (exact) for (let k = 0; k <= q; k++) found.set(k, tileWeight(h, q, k));
    else for (let e = read[h].starts[q]; e < read[h].starts[q + 1]; e++) found.set(q - read[h].low[e] - 256 * read[h].high[e], weight(read[h].codes[e]));
    return found;
  }
  const visible = (q, k) => k <= q && (W === null || q - k < W);

  async function show(nextLayer, nextHead) {
    const mine = ++serial;
    if (nextLayer !== layer || !read.length) {
      const next = await decode(nextLayer);
      if (mine !== serial) return;
      read = next; layer = nextLayer; picker.value = layer;
      thumbs.forEach((button, h) => paint(button.firstChild, h));
    }
    head = nextHead;
    thumbs.forEach((button, h) => button.setAttribute("aria-pressed", String(h === head)));
    redraw();
    move(query, key);
    document.body.dataset.ready = "true";
  }

  /** Draw a head's map, one pixel a tile. */
  function paint(canvas, h) {
    const ink = color("amount"), paper = color("raised"), never = color("hidden"), image = new ImageData(n, n);
    for (let q = 0; q < n; q++) for (let k = 0; k < n; k++) {
      const some = k <= q && (W === null || q * tile - (k + 1) * tile + 1 < W), w = some ? Math.sqrt(tileWeight(h, q, k)) : 0;
      for (let c = 0; c < 3; c++) image.data[4 * (q * n + k) + c] = some ? paper[c] + (ink[c] - paper[c]) * w : never[c];
      image.data[4 * (q * n + k) + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  let picture = null;
  function redraw() {
    picture = el("canvas", { width: n, height: n });
    paint(picture, head);
    mark();
  }
  function mark() {
    const g = map.getContext("2d"), size = map.width, unit = size / (n * tile);
    g.imageSmoothingEnabled = false;
    g.drawImage(picture, 0, 0, size, size);
    const accent = `rgb(${color("accent")})`;
    if (W !== null && W < T) {
      g.setLineDash([6, 5]); g.strokeStyle = `rgb(${color("pale")})`; g.lineWidth = 1.5;
      g.beginPath(); g.moveTo(0, W * unit); g.lineTo((n * tile - W) * unit, size); g.stroke();
    }
    g.setLineDash([]); g.strokeStyle = accent; g.lineWidth = 1;
    g.strokeRect(0.5, query * unit, size - 1, Math.max(1, unit));
    g.lineWidth = 2;
    g.strokeRect(key * unit - 1, query * unit - 1, Math.max(5, unit + 2), Math.max(5, unit + 2));
  }
  function move(q, k) {
    query = clamp(q, 0, T - 1); key = clamp(k, 0, query);
    if (!visible(query, key)) key = query - W + 1;
    const found = known(head, query), least = heads[layer][head][5];
    const inTile = tileWeight(head, Math.floor(query / tile), Math.floor(key / tile));
    const value = found.has(key) ? found.get(key).toFixed(3) : `below ${least.toFixed(3)}, not kept`;
    status.textContent = `query ${query} ${quoted(tokens[query])} → key ${key} ${quoted(tokens[key])}: ${value}` + (exact ? "" : ` (largest in its tile: ${inTile.toFixed(3)})`);
    tokens.forEach((_, i) => text.tint(i, found.get(i) || 0));
    text.go(query, false);
    const best = [...found].sort((a, b) => b[1] - a[1]).slice(0, 12);
    const sum = [...found.values()].reduce((a, b) => a + b, 0);
    rows.replaceChildren(table(`Query ${query} ${quoted(tokens[query])}, layer ${layers[layer]}, head ${head}` + (exact ? "" : `: ${found.size} weights kept, ${percent(sum)} of its attention`), [["key", "name"], ["position"], ["distance"], ["weight"]], best.map(([k, w]) => [shown(tokens[k]), String(k), String(query - k), w.toFixed(3)]).concat(tilesOf(query, found))));
    mark();
  }
  /** Rows of the table for the query's tiles without a weight that is kept: they bound what is in them. */
  function tilesOf(q, found) {
    if (exact) return [];
    const row = Math.floor(q / tile), kept = new Set([...found.keys()].map((k) => Math.floor(k / tile)));
    const others = Array.from({ length: row + 1 }, (_, t) => [t, tileWeight(head, row, t)]).filter(([t, w]) => w > 0 && !kept.has(t) && visible(q, Math.min(q, (t + 1) * tile - 1)));
    return others.sort((a, b) => b[1] - a[1]).slice(0, 4).map(([t, w]) => {
      const last = Math.min(q, (t + 1) * tile - 1);
      return [`${shown(tokens[t * tile])} … ${shown(tokens[last])}`, `${t * tile} to ${last}`, "", `≤ ${w.toFixed(3)}`];
    });
  }
  const place = (event) => {
    const box = map.getBoundingClientRect(), unit = box.width / (n * tile);
    return [Math.floor((event.clientY - box.top) / unit), Math.floor((event.clientX - box.left) / unit)];
  };
  map.addEventListener("pointermove", (event) => { const [q, k] = place(event); if (q < T && visible(q, k) && (q !== query || k !== key)) move(q, k); });
  map.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? tile : 1;
    const next = { ArrowUp: [query - far, key], ArrowDown: [query + far, key], ArrowLeft: [query, Math.max(key - far, W === null ? 0 : query - W + 1)], ArrowRight: [query, key + far], Home: [query, W === null ? 0 : Math.max(0, query - W + 1)], End: [query, query] }[event.key];
    if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); move(...next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(layer, head).then(() => thumbs.forEach((button, h) => paint(button.firstChild, h))));
  show(0, 0);
}
