"use strict";
// Each chart that has a specification is drawn again for a pointer; its SVG stays for print.
(async () => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { labelColor: colour("--soft"), titleColor: colour("--soft"), gridColor: colour("--rule"), domainColor: colour("--rule"), tickColor: colour("--rule"), titleFontWeight: 400 };
  const config = {
    background: "transparent", font: "ui-sans-serif, system-ui, sans-serif", view: { stroke: null }, axis,
    legend: { orient: "bottom", labelColor: colour("--soft"), direction: "horizontal", columns: 2 },
    range: { category: [0, 1, 2, 3, 4, 5].map((i) => colour(`--s${i}`)) },
    autosize: { type: "fit-x", contains: "padding" },
  };
  const options = { ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  for (const [id, specification] of Object.entries(JSON.parse(document.getElementById("specifications").textContent))) {
    const figure = document.querySelector(`[data-chart="${id}"]`);
    const place = document.createElement("div");
    place.className = "live";
    figure.querySelector("svg.chart").after(place);
    await vegaEmbed(place, { ...specification, config }, options);
    figure.classList.add("interactive");
  }
})();
