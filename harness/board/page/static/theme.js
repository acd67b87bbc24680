// Light or dark: the reader's choice, kept, or else the system's. Loaded in <head>, so that no page flashes white.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("pacemark-theme");
  } catch {
    // Some browsers keep nothing for pages from disk; the choice then lasts as long as the page.
  }
  const current = () => (chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light");
  const apply = () => {
    root.dataset.theme = current();
    const button = document.getElementById("theme");
    if (button) {
      button.hidden = false;
      button.textContent = current() === "dark" ? "Light colours" : "Dark colours";
    }
    document.dispatchEvent(new Event("themechange"));
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = current() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem("pacemark-theme", chosen);
      } catch {
        // As above.
      }
      apply();
    });
  });
})();
