// Draws the charts and the token viewer from the JSON in #data. Text from runs only ever becomes textContent.
"use strict";
(() => {
  document.documentElement.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "style") Object.entries(value).forEach(([k, v]) => node.style.setProperty(k, v));
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value);
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
    return node;
  };
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const finite = (v) => typeof v === "number" && Number.isFinite(v);
  const short = (v) => {
    if (v === "inf") return "∞";
    if (v === "-inf") return "−∞";
    if (!finite(v)) return "NaN";
    const a = Math.abs(v);
    const text = a !== 0 && (a < 1e-3 || a >= 1e5) ? v.toExponential(1) : a >= 100 ? v.toFixed(0) : String(+v.toPrecision(3));
    return text.replace("-", "−");
  };
  const niceTicks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  };
  const logTicks = (low, high) => {
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of high / low < 30 ? [1, 2, 5] : [1]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) ticks.push(m * 10 ** e);
    return ticks.length > 2 ? ticks : niceTicks(low, high, 4);
  };
  const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(q * (sorted.length - 1))))];

  const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
  const colorOf = (style) => (style.kind ? `var(--${style.kind === "teacher" ? "ink" : "anchor"})` : `var(--c${style.color})`);
  const marker = (style, x, y, r) => {
    const paint = { fill: style.kind === "untrained" ? "var(--paper)" : colorOf(style), stroke: style.kind === "untrained" ? colorOf(style) : "var(--paper)" };
    const shape = style.kind === "teacher" ? "star" : style.kind === "untrained" ? "circle" : ["circle", "square", "triangle", "diamond"][style.dash];
    const width = style.kind === "untrained" ? 2 : 1.5;
    if (shape === "circle") return s("circle", { cx: x, cy: y, r, style: paint, "stroke-width": width });
    if (shape === "square") return s("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, style: paint, "stroke-width": width });
    const corners = { triangle: 3, diamond: 4, star: 10 }[shape];
    const points = Array.from({ length: corners }, (_, i) => {
      const angle = (2 * Math.PI * i) / corners - Math.PI / 2, radius = r * (shape === "star" ? (i % 2 ? 0.6 : 1.5) : 1.3);
      return `${x + radius * Math.cos(angle)},${y + radius * Math.sin(angle)}`;
    });
    return s("polygon", { points: points.join(" "), style: paint, "stroke-width": width });
  };
  const swatch = (style) =>
    s("svg", { class: "swatch", viewBox: "0 0 22 12", "aria-hidden": "true" },
      style.kind ? null : s("line", { x1: 0, x2: 22, y1: 6, y2: 6, "stroke-width": 2, "stroke-dasharray": DASHES[style.dash], style: { stroke: colorOf(style) } }),
      marker(style, 11, 6, 3.6));
  document.querySelectorAll("[data-swatch]").forEach((node) => node.replaceWith(swatch(JSON.parse(node.dataset.swatch))));

  // The tooltip, one for the page
  const tip = h("div", { class: "tip", hidden: "" });
  document.body.append(tip);
  const showTip = (event, title, rows) => {
    tip.replaceChildren(h("b", {}, title), ...rows.map(([style, name, value]) => h("div", {}, h("span", {}, style ? swatch(style) : null, name), h("span", {}, value))));
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), gap = 14;
    tip.style.left = `${event.clientX + gap + box.width > innerWidth ? Math.max(4, event.clientX - gap - box.width) : event.clientX + gap}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + gap, innerHeight - box.height - 6))}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  // Axes: returns the scales and the group to draw into
  const frame = (node, { x, y, xLabel, yLabel, height = 250, xTicks, log = false, xLog = false, label }) => {
    const width = Math.max(260, node.clientWidth), m = { left: 50, right: 14, top: 8, bottom: 38 };
    const flat = (v) => (log ? Math.log10(v) : v), flatX = (v) => (xLog ? Math.log2(v) : v);
    const X = (v) => m.left + ((flatX(v) - flatX(x[0])) / (flatX(x[1]) - flatX(x[0]) || 1)) * (width - m.left - m.right);
    const Y = (v) => height - m.bottom - ((flat(v) - flat(y[0])) / (flat(y[1]) - flat(y[0]) || 1)) * (height - m.top - m.bottom);
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
    for (const tick of log ? logTicks(...y) : niceTicks(...y, 4))
      svg.append(s("line", { class: "rule", x1: m.left, x2: width - m.right, y1: Y(tick), y2: Y(tick) }), s("text", { x: m.left - 7, y: Y(tick) + 4, "text-anchor": "end" }, short(tick)));
    for (const tick of xTicks || niceTicks(...x, Math.min(7, width / 80)))
      svg.append(s("text", { x: X(tick), y: height - m.bottom + 16, "text-anchor": "middle" }, short(tick)));
    svg.append(s("line", { class: "axis", x1: m.left, x2: width - m.right, y1: height - m.bottom, y2: height - m.bottom }),
      s("text", { x: (m.left + width - m.right) / 2, y: height - 5, "text-anchor": "middle" }, xLabel));
    if (yLabel) svg.append(s("text", { transform: `translate(11 ${(height - m.bottom + m.top) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
    node.replaceChildren(svg);
    return { svg, X, Y, width, height, m };
  };
  const widen = (low, high, share) => { const pad = (high - low) * share || Math.abs(high) * 0.1 || 0.5; return [low - pad, high + pad]; };

  // Curves against the step
  const hidden = new Set();
  let logScale = false;
  const curve = (node, chart) => {
    const series = chart.series.filter((one) => !hidden.has(one.run));
    const raw = series.flatMap((one) => one.y).filter(finite).sort((a, b) => a - b);
    if (!raw.length) { node.replaceChildren(h("p", { class: "note" }, "No finite value to draw.")); return; }
    const line = series.flatMap((one) => one.s).filter(finite);
    let y = [Math.min(quantile(raw, 0.01), ...line), Math.max(quantile(raw, 0.99), ...line)];
    const log = logScale && raw[0] > 0;
    if (log) y = [y[0] * 0.9, y[1] * 1.1];
    else { const above = y[0] >= 0; y = widen(...y, 0.05); if (above && y[0] < 0.25 * y[1]) y[0] = 0; }
    const steps = series.flatMap((one) => one.x);
    let x = [Math.min(...steps), Math.max(...steps)];
    if (x[0] === x[1]) x = [x[0] - 1, x[1] + 1];
    const { svg, X, Y, width, height, m } = frame(node, { x, y, log, xLabel: "step", label: `${chart.title} against the step, one line per run` });
    const inside = (v) => Math.min(Math.max(Y(v), m.top), height - m.bottom);
    const few = Math.max(...series.map((one) => one.x.length)) <= 25;
    for (const one of series)
      if (!few) svg.append(s("path", { d: one.x.map((v, i) => (finite(one.y[i]) && one.y[i] >= y[0] && one.y[i] <= y[1] ? `M${X(v).toFixed(1)} ${Y(one.y[i]).toFixed(1)}h0` : "")).join(""), fill: "none", "stroke-width": 2.6, "stroke-linecap": "round", opacity: 0.3, style: { stroke: colorOf(data.runs[one.run].style) } }));
    for (const one of series) {
      const style = data.runs[one.run].style;
      let d = "", pen = false, last = null;
      one.x.forEach((v, i) => {
        const value = one.s[i];
        if (!finite(value) || (log && value <= 0)) { pen = false; return; }
        d += `${pen ? "L" : "M"}${X(v).toFixed(1)} ${inside(value).toFixed(1)}`;
        pen = true; last = i;
      });
      svg.append(s("path", { d, fill: "none", "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": DASHES[style.dash], style: { stroke: colorOf(style) } }));
      if (few) one.x.forEach((v, i) => finite(one.y[i]) && (!log || one.y[i] > 0) && svg.append(marker(style, X(v), inside(one.y[i]), 3.4)));
      if (last !== null && chart.key === "loss" && data.runs[one.run].diverged !== null) {
        const cx = X(one.x[last]), cy = inside(one.s[last]), right = cx > width - 140;
        svg.append(s("path", { d: `M${cx - 5} ${cy - 5}l10 10m0 -10l-10 10`, "stroke-width": 2.5, style: { stroke: "var(--bad)" } }),
          s("text", { x: cx + (right ? -9 : 9), y: Math.max(cy - 6, 12), "text-anchor": right ? "end" : "start", class: "halo", style: { fill: "var(--bad)" } }, `diverged at step ${data.runs[one.run].diverged}`));
      }
    }
    const cross = s("line", { class: "cross", y1: m.top, y2: height - m.bottom, visibility: "hidden" });
    svg.append(cross);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
      const wanted = x[0] + ((at - m.left) / (width - m.left - m.right)) * (x[1] - x[0]);
      const rows = series.map((one) => {
        let best = 0;
        one.x.forEach((v, i) => { if (Math.abs(v - wanted) < Math.abs(one.x[best] - wanted)) best = i; });
        return [one, best];
      });
      if (!rows.length) return;
      const step = rows.map(([one, i]) => one.x[i]).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); cross.setAttribute("visibility", "visible");
      showTip(event, `step ${step}`, rows.sort(([a, i], [b, j]) => (b.s[j] ?? -Infinity) - (a.s[i] ?? -Infinity))
        .map(([one, i]) => [data.runs[one.run].style, data.runs[one.run].label, few ? short(one.y[i]) : `${short(one.s[i])} (${short(one.y[i])})`]));
    });
    svg.addEventListener("pointerleave", () => { hideTip(); cross.setAttribute("visibility", "hidden"); });
  };

  // A point with error bars per model
  const scatter = (node, points) => {
    points = points.filter((p) => finite(p.x) && finite(p.y));
    if (!points.length) return;
    const reach = (axis, sign) => points.map((p) => p[axis] + sign * (finite(p[`${axis}e`]) ? p[`${axis}e`] : 0));
    let x = widen(Math.min(...reach("x", -1)), Math.max(...reach("x", 1)), 0.14);
    let y = widen(Math.min(...reach("y", -1)), Math.max(...reach("y", 1)), 0.1);
    if (Math.min(...reach("x", -1)) >= 0) x[0] = Math.max(0, x[0]);
    if (Math.min(...reach("y", -1)) >= 0) y[0] = Math.max(0, y[0]);
    if (Math.max(...reach("y", 1)) <= 1) y[1] = Math.min(1, y[1]);
    const { svg, X, Y, width, height, m } = frame(node, { x, y, height: 360, xLabel: "entropy, nats per token", yLabel: "accuracy (avg@k)", label: "Accuracy against entropy, one point per model; the numbers stand in the table above" });
    const taken = points.map((p) => [X(p.x) - 8, Y(p.y) - 8, X(p.x) + 8, Y(p.y) + 8]);
    for (const p of points) {
      const bar = (x1, y1, x2, y2) => s("line", { x1, y1, x2, y2, "stroke-width": 1.5, style: { stroke: colorOf(p.style) } });
      if (finite(p.xe)) svg.append(bar(X(p.x - p.xe), Y(p.y), X(p.x + p.xe), Y(p.y)));
      if (finite(p.ye)) svg.append(bar(X(p.x), Y(p.y - p.ye), X(p.x), Y(p.y + p.ye)));
    }
    for (const p of points) {
      const mark = marker(p.style, X(p.x), Y(p.y), 6);
      const withError = (v, e) => (finite(e) ? `${short(v)} ± ${short(e)}` : short(v));
      mark.addEventListener("pointermove", (event) => showTip(event, p.label, [[null, "accuracy", withError(p.y, p.ye)], [null, "entropy", `${withError(p.x, p.xe)} nats`]]));
      mark.addEventListener("pointerleave", hideTip);
      svg.append(mark);
    }
    for (const p of points) { // labels go where they cover least
      const text = s("text", { class: "label halo" }, p.label);
      svg.append(text);
      const w = text.getComputedTextLength ? text.getComputedTextLength() : p.label.length * 6.5, cx = X(p.x), cy = Y(p.y);
      const places = [];
      for (const [dx, dy] of [[11, 4], [-11 - w, 4], [-w / 2, -13], [-w / 2, 22], [9, -9], [-9 - w, -9], [9, 17], [-9 - w, 17], [9, 30], [-9 - w, 30], [9, -22], [-9 - w, -22], [-w / 2, -27], [-w / 2, 36]])
        places.push([cx + dx, cy + dy - 11, cx + dx + w, cy + dy + 3]);
      const cost = (b) => (b[0] < m.left || b[2] > width || b[1] < 0 || b[3] > height - m.bottom ? 1e6 : 0) +
        taken.reduce((sum, t) => sum + Math.max(0, Math.min(b[2], t[2]) - Math.max(b[0], t[0])) * Math.max(0, Math.min(b[3], t[3]) - Math.max(b[1], t[1])), 0);
      const best = places.reduce((a, b) => (cost(b) < cost(a) - 1e-6 ? b : a));
      text.setAttribute("x", best[0]); text.setAttribute("y", best[3] - 3);
      taken.push(best);
    }
  };

  const passAtK = (node, lines) => {
    const ks = [...new Set(lines.flatMap((line) => line.k))].sort((a, b) => a - b);
    const values = lines.flatMap((line) => line.y.flatMap((v, i) => [v - (line.e[i] || 0), v + (line.e[i] || 0)])).filter(finite);
    if (!values.length) return;
    const low = Math.min(...values), high = Math.max(...values), y = widen(low, high, 0.08);
    if (low >= 0) y[0] = Math.max(0, y[0]);
    if (high <= 1) y[1] = Math.min(1, y[1]);
    const x = ks.length > 1 ? [ks[0] / 1.06, ks[ks.length - 1] * 1.06] : [ks[0] / 2, ks[0] * 2];
    const { svg, X, Y } = frame(node, { x, y, height: 360, xLog: true, xTicks: ks, xLabel: "k, samples per problem", yLabel: "pass@k", label: "pass@k against k, one line per model" });
    for (const line of lines) {
      const color = { stroke: colorOf(line.style) }, at = line.k.map((k, i) => [X(k), Y(line.y[i]), i]).filter(([, v]) => finite(v));
      svg.append(s("path", { d: at.map(([a, b], i) => `${i ? "L" : "M"}${a} ${b}`).join(""), fill: "none", "stroke-width": 2, "stroke-dasharray": line.style.kind ? "1 4" : DASHES[line.style.dash], "stroke-linecap": line.style.kind ? "round" : "butt", style: color }));
      for (const [a, b, i] of at) {
        if (finite(line.e[i])) svg.append(s("line", { x1: a, x2: a, y1: Y(line.y[i] - line.e[i]), y2: Y(line.y[i] + line.e[i]), "stroke-width": 1.5, style: color }));
        const mark = marker(line.style, a, b, 4.5);
        mark.addEventListener("pointermove", (event) => showTip(event, `pass@${line.k[i]}`,
          lines.filter((other) => other.k.includes(line.k[i])).map((other) => { const j = other.k.indexOf(line.k[i]); return [other.style, other.label, `${short(other.y[j])}${finite(other.e[j]) ? ` ± ${short(other.e[j])}` : ""}`, other.y[j]]; }).sort((p, q) => q[3] - p[3])));
        mark.addEventListener("pointerleave", hideTip);
        svg.append(mark);
      }
    }
  };

  const draw = () => {
    document.querySelectorAll("[data-curve]").forEach((node) => node.clientWidth && curve(node, data.curves[+node.dataset.curve]));
    if ($("scatter")) scatter($("scatter"), data.points);
    if ($("passk")) passAtK($("passk"), data.passk);
  };
  const legend = $("legend");
  if (legend) {
    if (data.runs.length > 1) data.runs.forEach((run, i) => legend.append(h("button", { type: "button", "aria-pressed": "true", title: "show or hide this run in the curves", onclick: (event) => {
      const off = hidden.has(i) ? !hidden.delete(i) : Boolean(hidden.add(i));
      event.currentTarget.setAttribute("aria-pressed", String(!off)); draw();
    } }, swatch(run.style), run.label)));
    legend.append(h("label", {}, h("input", { type: "checkbox", onchange: (event) => { logScale = event.target.checked; draw(); } }), "logarithmic where all values are positive"));
  }

  draw();

  // The token viewer. token = [text, divergence, entropy, weight, scored, route, teacher_top, student_top], texts and
  // routes by number
  const word = (i) => data.strings[i];
  const visible = (text) => (text === "" ? "∅" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣"));
  const MODES = ["divergence", "entropy", "weight", "route"];
  const tokensOf = (samples) => samples.flatMap((sample) => sample.tokens || []);
  const routesOf = (samples) => [...new Set(tokensOf(samples).map((t) => t[5]).filter((r) => r !== null))].sort((a, b) => a - b);
  const routeColor = (route) => `color-mix(in srgb, var(--c${route % 8}) 45%, transparent)`;
  const ceilings = {};
  MODES.slice(0, 3).forEach((mode, i) => {
    const values = tokensOf(data.samples).filter((t) => t[4]).map((t) => t[i + 1]).filter(finite).sort((a, b) => a - b);
    ceilings[mode] = values.length ? quantile(values, 0.98) || values[values.length - 1] || 1 : null;
  });
  const tint = (share, color) => `color-mix(in srgb, ${color} ${(82 * Math.min(1, Math.max(0, share)) ** 0.7).toFixed(1)}%, transparent)`;
  const paint = (token, mode) => {
    if (mode === "route") return token[5] === null ? "transparent" : routeColor(token[5]);
    const value = token[1 + MODES.indexOf(mode)];
    if (value === "inf") return tint(1, `var(--heat-${mode})`);
    return finite(value) && token[4] ? tint(value / ceilings[mode], `var(--heat-${mode})`) : "transparent";
  };
  const view = { run: 0, sample: null, mode: "divergence", token: 0 };
  const rowsOf = document.querySelectorAll("tr[data-run]");
  const samplesOf = (run) => data.samples.filter((sample) => sample.run === run);

  const detail = (sample) => {
    const side = $("detail"), token = sample.tokens[view.token];
    const [text, divergence, entropy, weight, scored, route, teacher, student] = token;
    const nats = (v) => (v === null ? "–" : `${short(v)} nats`);
    const facts = [["divergence", nats(divergence)], ["entropy of the student", nats(entropy)], ["weight", weight === null ? "–" : short(weight)], ["route", route === null ? "–" : data.routes[route].name]];
    const names = [...new Set([...(teacher || []), ...(student || [])].map(([name]) => name))];
    const side5 = (list, name) => { const hit = (list || []).find(([other]) => other === name); return hit ? hit[1] : null; };
    const cell = (p, list, which) => h("td", { class: which }, p === null
      ? h("span", { class: "prob faint", title: "not among its five most likely" }, h("em", {}, list && list.length ? `< ${short(list[list.length - 1][1])}` : "–"))
      : h("span", { class: "prob" }, h("i", { style: { width: `${Math.min(100, 100 * p)}%` } }), h("em", {}, finite(p) ? p.toFixed(3) : short(p))));
    side.replaceChildren(
      h("p", { class: "eyebrow" }, `token ${view.token + 1} of ${sample.tokens.length}${scored ? "" : ", not scored"}`),
      h("p", { class: "tok mono" }, visible(word(text))),
      h("dl", {}, facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      route === null || view.mode !== "route" ? null : h("p", { class: "small soft says" }, data.routes[route].says),
      names.length ? h("table", {}, h("thead", {}, h("tr", {}, h("th", { style: { width: "34%" } }, "next token"), h("th", {}, "teacher"), h("th", {}, "student"))),
        h("tbody", {}, names.map((name) => h("tr", name === text ? { class: "drawn" } : {}, h("td", { class: "token", title: visible(word(name)) }, visible(word(name))), cell(side5(teacher, name), teacher, "teacher"), cell(side5(student, name), student, "student")))))
        : h("p", { class: "small faint" }, "The most likely tokens were not stored for this position."),
      names.length ? h("p", { class: "small faint" }, "◂ the token that stands in the text; bars are probabilities") : null);
  };
  const select = (index, focus) => {
    const sample = view.sample;
    view.token = Math.max(0, Math.min(index, sample.tokens.length - 1));
    document.querySelectorAll("#tokens .t").forEach((node, i) => {
      node.classList.toggle("on", i === view.token); node.tabIndex = i === view.token ? 0 : -1;
      if (i === view.token && focus) node.focus({ preventScroll: false });
    });
    const cursor = $("cursor");
    if (cursor) cursor.setAttribute("transform", `translate(${(view.token / sample.tokens.length) * 1000} 0)`);
    detail(sample);
  };
  const scale = () => {
    const node = $("scale");
    if (view.mode === "route") { node.replaceChildren(...routesOf(samplesOf(view.run)).map((r) => h("span", { class: "key", title: data.routes[r].says }, h("i", { style: { background: routeColor(r) } }), data.routes[r].name))); return; }
    const top = ceilings[view.mode], unit = view.mode === "weight" ? "" : " nats";
    node.replaceChildren("0", h("span", { class: "ramp" }, Array.from({ length: 30 }, (_, i) => h("i", { style: { background: tint(i / 29, `var(--heat-${view.mode})`) } }))), `${short(top)}${unit} and more`,
      h("span", { class: "faint" }, "one scale for all runs; dotted: not scored"));
  };
  const strip = (sample) => {
    if (view.mode === "route") { $("strip").replaceChildren(); return; }
    const n = sample.tokens.length, at = 1 + MODES.indexOf(view.mode), top = Math.max(ceilings[view.mode], ...sample.tokens.map((t) => (t[4] && finite(t[at]) ? t[at] : 0)));
    const width = 1000 / n;
    $("strip").replaceChildren(s("svg", { viewBox: "0 0 1000 54", preserveAspectRatio: "none", height: 54, role: "img", "aria-label": `${view.mode} of each token in order` },
      s("line", { class: "axis", x1: 0, x2: 1000, y1: 53.5, y2: 53.5 }),
      sample.tokens.map((t, i) => {
        const v = t[at] === "inf" ? top : t[4] && finite(t[at]) ? Math.max(0, t[at]) : 0, tall = Math.max(v ? 1 : 0, (v / top) * 50);
        return [s("rect", { x: i * width, width: width * 0.84, y: 53 - tall, height: tall, style: { fill: `var(--heat-${view.mode})` } }),
          s("rect", { x: i * width, width, y: 0, height: 54, fill: "transparent", onpointerenter: () => select(i), onclick: () => select(i, true) })];
      }),
      s("rect", { id: "cursor", x: 0, width, y: 0, height: 54, style: { fill: "var(--ink)", opacity: 0.13, "pointer-events": "none" } })));
  };
  const paintTokens = () => {
    const sample = view.sample;
    document.querySelectorAll("#tokens .t").forEach((node, i) => { node.style.background = paint(sample.tokens[i], view.mode); });
    document.querySelectorAll("#modes button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.mode === view.mode)));
    scale(); strip(sample); select(view.token);
  };
  const showSample = (sample) => {
    view.sample = sample;
    $("prompt").textContent = sample.prompt;
    $("meta").textContent = [`text of the ${sample.origin}`, `step ${sample.step}`, ...Object.entries(sample.rewards).map(([name, value]) => `${name} ${short(value)}`)].join(" · ");
    if (!sample.tokens || !sample.tokens.length) {
      $("tokens").textContent = sample.completion;
      $("scale").replaceChildren(); $("strip").replaceChildren();
      $("detail").replaceChildren(h("p", { class: "small faint" }, "This sample was stored without its tokens' divergences."));
      return;
    }
    $("tokens").replaceChildren(...sample.tokens.map((token, i) => {
      const text = word(token[0]), parts = [];
      text.split(/(\n|\t)/).forEach((part) => { if (part === "\n" || part === "\t") parts.push(h("i", { class: "mark" }, part === "\n" ? "↵" : "⇥"), part); else if (part) parts.push(part); });
      return h("span", { class: `t${token[4] ? "" : " unscored"}`, tabindex: -1, onpointerenter: () => select(i), onclick: () => select(i, true), onfocus: () => select(i) }, parts.length ? parts : h("i", { class: "mark" }, "∅"));
    }));
    const scored = sample.tokens.map((t) => (t[1] === "inf" ? Infinity : t[4] && finite(t[1]) ? t[1] : -1));
    view.token = scored.indexOf(Math.max(...scored));
    paintTokens();
  };
  // A prompt in one line: without the chat template's marks, and its end, where the question tends to stand
  const gist = (prompt) => {
    const text = prompt.replace(/<\|[^|<>]*\|>|<\/?think>/g, " ").replace(/\s+/g, " ").trim().replace(/ assistant$/, "");
    return text.length > 64 ? `… ${text.slice(-62)}` : text;
  };
  const showRun = (run, keepPrompt) => {
    view.run = run;
    const list = samplesOf(run), picker = $("pick-sample");
    picker.replaceChildren(...list.map((sample, i) => h("option", { value: i }, `step ${sample.step}: ${gist(sample.prompt)}`)));
    rowsOf.forEach((row) => { row.hidden = +row.dataset.run !== run; });
    if (!list.length) return;
    const same = keepPrompt === undefined ? -1 : list.findIndex((sample) => sample.prompt === keepPrompt);
    const routed = view.mode === "route" ? list.findLastIndex((sample) => routesOf([sample]).length > 1) : -1;
    const last = routed >= 0 ? routed : list.findLastIndex((sample) => sample.tokens && sample.tokens.length);
    picker.value = String(Math.max(0, same >= 0 ? same : last));
    showSample(list[+picker.value]);
  };
  if ($("pick-run")) {
    const present = [...new Set([...data.samples.map((sample) => sample.run), ...[...rowsOf].map((row) => +row.dataset.run)])].sort((a, b) => a - b);
    $("pick-run").append(...present.map((i) => h("option", { value: i }, data.runs[i].label)));
    $("pick-run").addEventListener("change", (event) => showRun(+event.target.value, view.sample && view.sample.prompt));
    $("pick-sample").addEventListener("change", (event) => showSample(samplesOf(view.run)[+event.target.value]));
    const has = { divergence: ceilings.divergence !== null, entropy: ceilings.entropy !== null, weight: ceilings.weight !== null, route: data.routes.length > 0 };
    if (!has.divergence) view.mode = routesOf(data.samples).length > 1 ? "route" : MODES.find((mode) => has[mode]) || "divergence";
    $("modes").append(...MODES.map((mode) => h("button", { type: "button", "data-mode": mode, "aria-pressed": "false", disabled: has[mode] ? null : "", onclick: () => { view.mode = mode; if (view.sample && view.sample.tokens) paintTokens(); } }, mode)));
    $("tokens").addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) { event.preventDefault(); select(view.token + move, true); }
    });
    document.querySelectorAll("button[data-open]").forEach((button) => button.addEventListener("click", () => {
      const [run, at] = button.dataset.open.split(" ").map(Number);
      $("pick-run").value = String(run); showRun(run); $("pick-sample").value = String(at); showSample(samplesOf(run)[at]);
      $("viewer").scrollIntoView({ behavior: "smooth", block: "center" });
    }));
    showRun(present[0]);
  }
  let pending = 0;
  addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(draw, 80); });
  document.querySelectorAll("details").forEach((node) => node.addEventListener("toggle", draw));
})();
