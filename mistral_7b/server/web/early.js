// Runs before anything is drawn, so that a chosen theme does not flash; the rest of it is in theme.js.
(() => {
  try {
    const theme = localStorage.getItem("theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    /* no storage here: the system's choice holds */
  }
})();
