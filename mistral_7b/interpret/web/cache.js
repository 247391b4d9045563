// KV cache: the engine's pages after each step, and the slots of a ring after each call. Sliders move in time.

function view(main, data) {
  const { tokens, prompt, page: size, slots, steps, ring, window: W } = data;
  const tones = { A: "against", B: "in-favor", AB: "shared" };

  const grid = el("ul", { class: "grid", style: { "list-style": "none", padding: 0, margin: 0 }, "aria-label": "KV pages" });
  const did = el("div", { class: "status", role: "status" });
  const step = timeline("Step", steps.length, showStep);
  const range = (i) => `${i * size}–${(i + 1) * size - 1}`;

  function showStep(n) {
    const { fed, events, pages } = steps[n], old = n ? steps[n - 1].pages : [];
    const feeds = Object.entries(fed).map(([name, count]) => `${name} feeds ${count} token${count > 1 ? "s" : ""}`);
    did.replaceChildren(el("p", {}, `Step ${n}: ${feeds.join(", ") || "nothing is fed"}.`), el("ul", { class: "events" }, ...events.map((text) => el("li", {}, text))));
    grid.replaceChildren(...pages.map(([holders, number, used], p) => {
      const kind = holders ? "held" : number === null ? "free" : "idle";
      const before = old[p] || ["", null, 0];
      const written = holders && (used !== before[2] || number !== before[1]) && !(before[1] === number && before[2] === used);
      const head = holders ? `${[...holders].join(" + ")}` : kind;
      const contents = number === null ? [] : [el("br"), range(number)];
      const bar = kind === "held" ? el("span", { class: "used", style: { "--tone": `var(--${tones[holders]})`, "--share": String(100 * used / size) } }) : null;
      const label = `page ${p}: ${kind === "held" ? `held by ${[...holders].join(" and ")}, positions ${range(number)}, ${used} of ${size} tokens` : kind === "idle" ? `idle, the prefix cache has positions ${range(number)}` : "free"}`;
      return el("li", { class: `page ${kind}${written ? " written" : ""}`, title: label }, el("span", { class: "unseen" }, label), el("span", { "aria-hidden": "true" }, el("b", {}, `${p}`), ` ${head}`, ...contents, bar));
    }));
  }

  // ---------------------------------------------------------------- the ring
  const across = Math.min(slots, 64), cell = Math.max(4, Math.floor(1024 / Math.max(32, across)));
  const canvas = el("canvas", { width: across * cell, height: Math.ceil(slots / across) * cell, role: "img", "aria-label": "Slots of the ring, described below" });
  const said = el("div", { class: "status", role: "status" });
  const call = timeline("Call", ring.length, showCall);
  const states = [];  // positions by slot after each call
  ring.reduce((held, [, wrote]) => { const next = held.slice(); for (const [slot, p] of wrote) next[slot] = p; states.push(next); return next; }, new Array(slots).fill(-1));

  function runs(held) {
    const out = [];
    held.forEach((p, slot) => {
      const last = out.at(-1);
      if (last && (p < 0 ? last.p < 0 : last.p >= 0 && p === last.p + slot - last.slot)) last.end = slot;
      else out.push({ slot, end: slot, p });
    });
    return out.map(({ slot, end, p }) => `slots ${slot}–${end} ${p < 0 ? "are empty" : `hold positions ${p}–${p + end - slot}`}`);
  }
  function showCall(n) {
    const [count, wrote] = ring[n], held = states[n], last = Math.max(...held), old = n ? states[n - 1] : null;
    const one = wrote.length === 1 ? wrote[0] : null;
    const replaced = one && old[one[0]] >= 0 ? `, in place of ${quoted(tokens[old[one[0]]])} (position ${old[one[0]]}), which no later token sees` : "";
    const wroteText = one ? `${quoted(tokens[one[1]])} (position ${one[1]}) goes to slot ${one[1]} mod ${slots} = ${one[0]}${replaced}.` : `${count} tokens are fed, and the last ${wrote.length} of them kept.`;
    said.replaceChildren(el("p", {}, `Call ${n}: ${wroteText}`), el("p", { class: "note" }, `${runs(held).join("; ")}.`));
    const g = canvas.getContext("2d"), ink = color("amount"), paper = color("raised"), empty = color("hidden"), accent = color("accent");
    const written = new Set(wrote.map(([slot]) => slot));
    held.forEach((p, slot) => {
      const x = (slot % across) * cell, y = Math.floor(slot / across) * cell, age = p < 0 ? 0 : 1 - 0.85 * (last - p) / slots;
      g.fillStyle = `rgb(${(p < 0 ? empty : paper.map((c, i) => c + (ink[i] - c) * age)).map(Math.round)})`;
      g.fillRect(x, y, cell, cell);
      if (written.has(slot) && n) { g.strokeStyle = `rgb(${accent})`; g.lineWidth = 2; g.strokeRect(x + 1, y + 1, cell - 2, cell - 2); }
    });
  }

  /** A labeled slider with buttons for one step back and forth. */
  function timeline(name, count, show) {
    const input = el("input", { type: "range", min: 0, max: count - 1, value: 0, "aria-label": name, id: name.toLowerCase(), oninput: () => go(0) });
    const number = el("output", { for: input.id });
    const go = (by) => { input.value = Number(input.value) + by; number.textContent = `${name} ${input.value} of ${count - 1}`; show(Number(input.value)); };
    return { go, node: el("div", { class: "bar" }, el("button", { onclick: () => go(-1), "aria-label": `${name} back` }, "◀"), input, el("button", { onclick: () => go(1), "aria-label": `${name} forward` }, "▶"), number) };
  }

  const legend = el("p", { class: "legend" }, ...[["against", "A"], ["in-favor", "B"], ["shared", "shared by A and B"]].map(([tone, name]) => el("span", {}, el("i", { style: { background: `var(--${tone})` } }), name)), el("span", {}, "dotted: idle, in the prefix cache · dashed: free · underlined: changed in this step"));
  const all = () => table("All steps", [["step"], ["fed", "name"], ["held pages"], ["idle pages"], ["free pages"], ["events", "name"]], steps.map(({ fed, events, pages }, n) => [String(n), Object.entries(fed).map(([k, v]) => `${k} ${v}`).join(", "), String(pages.filter((p) => p[0]).length), String(pages.filter((p) => !p[0] && p[1] !== null).length), String(pages.filter((p) => p[1] === null).length), events.join("; ")]));
  main.append(
    el("h2", {}, "KV pages of the engine"), step.node, legend, did, grid, later("All steps as a table", all),
    el("h2", {}, `A ring of ${slots} slots`),
    el("p", { class: "note" }, W === null || W > slots ? "Without a window, or with a context shorter than it, the ring has a slot for each position and overwrites none." : `Position p is in slot p mod ${slots}: a token overwrites the one that has just left the window. The darker, the newer; outlined: written by this call.`),
    call.node, said, canvas);
  step.go(0); call.go(0);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => call.go(0));
  document.body.dataset.ready = "true";
}
