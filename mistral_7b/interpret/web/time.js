// Time of a decode step: a bar for each operator, and its roofline as a line across.

function view(main, data) {
  const ms = (seconds) => `${(1e3 * seconds).toFixed(seconds < 1e-4 ? 4 : 2)} ms`;
  const columns = [["operator", "name"], ["calls"], ["time"], ["share of the step"], ["roofline"], ["roofline / time"], ["bytes"], ["operations"]];
  const titles = { whole: "As the model computes", split: "Module by module" };
  for (const [key, title] of Object.entries(titles)) {
    const operators = data[key], total = operators.reduce((sum, o) => sum + o[2], 0);
    const most = Math.max(...operators.flatMap((o) => [o[2], o[5]]));
    const bars = operators.flatMap(([name, , seconds, , , least]) => {
      const percentage = least > 0 ? `, ${Math.round(100 * least / seconds)}% of the roofline's speed` : "";
      const label = `${name}: ${ms(seconds)}, roofline ${ms(least)}`;
      return [
        el("span", {}, name),
        el("span", { class: "track", role: "img", "aria-label": label, title: label },
          el("span", { class: "fill", style: { "--share": (100 * seconds / most).toFixed(2) } }),
          least > 0 ? el("span", { class: "roof", style: { "--at": Math.min(99.6, 100 * least / most).toFixed(2) } }) : null),
        el("span", {}, `${ms(seconds)}${percentage}`),
      ];
    });
    const rows = operators.map(([name, calls, seconds, size, operations, least]) => [name, String(calls), ms(seconds), percent(seconds / total), ms(least), least > 0 ? percent(least / seconds) : "", size.toLocaleString("en"), operations.toLocaleString("en")]);
    main.append(el("h2", {}, title), el("div", { class: "bars" }, ...bars), later(`${title}, as a table`, () => table(title, columns, rows)));
  }
  document.body.dataset.ready = "true";
}
