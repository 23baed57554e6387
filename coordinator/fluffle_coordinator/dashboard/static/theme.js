// Before anything is drawn: the theme that was chosen here, else the system's, also as that changes.
"use strict";
{
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("fluffle-theme");
    } catch {
      return null; // No storage, no memory: the system's theme it is.
    }
  };
  const apply = () => {
    document.documentElement.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
  };
  system.addEventListener("change", apply);
  apply();
}
