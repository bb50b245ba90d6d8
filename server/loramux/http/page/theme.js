// Before anything is painted: the reader's own choice of theme, if there is one.
"use strict";

const chosen = (() => {
  try {
    return localStorage.getItem("loramux.theme");
  } catch {
    return null; // storage is off: the system's choice it is
  }
})();
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
