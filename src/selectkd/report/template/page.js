"use strict";
(() => {
  document.documentElement.classList.add("scripted");
  const folded = () => document.querySelectorAll("details:not([open])");
  let opened = []; // what is folded is printed too
  addEventListener("beforeprint", () => { opened = [...folded()]; for (const one of opened) one.open = true; });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
  const data = document.getElementById("data");
  if (!data) return;
  const page = JSON.parse(data.textContent);
  const heat = document.getElementById("heat"), tip = document.getElementById("tip");
  const slider = document.getElementById("look"), looked = document.getElementById("looked");
  const FORM = { marks: 1, rank: 2, proposal: 4, teacher_top: 4, floats: 2 };
  const NAMES = [
    ["verdict", "verdict"], ["rank", "rank with the teacher"], ["p_proposal", "p, teacher's probability of it"],
    ["q_proposal", "q, student's own"], ["p_teacher_top", "p of the teacher's choice"], ["divergence", "divergence, nats"],
    ["teacher_entropy", "teacher's entropy, nats"], ["student_entropy", "student's entropy, nats"],
    ["weight", "weight"], ["share", "share of the probe's loss"],
  ];
  let now = Number(slider.value), current = null, pinned = false;

  // Columns come compressed, all first bytes before all second ones.
  async function column(text, size) {
    const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const n = planes.length / size, out = new Uint32Array(n);
    for (let i = 0; i < n; i++) for (let b = size - 1; b >= 0; b--) out[i] = out[i] * 256 + planes[b * n + i];
    return out;
  }
  function half(bits) {
    const sign = bits >> 15 ? -1 : 1, power = (bits >> 10) & 31, rest = bits & 1023;
    if (power === 31) return rest ? NaN : sign * Infinity;
    return sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -24 * rest);
  }
  function load(look) {
    const names = Object.keys(FORM).filter((name) => look[name] !== undefined);
    return (look.loaded ??= Promise.all(names.map((name) => column(look[name], FORM[name]))).then((all) =>
      Object.fromEntries(names.map((name, i) => [name, all[i]]))));
  }
  const shown = (value) => !Number.isFinite(value) ? "not known" : value !== 0 && Math.abs(value) < 1e-4 ? "< 0.0001" : String(Number(value.toPrecision(3)));

  const texts = [...heat.querySelectorAll(".tokens")];
  const tokensOf = new Map();
  const tokens = (text) => tokensOf.get(text) ?? tokensOf.set(text, [...text.getElementsByTagName("i")]).get(text);
  function kind(mark) {
    const verdict = mark % 3, level = Math.floor(mark / 3) % 6, flip = Math.floor(mark / 18) - 1;
    return [verdict === 2 && !level ? "" : "nra"[verdict] + level, flip > 0 ? "w" : flip < 0 ? "l" : ""].filter(Boolean).join(" ");
  }
  async function show(at) {
    now = at;
    const look = page.looks[at], columns = await load(look);
    if (now !== at) return;
    for (const text of texts) {
      const begin = Number(text.dataset.begin);
      let accepted = 0;
      tokens(text).forEach((token, i) => {
        const mark = columns.marks[begin + i], name = kind(mark) + (token === current ? " on" : "");
        if (mark % 3 === 2) accepted++;
        if (token.className !== name) token.className = name.trim();
      });
      text.parentElement.querySelector(".share b").textContent = accepted;
    }
    label(look);
    if (current) describe(current);
  }
  function label(look) {
    const several = page.looks.some((one) => one.run !== look.run);
    const flips = look.won + look.lost ? `; since the previous measurement ▲ ${look.won} accepted, ▼ ${look.lost} rejected` : "";
    looked.textContent = `${several ? look.run + ", " : ""}step ${look.step}: TAR ${shown(look.tar)}${flips}`;
  }
  function add(parent, name, text) {
    const made = parent.appendChild(document.createElement(name));
    if (text !== undefined) made.textContent = text;
    return made;
  }
  async function describe(token) {
    const text = token.closest(".tokens"), at = Number(text.dataset.begin) + tokens(text).indexOf(token);
    const columns = await load(page.looks[now]);
    if (token !== current) return;
    const n = page.looks[now].n, verdict = columns.marks[at] % 3, flip = Math.floor(columns.marks[at] / 18) - 1;
    const value = columns.floats ? Object.fromEntries(page.columns.map((name, i) => [name, shown(half(columns.floats[i * n + at]))])) : {};
    value.verdict = ["no verdict", "rejected", "accepted"][verdict] + (flip > 0 ? " (rejected before)" : flip < 0 ? " (accepted before)" : "");
    if (columns.rank) value.rank = columns.rank[at] === 65535 ? "outside the stored tokens" : String(columns.rank[at]);
    tip.replaceChildren();
    const piece = (name) => columns[name]?.[at] ? page.pieces[columns[name][at] - 1] : null;
    for (const [label, said] of [["text ", token.textContent], ["student proposes ", piece("proposal")], ["teacher prefers ", piece("teacher_top")]].slice(0, columns.floats ? 3 : 1)) {
      const line = add(tip, "p", label);
      if (said === null) line.append("not known"); else add(line, "q", said);
    }
    const list = add(tip, "dl");
    for (const [name, label] of NAMES) if (value[name] !== undefined) { add(list, "dt", label); add(list, "dd", value[name]).dataset.name = name; }
    if (!columns.floats) add(tip, "p", "The numbers of this measurement were left out, for a page of a few megabytes.");
    tip.hidden = false;
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + tip.offsetHeight + 10 < innerHeight || box.top < tip.offsetHeight + 10;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(below ? box.bottom + 8 : box.top - tip.offsetHeight - 8) + scrollY}px`;
    if (getComputedStyle(tip).position === "fixed") scrollBy(0, Math.max(0, box.bottom + 12 - tip.getBoundingClientRect().top)); // a narrow screen
  }
  function choose(token) {
    current?.classList.remove("on");
    current = token;
    if (!token) { tip.hidden = true; pinned = false; return; }
    token.classList.add("on");
    describe(token);
  }
  const under = (event) => event.target.closest?.(".tokens i");
  heat.addEventListener("pointerover", (event) => { if (!pinned && event.pointerType === "mouse" && under(event)) choose(under(event)); });
  heat.addEventListener("pointerleave", () => { if (!pinned) choose(null); });
  document.addEventListener("click", (event) => {
    const token = under(event);
    if (token) { pinned = !(pinned && token === current); choose(token); } else if (!event.target.closest("#tip, .control")) choose(null);
  });
  heat.addEventListener("focusin", (event) => { if (event.target.matches(".tokens:focus-visible")) { pinned = true; choose(tokens(event.target)[0]); } });
  heat.addEventListener("keydown", (event) => {
    const text = event.target.closest(".tokens"), step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") choose(null);
    if (!text || !step) return;
    event.preventDefault();
    const all = tokens(text);
    let at = all.indexOf(current);
    const to = (i) => Math.min(Math.max(i, 0), all.length - 1);
    at = to(at + step);
    if (event.shiftKey) while (at !== to(at + step) && !/\br\d/.test(all[at].className)) at = to(at + step);
    pinned = true;
    choose(all[at]);
    all[at].scrollIntoView({ block: "nearest" });
  });
  slider.addEventListener("input", () => show(Number(slider.value)));
  label(page.looks[now]); // its colours are the page's own
})();
