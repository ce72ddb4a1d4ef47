// Draws the plotly figures of a notebook when they come into view; plotly.js is loaded once, from this site.
"use strict";
const here = document.currentScript.src;
let plotly;

function loaded() {
  plotly ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", here);
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
  return plotly;
}

async function show(element) {
  const figure = JSON.parse(element.querySelector("script").textContent);
  try {
    await loaded();
  } catch {
    element.textContent = "plotly.js could not be loaded.";
    return;
  }
  const layout = {...figure.layout, width: undefined, autosize: true};
  element.style.height = `${layout.height ?? 450}px`;
  Plotly.newPlot(element, figure.data, layout, {responsive: true, displaylogo: false, ...figure.config});
}

document.addEventListener("DOMContentLoaded", () => {
  const watch = new IntersectionObserver(entries => {
    for (const entry of entries.filter(entry => entry.isIntersecting)) {
      watch.unobserve(entry.target);
      show(entry.target);
    }
  }, {rootMargin: "300px"});
  for (const element of document.querySelectorAll(".plotly-figure")) watch.observe(element);
});
