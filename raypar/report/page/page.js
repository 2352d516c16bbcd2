"use strict";
// Texts are put in as text, never as markup: names of modules and errors are other people's.
(() => {
  const tip = document.getElementById("tip");
  const data = document.getElementById("trial-words");
  const trials = data ? JSON.parse(data.textContent) : {};
  const kinds = {F: "forward", B: "backward", I: "backward, input half", W: "backward, weight half"};

  // A span of the chart: "3F5|1.2 ms|0.3 ms" is what, when, how long.
  const spanWords = (text) => {
    const [name, start, length] = text.split("|").length === 3 ? text.split("|") : [text, "", ""];
    const found = /^(\d+)([FBIW])(\d+)$/.exec(name);
    const what = found
      ? `${kinds[found[2]]}, stage ${found[1]}, microbatch ${found[3]}` : name;
    return `${what}\nat ${start} for ${length}`;
  };
  const wordsOf = (one) => {
    const own = one.dataset;
    if (own.t !== undefined) return own.t;
    if (own.g !== undefined) return spanWords(own.g);
    return own.i !== undefined ? trials[own.i] || "" : "";
  };
  const place = (x, y) => {
    const right = x + 16 + tip.offsetWidth > innerWidth;
    const below = y + 16 + tip.offsetHeight > innerHeight;
    tip.style.left = `${Math.max(4, right ? x - 12 - tip.offsetWidth : x + 14)}px`;
    tip.style.top = `${Math.max(4, below ? y - 12 - tip.offsetHeight : y + 14)}px`;
  };
  document.addEventListener("pointermove", (event) => {
    const one = event.target.closest ? event.target.closest("[data-t],[data-g],[data-i]") : null;
    const words = one ? wordsOf(one) : "";
    tip.hidden = !words;
    if (words) {
      tip.textContent = words;
      place(event.clientX, event.clientY);
    }
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });

  // Zoom makes drawings wider than their place, which then scrolls; what is in its middle stays.
  let zoom = 1;
  const apply = (factor) => {
    const before = zoom;
    zoom = Math.min(64, Math.max(1, zoom * factor));
    for (const box of document.querySelectorAll(".scroll")) {
      const middle = (box.scrollLeft + box.clientWidth / 2) / before;
      box.firstElementChild.style.width = `${100 * zoom}%`;
      box.scrollLeft = middle * zoom - box.clientWidth / 2;
    }
  };
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => apply(Number(button.dataset.zoom)));
  }
})();
