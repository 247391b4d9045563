// Sets the stored theme before the first paint, so that the page does not flash; theme.js does the rest.
(() => {
  try {
    const theme = localStorage.getItem("theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    /* no storage: use the system's theme */
  }
})();
