// The report's script: draws the curves of the embedded data as SVG.
#include "report/html.h"

namespace hgrn {

const char* const kPageScript = R"js(
(() => {
'use strict';
const runs = JSON.parse(document.getElementById('data').textContent);
const state = {x: 'steps', smooth: 0.6, full: false, hidden: new Set()};
const color = i => `var(--c${i % 8})`;
const dash = i => ['', '7 3', '2 3'][Math.floor(i / 8) % 3];
document.querySelectorAll('.key').forEach(k => k.style.setProperty('--c', color(+k.dataset.run)));

// ---- numbers
const trim = s => s.includes('.') ? s.replace(/0+$/, '').replace(/\.$/, '') : s;
function short(v) {
  const units = ['', 'k', 'M', 'G', 'T'];
  let u = 0;
  while (Math.abs(v) >= 999.5 && u < 4) { v /= 1000; ++u; }
  return trim(Math.abs(v) >= 100 || v === 0 ? v.toFixed(0) : v.toPrecision(3)) + units[u];
}
function real(v) {
  const a = Math.abs(v);
  if (v === 0) return '0';
  if (a >= 10000) return short(v);
  if (a < 0.001) return v.toExponential(2).replace(/\.?0+e/, 'e');
  return trim(v.toPrecision(5));
}
function span(s) {
  const p = n => String(n).padStart(2, '0');
  s = Math.round(s);
  const d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
  return (d ? d + 'd ' : '') + (d || h ? h + ':' + p(m) : m) + ':' + p(s % 60);
}
const showX = {steps: v => 'step ' + Math.round(v), tokens: v => short(v) + ' tokens', time: span,
               layer: v => 'layer ' + Math.round(v)};

function niceStep(raw) {
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const r = raw / power;
  return (r <= 1 ? 1 : r <= 2 ? 2 : r <= 5 ? 5 : 10) * power;
}
function ticks(low, high, count, whole) {
  let step = niceStep((high - low) / Math.max(1, count));
  if (whole) step = Math.max(1, step);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; ++k) out.push(k * step);
  return out;
}
function timeTicks(high, count) {
  const raw = high / Math.max(1, count);
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
  const step = steps.find(s => s >= raw) || niceStep(raw / 86400) * 86400;
  const out = [];
  for (let t = 0; t <= high * (1 + 1e-9); t += step) out.push(t);
  return out.length > 1 ? out : ticks(0, high, count);
}
function tickTime(t, high) {
  if (high < 120) return trim(t.toPrecision(3)) + ' s';
  if (high < 7200) return trim((t / 60).toPrecision(3)) + ' min';
  if (high < 172800) return trim((t / 3600).toPrecision(3)) + ' h';
  return trim((t / 86400).toPrecision(3)) + ' d';
}

// ---- what is drawn
const byLayer = key => r => r.layers[key].some(v => v !== null)
    ? {x: r.layers[key].map((_, i) => i), mean: r.layers[key], what: ' at step ' + r.layers.step} : null;
const byStep = key => r => r.charts[key] ? {x: r.x[state.x], ...r.charts[key], bad: key === 'loss' ? r.bad[state.x] : []} : null;
const charts = [
  {title: 'Training loss', unit: 'nats a token', series: byStep('loss'), wide: true, smooth: true},
  {title: 'Validation loss', unit: 'nats a token', dots: true,
   series: r => r.valid.y ? {x: r.valid.x[state.x], ...r.valid.y} : null},
  {title: 'Gradient norm', unit: 'before clipping', series: byStep('grad_norm'), smooth: true, zero: true},
  {title: 'Learning rate', series: byStep('lr'), zero: true},
  {title: 'Throughput', unit: 'tokens a second', series: byStep('tokens_per_s'), smooth: true, zero: true},
  {title: 'MFU', unit: "share of the device's peak", series: byStep('mfu'), smooth: true, zero: true},
  {title: 'Mean forget gate by layer', unit: 'last look', series: byLayer('gate'), layer: true, dots: true},
  {title: 'Gradient norm by layer', unit: 'last look', series: byLayer('norm'), layer: true, dots: true, zero: true},
];

function smoothed(values, weight) {  // exponential mean, without the pull towards its start
  let sum = 0, mass = 0;
  return values.map(v => {
    if (v === null) return null;
    sum = sum * weight + v * (1 - weight);
    mass = mass * weight + (1 - weight);
    return sum / mass;
  });
}

const known = a => (a || []).filter(v => v !== null && isFinite(v));
const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];

function domains(chart, series) {
  let right = 0, left = 0;
  for (const s of series) for (const v of known(s.x)) right = Math.max(right, v);
  if (!(right > left)) right = left + 1;
  const lows = [], highs = [];
  const collect = from => {
    for (const s of series) s.x.forEach((x, i) => {
      if (x === null || s.mean[i] === null || x < from) return;
      lows.push(s.least ? s.least[i] : s.mean[i]);
      highs.push(s.largest ? s.largest[i] : s.mean[i]);
    });
  };
  // The steep start and lone outliers may leave the picture, unless all of it is wanted.
  if (!state.full && !chart.layer && !chart.zero) collect(0.05 * right);
  if (lows.length < 8) { lows.length = highs.length = 0; collect(-Infinity); }
  lows.sort((a, b) => a - b);
  highs.sort((a, b) => a - b);
  let low = lows[0], high = highs[highs.length - 1];
  if (!state.full && highs.length > 20) {
    const most = quantile(highs, 0.98);
    if (high - low > 1.4 * (most - low)) high = most;
  }
  if (chart.zero && low >= 0) low = 0;
  if (!(high > low)) { const pad = Math.abs(high) * 0.1 || 1; low = chart.zero && high > 0 ? 0 : low - pad; high += pad; }
  const pad = (high - low) * 0.05;
  return {left, right, low: chart.zero && low === 0 ? 0 : low - pad, high: high + pad};
}

function element(name, attributes, parent, text) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.appendChild(e);
  return e;
}

