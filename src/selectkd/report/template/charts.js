"use strict";
// A chart with a specification is drawn again for a pointer once it is near the screen; its SVG stays for print.
(() => {
  const read = (id) => document.getElementById(id).textContent;
  const specifications = JSON.parse(read("specifications"));
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const options = { ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const soon = globalThis.requestIdleCallback ?? ((work) => setTimeout(work, 30));
  let config = null;

  // The program is a megabyte of text: it is unpacked and read when the first chart needs it, not when the page opens.
  async function begin() {
    const raw = Uint8Array.from(atob(read("program")), (letter) => letter.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    const axis = { labelColor: colour("--soft"), titleColor: colour("--soft"), gridColor: colour("--rule"), domainColor: colour("--rule"), tickColor: colour("--rule"), titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 };
    config = {
      background: "transparent", font: "ui-sans-serif, system-ui, sans-serif", view: { stroke: null }, axis,
      legend: { orient: "bottom", labelColor: colour("--soft"), labelFontSize: 12, direction: "horizontal", columns: 2 },
      range: { category: [0, 1, 2, 3, 4, 5].map((i) => colour(`--s${i}`)) },
      autosize: { type: "fit-x", contains: "padding" },
    };
  }
  async function draw(figure) {
    if (!config) await begin();
    const svg = figure.querySelector("svg.chart"), place = document.createElement("div");
    place.className = "live";
    svg.after(place);
    await vegaEmbed(place, { ...specifications[figure.dataset.chart], config }, options);
    figure.classList.add("interactive");
  }
  // One after the other, each when the browser has nothing better to do.
  let last = Promise.resolve();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      last = last.then(() => new Promise(soon)).then(() => draw(entry.target));
    }
  }, { rootMargin: "200px" });
  for (const figure of document.querySelectorAll("figure[data-chart]")) near.observe(figure);
})();
