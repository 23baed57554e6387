// Runs before the first paint: sets the theme chosen on this page, else the system's, and follows it.
"use strict";
{
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("fluffle-theme");
    } catch {
      return null; // storage is disabled: use the system's theme
    }
  };
  const apply = () => {
    document.documentElement.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
  };
  system.addEventListener("change", apply);
  apply();
}
