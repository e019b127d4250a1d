"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const taps = data.k * data.k;
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);

  // Colours: blue below zero, red above, through the page's background; saturated at a tap of .6 of a filter of norm 1.
  const LIMIT = 0.6;
  const STOPS = {
    light: ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"],
    dark: ["a8dcff", "62b5ec", "3282bd", "20547c", "19324a", "1b2027", "46251d", "7a3826", "b75433", "ea8450", "ffc9a1"],
  };
  const ramp = (stops) => Array.from({ length: 255 }, (_, i) => {
    const at = (i / 254) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
    const channel = (stop, c) => parseInt(stops[stop].slice(2 * c, 2 * c + 2), 16);
    return "rgb(" + [0, 1, 2].map((c) => Math.round(channel(low, c) + (at - low) * (channel(low + 1, c) - channel(low, c))));
  }).map((colour) => colour + ")");
  const ramps = { light: ramp(STOPS.light), dark: ramp(STOPS.dark) };
  const colourOf = (value) => ramps[root.dataset.theme][Math.round(127 + 127 * Math.max(-1, Math.min(1, value / LIMIT)))];

  function draw(context, values, x, y, size) {
    for (let tap = 0; tap < taps; tap++) {
      const column = tap % data.k, row = (tap - column) / data.k;
      const left = Math.round((column * size) / data.k), top = Math.round((row * size) / data.k);
      context.fillStyle = colourOf(values[tap]);
      context.fillRect(x + left, y + top, Math.round(((column + 1) * size) / data.k) - left,
        Math.round(((row + 1) * size) / data.k) - top);
    }
  }

  function drawIcons() {
    for (const canvas of document.querySelectorAll("canvas[data-set]")) {
      const size = Math.round((canvas.clientWidth || 24) * devicePixelRatio);
      canvas.width = canvas.height = size;
      draw(canvas.getContext("2d"), data[canvas.dataset.set][canvas.dataset.number], 0, 0, size);
    }
  }

  // The atlas: the sample's filters in the order of layers, then keys; `sampled` counts them.
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const filters = new Int8Array(bytes(data.atlas.filters).buffer);
  const residual = bytes(data.atlas.residual);
  const channel = new Uint32Array(bytes(data.atlas.channel).buffer);
  const positive = bytes(data.atlas.positive);
  const layers = [];
  const all = [];
  let next = 0;
  data.models.forEach((model) => model.layers.forEach((layer) => {
    const number = layers.push({ model: model.name, layer: layer.name }) - 1;
    layer.sampled.forEach((count, key) => {
      for (let i = 0; i < count; i++) all.push({ at: next++, layer: number, key });
    });
  }));
  const state = { model: "", layer: "", key: null, order: "best", signed: false, pages: 1 };
  let shown = [], columns = 1, cell = 1, picked = null;

  const valuesOf = (item) => {
    const part = filters.subarray(item.at * taps, (item.at + 1) * taps);
    const norm = Math.sqrt(part.reduce((sum, value) => sum + value * value, 0)) || 1;
    const sign = state.signed && !positive[item.at] ? -1 : 1;
    return Array.from(part, (value) => (sign * value) / norm);
  };

  function choose() {
    const fits = all.filter((item) => (!state.model || layers[item.layer].model === state.model)
      && (!state.layer || layers[item.layer].layer === state.layer) && (state.key === null || state.key === item.key));
    const by = { best: (a, b) => residual[a.at] - residual[b.at], worst: (a, b) => residual[b.at] - residual[a.at] };
    shown = state.order === "depth" ? fits : fits.sort(by[state.order]);
    picked = null;
    $("detail").textContent = "Point at a filter to read where it is from.";
    render();
  }

  function render() {
    const canvas = $("grid"), width = canvas.parentElement.clientWidth;
    const side = width < 500 ? 40 : 52;
    columns = Math.max(4, Math.floor(width / (side + 6)));
    cell = width / columns;
    const limit = Math.min(shown.length, columns * 12 * state.pages), ratio = devicePixelRatio;
    const height = Math.ceil(limit / columns) * cell;
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    for (let i = 0; i < limit; i++) {
      const x = (i % columns) * cell, y = Math.floor(i / columns) * cell, gap = 3;
      draw(context, valuesOf(shown[i]), Math.round((x + gap) * ratio), Math.round((y + gap) * ratio), Math.round((cell - 2 * gap) * ratio));
      context.fillStyle = getComputedStyle(document.querySelector(".k" + (shown[i].key + 1))).getPropertyValue("--c");
      context.fillRect(Math.round((x + gap) * ratio), Math.round((y + cell - gap) * ratio), Math.round((cell - 2 * gap) * ratio), Math.max(2, Math.round(2 * ratio)));
      if (i === picked) {
        context.strokeStyle = getComputedStyle(root).getPropertyValue("--ink");
        context.lineWidth = 2 * ratio;
        context.strokeRect((x + 1.5) * ratio, (y + 1.5) * ratio, (cell - 3) * ratio, (cell - 3) * ratio);
      }
    }
    canvas.dataset.shown = limit;
    $("status").textContent = shown.length
      ? limit.toLocaleString("en") + " of " + shown.length.toLocaleString("en") + " sampled filters shown"
      : "No sampled filter is of this layer and key.";
    $("more").hidden = limit === shown.length;
  }

  function tell(event) {
    const box = $("grid").getBoundingClientRect();
    const i = Math.floor((event.clientY - box.top) / cell) * columns + Math.floor((event.clientX - box.left) / cell);
    if (!(i >= 0 && i < Number($("grid").dataset.shown)) || i === picked) return;
    picked = i;
    const { at, layer, key } = shown[i];
    $("detail").textContent = `${layers[layer].model} · ${layers[layer].layer} · channel ${channel[at]} · key ${data.names[key]}`
      + ` · residual ${(residual[at] / 255).toFixed(2)} · scale ${positive[at] ? "positive" : "negative"}`;
    render();
  }

  function fill(select, names, first) {
    select.replaceChildren(new Option(first, ""), ...names.map((name) => new Option(name, name)));
  }

  function fillLayers() {
    const model = data.models.find((entry) => entry.name === state.model);
    fill($("layer"), model ? model.layers.map((layer) => layer.name) : [], model ? "all layers" : "choose a network first");
    $("layer").disabled = !model;
    $("layer").value = state.layer;
  }

  function set(change) {
    Object.assign(state, { pages: 1 }, change);
    $("model").value = state.model;
    fillLayers();
    for (const chip of document.querySelectorAll("#chips button")) {
      chip.setAttribute("aria-pressed", state.key === null || state.key === Number(chip.dataset.key));
    }
    choose();
  }

  fill($("model"), data.models.map((model) => model.name), "all networks");
  $("model").addEventListener("change", (event) => set({ model: event.target.value, layer: "" }));
  $("layer").addEventListener("change", (event) => set({ layer: event.target.value }));
  $("order").addEventListener("change", (event) => set({ order: event.target.value }));
  $("signed").addEventListener("change", (event) => set({ signed: event.target.value === "yes" }));
  $("more").addEventListener("click", () => { state.pages += 2; render(); });
  $("chips").addEventListener("click", (event) => {
    const chip = event.target.closest("button");
    if (!chip) return;
    const key = Number(chip.dataset.key);
    set({ key: state.key === key ? null : key }); // a second click takes the choice back
  });
  $("grid").addEventListener("pointermove", tell);
  $("grid").addEventListener("click", tell);
  for (const part of document.querySelectorAll("[data-layer]")) {
    part.addEventListener("click", () => {
      set({ model: data.models[part.dataset.model].name, layer: data.models[part.dataset.model].layers[part.dataset.layer].name });
      $("atlas").scrollIntoView();
    });
  }

  // The theme is the system's until the button is pressed.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = (theme) => {
    root.dataset.theme = theme;
    drawIcons();
    render();
  };
  $("theme").addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));
  system.addEventListener("change", () => show(system.matches ? "dark" : "light"));
  root.dataset.theme = system.matches ? "dark" : "light";
  let width = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar
    width = innerWidth;
    drawIcons();
    render();
  });
  drawIcons();
  set({});
})();
