"use strict";
for (const box of document.querySelectorAll(".edit")) {
  const slider = box.querySelector("input[type=range]"), states = JSON.parse(slider.dataset.states);
  const frames = box.querySelectorAll(".frame"), cells = box.querySelectorAll("[data-values]");
  const values = Array.from(cells, cell => JSON.parse(cell.dataset.values));
  const output = box.querySelector("output");
  const show = () => {
    const number = Number(slider.value);
    frames.forEach((frame, index) => { frame.hidden = index !== number; });
    cells.forEach((cell, index) => { cell.textContent = values[index][number]; });
    output.textContent = states[number].split(":")[0];
    slider.setAttribute("aria-valuetext", states[number]);
  };
  slider.addEventListener("input", show);
  show();
}
