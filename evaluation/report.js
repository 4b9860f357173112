// The behaviour of report.html. The selection is kept behind the # of the address, so that it can be bookmarked
// and sent: #sort=accuracy&order=ascending&filter=ball&true=3&predicted=5 (numbers of classes).
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const classes = data.classes;
  const byId = (id) => document.getElementById(id);
  const state = { sort: "accuracy", order: "ascending", filter: "", true: null, predicted: null };
  const percent = (share) => `${(100 * share).toFixed(1)}\u202f%`;
  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  // The table of classes

  const table = document.querySelector("table.classes");
  const rows = [...table.tBodies[0].rows];
  const buttons = [...table.querySelectorAll("button[data-sort]")];
  const collator = new Intl.Collator(undefined, { numeric: true });

  function showClasses() {
    const sign = state.order === "ascending" ? 1 : -1;
    const label = (row) => Number(row.dataset.label);
    const compare = state.sort === "name"
      ? (a, b) => sign * collator.compare(classes[label(a)], classes[label(b)])
      : (a, b) => {
          const [one, other] = [a.dataset[state.sort], b.dataset[state.sort]];
          if (one === "" || other === "") return (one === "") - (other === ""); // classes without videos: last in either order
          return sign * (one - other);
        };
    rows.sort((a, b) => compare(a, b) || label(a) - label(b));
    const wanted = state.filter.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !classes[label(row)].toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    table.tBodies[0].append(...rows);
    for (const button of buttons) {
      const head = button.closest("th");
      if (button.dataset.sort === state.sort) head.setAttribute("aria-sort", state.order);
      else head.removeAttribute("aria-sort");
    }
    byId("shown").textContent = (shown < rows.length ? `${shown} of ` : "")
      + `${rows.length} ${rows.length === 1 ? "class" : "classes"}`;
    if (byId("filter").value !== state.filter) byId("filter").value = state.filter;
  }

  for (const button of buttons) {
    button.addEventListener("click", () => {
      const key = button.dataset.sort;
      const first = key === "videos" || key === "top5" ? "descending" : "ascending";
      const other = state.order === "ascending" ? "descending" : "ascending";
      state.order = state.sort === key ? other : first;
      state.sort = key;
      showClasses();
      keep();
    });
  }
  byId("filter").addEventListener("input", (event) => {
    state.filter = event.target.value;
    showClasses();
    keep();
  });

  // The confusion matrix

  const canvas = byId("matrix");
  const count = classes.length;
  const cells = [];
  const totals = new Array(count).fill(0);
  const found = new Map();
  for (let i = 0; i < data.cells.length; i += 3) {
    const [label, predicted, videos] = data.cells.slice(i, i + 3);
    cells.push([label, predicted, videos]);
    totals[label] += videos;
    found.set(label * count + predicted, videos);
  }
  cells.sort((a, b) => a[2] / totals[a[0]] - b[2] / totals[b[0]]); // dark cells on top: cells may be drawn wider than their place
  const font = (size, weight = 400) => `${weight} ${size}px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif`;
  const context = canvas.getContext("2d");
  const colours = {};
  let left, top, plot; // CSS pixels: the plot's corner and side
  const titleHeight = 18; // CSS pixels for the title of an axis
  let turned; // column names are written upwards
  let view = { x: 0, y: 0, size: 0 }; // the cell at the plot's corner; CSS pixels per cell
  let pointed = null; // [true, predicted]
  let waiting = false;

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["panel", "text", "soft", "line", "blue", "track"]) colours[name] = style.getPropertyValue(`--${name}`).trim();
    const anchors = [0, 1, 2, 3, 4].map((k) => {
      const hex = style.getPropertyValue(`--cell-${k}`).trim();
      return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    });
    colours.ramp = Array.from({ length: 101 }, (_, k) => {
      const place = Math.min(k / 25, 3.9999), low = Math.floor(place), part = place - low;
      return `rgb(${anchors[low].map((value, i) => Math.round(value + part * (anchors[low + 1][i] - value))).join(",")})`;
    });
    byId("ramp").style.background = `linear-gradient(to right, ${colours.ramp.join(",")})`;
  }

  // The square root: a share of 4 % is a fifth of the way from pale to dark.
  const place = (videos, label) => Math.round(100 * Math.sqrt(videos / totals[label]));

  function fitted(name, room) {
    if (context.measureText(name).width <= room) return name;
    let low = 0, high = name.length; // the longest beginning that fits
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (context.measureText(name.slice(0, middle) + "…").width <= room) low = middle;
      else high = middle - 1;
    }
    return name.slice(0, low) + "…";
  }

  function layOut() {
    const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
    context.font = font(12);
    const longest = Math.max(...classes.map((name) => context.measureText(name).width));
    const most = Math.max(width * 0.24, 70);
    const room = Math.ceil(Math.min(longest + 10, most));
    left = room + titleHeight;
    turned = longest + 10 > (width - left) / count;
    top = (turned ? room : 26) + titleHeight;
    const wasWhole = !(view.size > plot / count * 1.001);
    plot = width - left - 1;
    canvas.style.aspectRatio = `${width} / ${top + plot + 1}`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round((top + plot + 1) * ratio);
    if (wasWhole) view = { x: 0, y: 0, size: plot / count };
    clamp();
  }

  function clamp() {
    view.size = Math.min(Math.max(view.size, plot / count), Math.max(plot / count, 56));
    const most = Math.max(count - plot / view.size, 0);
    view.x = Math.min(Math.max(view.x, 0), most);
    view.y = Math.min(Math.max(view.y, 0), most);
    canvas.style.touchAction = isWhole() ? "pan-y" : "none"; // the page scrolls until the matrix is zoomed
  }

  const isWhole = () => view.size <= plot / count * 1.001;

  function draw() {
    if (!waiting) requestAnimationFrame(drawNow);
    waiting = true;
  }

  function drawNow() {
    waiting = false;
    const ratio = canvas.width / canvas.clientWidth, { x, y, size } = view;
    const last = (from) => Math.min(Math.ceil(from + plot / size), count);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.save();
    context.beginPath();
    context.rect(left, top, plot, plot);
    context.clip();
    context.fillStyle = colours.panel;
    context.fillRect(left, top, plot, plot);
    if (pointed) {
      context.fillStyle = colours.track;
      context.fillRect(left, top + (pointed[0] - y) * size, plot, size);
      if (pointed[1] !== null) context.fillRect(left + (pointed[1] - x) * size, top, size, plot);
    }
    const gap = size >= 8 ? 1 : 0, drawn = Math.max(size - gap, 2);
    context.font = font(Math.min(13, size * 0.42));
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const [label, predicted, videos] of cells) {
      const right = (predicted - x) * size, down = (label - y) * size;
      if (right < -size || down < -size || right > plot || down > plot) continue;
      const k = place(videos, label);
      context.fillStyle = colours.ramp[k];
      context.fillRect(left + right, top + down, drawn, drawn);
      if (size >= 20) {
        context.fillStyle = k > 48 ? colours.panel : colours.text;
        context.fillText(videos, left + right + drawn / 2, top + down + drawn / 2 + 1);
      }
    }
    if (pointed && pointed[1] !== null) {
      context.strokeStyle = colours.text;
      context.lineWidth = 1.5;
      const side = Math.max(size, 5), shift = (side - size) / 2;
      context.strokeRect(left + (pointed[1] - x) * size - shift, top + (pointed[0] - y) * size - shift, side - gap, side - gap);
    }
    context.restore();
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    context.strokeRect(left - 0.5, top - 0.5, plot + 1, plot + 1);
    names(y, last(y), size, false);
    names(x, last(x), size, true);
    axisTitles();
  }

  function axisTitles() {
    context.font = font(12, 600);
    context.fillStyle = colours.text;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText("predicted class", left + plot / 2, titleHeight / 2);
    context.save();
    context.translate(titleHeight / 2, top + plot / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("true class", 0, 0);
    context.restore();
  }

  // Names of the visible rows or columns: every n-th if there is no room for all, and always the one pointed at.
  function names(from, to, size, isColumn) {
    const every = isColumn && !turned ? 1 : Math.max(Math.ceil(17 / size), 1);
    const chosen = pointed ? pointed[isColumn ? 1 : 0] : null;
    const room = isColumn && !turned ? size - 8 : (isColumn ? top : left) - titleHeight - 8;
    context.textBaseline = "middle";
    for (let k = Math.max(Math.floor(from), 0); k < to; k++) {
      const at = (k + 0.5 - from) * size;
      if (at < 0 || at > plot) continue;
      const near = chosen !== null && Math.abs(k - chosen) * size < 15 && k !== chosen;
      if (k !== chosen && (k % every || near)) continue;
      context.font = font(12, k === chosen ? 600 : 400);
      context.fillStyle = k === chosen ? colours.text : colours.soft;
      const name = fitted(classes[k], room);
      context.save();
      if (isColumn) {
        context.translate(left + at, turned ? top - 6 : top - 13);
        if (turned) context.rotate(-Math.PI / 2);
        context.textAlign = turned ? "left" : "center";
      } else {
        context.translate(left - 6, top + at);
        context.textAlign = "right";
      }
      context.fillText(name, 0, 0);
      context.restore();
    }
  }

  function zoom(factor, px = left + plot / 2, py = top + plot / 2) {
    const [x, y] = [view.x + (px - left) / view.size, view.y + (py - top) / view.size];
    view.size *= factor;
    view.size = Math.min(Math.max(view.size, plot / count), Math.max(plot / count, 56));
    view.x = x - (px - left) / view.size;
    view.y = y - (py - top) / view.size;
    clamp();
    draw();
  }

  function showCell(label, predicted, least) {
    if (view.size < least) view.size = least;
    clamp();
    const shown = plot / view.size, column = predicted === null ? label : predicted;
    if (label < view.y || label + 1 > view.y + shown) view.y = label + 0.5 - shown / 2;
    if (column < view.x || column + 1 > view.x + shown) view.x = column + 0.5 - shown / 2;
    clamp();
  }

  function point(cell) {
    pointed = cell;
    let text = "";
    if (cell && cell[1] !== null) {
      const [label, predicted] = cell, videos = found.get(label * count + predicted) || 0;
      const share = totals[label] ? ` (${percent(videos / totals[label])})` : "";
      text = `${classes[label]} → ${classes[predicted]}: ${videos}${share}`;
    }
    byId("readout").textContent = text;
    draw();
  }

  const chosenCell = () => (state.true === null ? null : [state.true, state.predicted]);

  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const label = Math.floor(view.y + (event.clientY - box.top - top) / view.size);
    const predicted = Math.floor(view.x + (event.clientX - box.left - left) / view.size);
    const isInside = event.clientX - box.left >= left && event.clientY - box.top >= top;
    return isInside && label < count && predicted < count ? [label, predicted] : null;
  }

  const fingers = new Map(); // position of each finger, or of the mouse while its button is down
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    if (!fingers.size) moved = 0;
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return point(cellAt(event) || chosenCell());
    const now = [event.clientX, event.clientY];
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (moved > 4) canvas.setPointerCapture(event.pointerId);
    const others = [...fingers].filter(([id]) => id !== event.pointerId);
    fingers.set(event.pointerId, now);
    if (others.length) { // a pinch
      const [x, y] = others[0][1], box = canvas.getBoundingClientRect();
      const factor = Math.hypot(now[0] - x, now[1] - y) / Math.max(Math.hypot(before[0] - x, before[1] - y), 1);
      zoom(factor, (now[0] + x) / 2 - box.left, (now[1] + y) / 2 - box.top);
    } else if (moved > 4) {
      view.x -= (now[0] - before[0]) / view.size;
      view.y -= (now[1] - before[1]) / view.size;
      clamp();
      draw();
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => {
      const cell = cellAt(event);
      if (kind === "pointerup" && moved <= 4 && cell) choose(...cell);
      fingers.delete(event.pointerId);
    });
  }
  canvas.addEventListener("pointerleave", () => { if (!fingers.size) point(chosenCell()); });
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return; // otherwise the page could not be scrolled past it
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (step) {
      const [label, predicted] = pointed || [0, 0];
      const to = (value, by) => Math.min(Math.max((value === null ? label : value) + by, 0), count - 1);
      const cell = [to(label, step[0]), to(predicted, step[1])];
      showCell(...cell, 0);
      point(cell);
    } else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "0") zoom(0);
    else if (event.key === "Enter" && pointed && pointed[1] !== null) choose(...pointed);
    else return;
    event.preventDefault();
  });
  byId("in").addEventListener("click", () => zoom(1.5));
  byId("out").addEventListener("click", () => zoom(1 / 1.5));
  byId("all").addEventListener("click", () => zoom(0));

  // The videos of a class, or of a cell

  const most = 200;

  function choose(label, predicted) {
    Object.assign(state, { true: label, predicted });
    showVideos();
    keep();
  }

  function showVideos() {
    for (const link of document.querySelectorAll("#pairs a")) {
      if (link.hash === `#true=${state.true}&predicted=${state.predicted}`) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    if (state.true === null) return;
    const { mistakes } = data, { true: label, predicted } = state;
    const chosen = [];
    mistakes.label.forEach((each, i) => {
      if (each === label && (predicted === null || mistakes.predicted[i] === predicted)) chosen.push(i);
    });
    const isRight = predicted === label;
    byId("chosen").textContent = predicted === null
      ? `Mistakes of ${classes[label]}` : `${classes[label]} → ${classes[predicted]}`;
    const list = element("ol", {}, ...chosen.slice(0, most).map((i) => {
      const row = mistakes.row[i];
      const path = byId(`row-${row}`) ? element("a", { href: `#row-${row}` }, mistakes.path[i]) : element("span", {}, mistakes.path[i]);
      const taken = predicted === null ? `${classes[mistakes.predicted[i]]} ` : "";
      return element("li", {}, path, element("span", {}, element("small", {}, taken), percent(mistakes.confidence[i] / 1000)));
    }));
    const videos = predicted === null ? null : found.get(label * count + predicted) || 0;
    const text = isRight ? `${videos} right.` : !chosen.length ? "None." : chosen.length > most ? `The first ${most} of ${chosen.length}.` : "";
    byId("videos").replaceChildren(...(chosen.length ? [list] : []), ...(text ? [element("p", { className: "note" }, text)] : []));
    byId("videos").scrollTop = 0;
    point(chosenCell());
  }

  // The address

  function keep() {
    const wanted = new URLSearchParams();
    for (const [key, value] of Object.entries(state)) if (value !== null && value !== "") wanted.set(key, value);
    history.replaceState(null, "", `#${wanted}`);
  }

  function readAddress() {
    if (!location.hash.includes("=")) return; // an anchor on the page
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (buttons.some((button) => button.dataset.sort === wanted.get("sort"))) {
      state.sort = wanted.get("sort");
      state.order = wanted.get("order") === "descending" ? "descending" : "ascending";
    }
    if (wanted.has("filter")) state.filter = wanted.get("filter");
    showClasses();
    const number = (key) => (/^\d+$/.test(wanted.get(key)) && wanted.get(key) < count ? Number(wanted.get(key)) : null);
    if (number("true") === null) return;
    Object.assign(state, { true: number("true"), predicted: number("predicted") });
    showCell(state.true, state.predicted, 22);
    showVideos();
    const isBelow = byId("chosen").offsetTop >= canvas.offsetTop + canvas.offsetHeight; // narrow: one column
    (isBelow ? byId("chosen") : canvas).scrollIntoView({ block: "nearest" });
  }

  window.addEventListener("hashchange", readAddress);
  const redraw = () => { readColours(); draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const kind of ["beforeprint", "afterprint"]) {
    window.addEventListener(kind, () => {
      document.documentElement.toggleAttribute("data-print", kind === "beforeprint"); // paper is always light
      readColours();
      drawNow();
    });
  }
  window.addEventListener("resize", () => { layOut(); draw(); });
  readColours();
  layOut();
  drawNow();
  showClasses();
  readAddress();
  document.documentElement.dataset.ready = Math.round(performance.now()); // ms since the page was opened
})();