function path(xs, ys, px, py) {
  let d = '', pen = false;
  for (let i = 0; i < xs.length; ++i) {
    if (xs[i] === null || ys[i] === null) { pen = false; continue; }
    d += (pen ? 'L' : 'M') + px(xs[i]).toFixed(1) + ' ' + py(ys[i]).toFixed(1);
    pen = true;
  }
  return d;
}

function band(s, px, py) {
  let d = '';
  for (let i = 0; i < s.x.length;) {
    while (i < s.x.length && s.least[i] === null) ++i;
    let end = i;
    while (end < s.x.length && s.least[end] !== null) ++end;
    if (end > i + 1) {
      const part = a => a.slice(i, end);
      d += path(part(s.x), part(s.largest), px, py);
      d += path(part(s.x).reverse(), part(s.least).reverse(), px, py).replace('M', 'L') + 'Z';
    }
    i = end;
  }
  return d;
}

let ids = 0;
function draw(card) {
  const {chart, figure, holder} = card;
  const series = [];
  runs.forEach((r, i) => {
    if (state.hidden.has(i)) return;
    const s = chart.series(r);
    if (s && known(s.mean).length + known(s.bad).length) series.push({...s, run: i});
  });
  holder.replaceChildren();
  card.hover = null;
  const width = holder.clientWidth, height = chart.wide ? Math.max(220, Math.min(360, width * 0.5)) : 230;
  if (!width) return;
  const svg = element('svg', {viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': chart.title}, holder);
  if (!series.length) {
    element('text', {x: width / 2, y: height / 2, 'text-anchor': 'middle'}, svg, 'no data');
    return;
  }
  const d = domains(chart, series);
  const yTicks = ticks(d.low, d.high, height / 48);
  const tiny = d.high < 0.01;  // all ticks of an axis in one form
  const labels = yTicks.map(v => v === 0 ? '0' : d.high >= 10000 ? short(v) : tiny ? v.toExponential(2).replace(/\.?0+e/, 'e') : real(+v.toPrecision(6)));
  const box = {left: 14 + 7 * Math.max(...labels.map(l => l.length)), right: width - 12, top: 8, bottom: height - 26};
  const px = v => box.left + (v - d.left) / (d.right - d.left) * (box.right - box.left);
  const py = v => box.bottom - (v - d.low) / (d.high - d.low) * (box.bottom - box.top);
  yTicks.forEach((v, i) => {
    element('line', {class: 'grid', x1: box.left, x2: box.right, y1: py(v), y2: py(v)}, svg);
    element('text', {x: box.left - 6, y: py(v) + 4, 'text-anchor': 'end'}, svg, labels[i]);
  });
  const kind = chart.layer ? 'layer' : state.x, count = (box.right - box.left) / 90;
  const xTicks = kind === 'time' ? timeTicks(d.right, count) : ticks(d.left, d.right, count, kind !== 'tokens');
  for (const v of xTicks) {
    const x = px(v), anchor = x > box.right - 18 ? 'end' : x < box.left + 8 ? 'start' : 'middle';
    element('line', {class: 'axis', x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4}, svg);
    element('text', {x, y: box.bottom + 18, 'text-anchor': anchor}, svg, kind === 'time' ? tickTime(v, d.right) : short(v));
  }
  element('line', {class: 'axis', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}, svg);
  const clip = 'clip' + ++ids;
  element('rect', {x: box.left - 4, y: box.top - 4, width: box.right - box.left + 8, height: box.bottom - box.top + 5},
          element('clipPath', {id: clip}, svg));
  const plot = element('g', {'clip-path': `url(#${clip})`, fill: 'none', 'stroke-linejoin': 'round'}, svg);
  const soft = chart.smooth && state.smooth > 0;
  for (const s of series) {
    const stroke = {stroke: color(s.run), 'stroke-dasharray': dash(s.run)};
    if (s.least) element('path', {d: band(s, px, py), style: `fill:${color(s.run)}`, 'fill-opacity': .16}, plot);
    s.line = soft ? smoothed(s.mean, state.smooth) : s.mean;
    if (soft) element('path', {d: path(s.x, s.mean, px, py), style: `stroke:${color(s.run)}`, 'stroke-opacity': .3}, plot);
    element('path', {d: path(s.x, s.line, px, py), style: `stroke:${stroke.stroke}`, 'stroke-dasharray': stroke['stroke-dasharray'], 'stroke-width': 1.8}, plot);
    const few = chart.dots && s.x.length <= 60;
    s.x.forEach((x, i) => {  // points that no line reaches
      if (s.line[i] === null || x === null) return;
      const alone = (i === 0 || s.line[i - 1] === null) && (i + 1 === s.x.length || s.line[i + 1] === null);
      if (few || alone) element('circle', {cx: px(x), cy: py(s.line[i]), r: alone ? 3.5 : 2.6, style: `fill:${color(s.run)}`}, plot);
    });
    for (const x of known(s.bad))
      element('line', {class: 'bad', x1: px(x), x2: px(x), y1: box.bottom - 7, y2: box.bottom}, plot);
  }
  card.hover = {svg, series, d, box, px, py, kind};
}

function nearest(xs, ys, x) {
  let best = -1;
  for (let i = 0; i < xs.length; ++i)
    if (xs[i] !== null && ys[i] !== null && (best < 0 || Math.abs(xs[i] - x) < Math.abs(xs[best] - x))) best = i;
  return best;
}

function hover(card, event) {
  const h = card.hover;
  if (!h) return;
  const frame = h.svg.getBoundingClientRect();
  const at = event.clientX - frame.left;
  if (at < h.box.left - 8 || at > h.box.right + 8) return leave(card);
  const x = h.d.left + (at - h.box.left) / (h.box.right - h.box.left) * (h.d.right - h.d.left);
  leave(card);
  const found = h.series.map(s => ({s, i: nearest(s.x, s.line, x)})).filter(f => f.i >= 0);
  if (!found.length) return;
  const first = found.reduce((a, b) => Math.abs(b.s.x[b.i] - x) < Math.abs(a.s.x[a.i] - x) ? b : a);
  const shown = first.s.x[first.i];
  const near = found.filter(f => Math.abs(f.s.x[f.i] - shown) <= 0.05 * (h.d.right - h.d.left));
  card.marks = element('g', {}, h.svg);
  element('line', {class: 'cross', x1: h.px(shown), x2: h.px(shown), y1: h.box.top, y2: h.box.bottom}, card.marks);
  const tip = card.tip = document.createElement('div');
  tip.className = 'tip';
  tip.append(showX[h.kind](shown));
  const table = tip.appendChild(document.createElement('table'));
  for (const {s, i} of near.slice(0, 16)) {
    const y = Math.max(h.box.top - 4, Math.min(h.box.bottom, h.py(s.line[i])));
    element('circle', {cx: h.px(s.x[i]), cy: y, r: 4, style: `fill:${color(s.run)};stroke:var(--card)`}, card.marks);
    const row = table.insertRow(), name = row.insertCell(), value = row.insertCell(), range = row.insertCell();
    const key = document.createElement('i');
    key.className = 'key';
    key.style.setProperty('--c', color(s.run));
    name.append(key, runs[s.run].name + (s.what || ''));
    value.textContent = real(s.line[i]);
    if (s.least && s.largest[i] > s.least[i]) range.textContent = real(s.least[i]) + ' to ' + real(s.largest[i]);
  }
  card.figure.append(tip);
  const room = card.figure.clientWidth, right = h.px(shown) + 22, left = h.px(shown) - tip.offsetWidth - 2;
  tip.style.left = Math.max(4, Math.min(right + tip.offsetWidth < room ? right : left, room - tip.offsetWidth - 4)) + 'px';
  tip.style.top = '40px';
}

function leave(card) {
  if (card.tip) card.tip.remove();
  if (card.marks) card.marks.remove();
  card.tip = card.marks = null;
}

// ---- the page
const place = document.getElementById('charts');
place.replaceChildren();
const cards = [];
for (const chart of charts) {
  if (!runs.some(r => { const s = chart.series(r); return s && known(s.mean).length; })) continue;
  const figure = place.appendChild(document.createElement('figure'));
  if (chart.wide) figure.className = 'wide';
  const caption = figure.appendChild(document.createElement('figcaption'));
  caption.append(chart.title);
  if (chart.unit) caption.appendChild(document.createElement('span')).textContent = chart.unit;
  const card = {chart, figure, holder: figure.appendChild(document.createElement('div')), hover: null};
  card.holder.addEventListener('pointermove', e => hover(card, e));
  card.holder.addEventListener('pointerdown', e => hover(card, e));
  card.holder.addEventListener('pointerleave', () => leave(card));
  cards.push(card);
}
const drawAll = () => { for (const c of cards) { leave(c); draw(c); } };
const controls = document.getElementById('controls');
controls.hidden = false;
for (const button of controls.querySelectorAll('[data-x]'))
  button.addEventListener('click', () => {
    state.x = button.dataset.x;
    for (const b of controls.querySelectorAll('[data-x]')) b.setAttribute('aria-pressed', b === button);
    drawAll();
  });
document.getElementById('smooth').addEventListener('input', e => { state.smooth = +e.target.value; drawAll(); });
document.getElementById('full').addEventListener('change', e => { state.full = e.target.checked; drawAll(); });
const legend = document.getElementById('legend');
if (runs.length > 1) runs.forEach((r, i) => {
  const button = legend.appendChild(document.createElement('button'));
  const key = button.appendChild(document.createElement('i'));
  key.className = 'key';
  key.style.setProperty('--c', color(i));
  button.append(r.name);
  button.title = r.name;
  button.setAttribute('aria-pressed', true);
  button.addEventListener('click', () => {
    if (!state.hidden.delete(i)) state.hidden.add(i);
    button.setAttribute('aria-pressed', !state.hidden.has(i));
    drawAll();
  });
});
let drawn = 0;
new ResizeObserver(() => { if (place.clientWidth !== drawn) { drawn = place.clientWidth; drawAll(); } }).observe(place);
drawn = place.clientWidth;
drawAll();
})();
)js";

}  // namespace hgrn
