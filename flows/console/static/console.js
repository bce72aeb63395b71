"use strict";
// Labels by keyboard: one key a class. Without this script the fields do the same by mouse and tab.
(() => {
  const form = document.getElementById("label-form");
  if (!form) return;
  const items = [...form.querySelectorAll("[data-picture]")];
  const fields = items.map((item) => item.querySelector("select, input"));
  const keys = new Map([...form.querySelectorAll("option[data-key]")].map((option) => [option.dataset.key, option.value]));
  const counted = document.getElementById("counted");
  let here = 0;

  function show() {
    items.forEach((item, number) => {
      item.classList.toggle("here", number === here);
      item.classList.toggle("given", fields[number].value !== "");
    });
    const given = fields.filter((field) => field.value !== "").length;
    counted.textContent = `${given} of ${fields.length} labelled`;
  }

  function go(number) {
    here = Math.max(0, Math.min(items.length - 1, number));
    show();
    fields[here].focus({ preventScroll: true });
    items[here].scrollIntoView({ block: "nearest" });
  }

  form.addEventListener("focusin", (event) => {
    const number = fields.indexOf(event.target);
    if (number >= 0) { here = number; show(); }
  });
  form.addEventListener("change", show);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.size === 0) return;
    const typing = event.target.matches("input, textarea, button, a, summary") && !fields.includes(event.target);
    if (typing) return;
    if (keys.has(event.key.toLowerCase())) {
      fields[here].value = keys.get(event.key.toLowerCase());
      event.preventDefault();
      go(here + 1);
    } else if (event.key === " ") {
      fields[here].value = "";
      event.preventDefault();
      go(here + 1);
    } else if (event.key === "Backspace") {
      event.preventDefault();
      go(here - 1);
    }
  });
  show();
})();
