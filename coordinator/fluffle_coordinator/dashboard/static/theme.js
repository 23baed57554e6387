// Before anything is drawn: the theme that was chosen here, if one was.
"use strict";
try {
  const chosen = localStorage.getItem("fluffle-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // No storage, no memory: the system's theme it is.
}
