// The report's style sheet. Colours of runs are --c0 .. --c7, told apart on both grounds.
#include "report/html.h"

namespace hgrn {

const char* const kPageStyle = R"css(
:root { color-scheme: light dark;
  --ground: #f6f7f8; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --edge: #d9dee3; --grid: #eaedf0;
  --c0: #1f6feb; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #0e7490; --c5: #be185d; --c6: #8a6100; --c7: #475569;
  --bad: #d1242f; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #0f1317; --card: #171c21; --ink: #e7ebef; --soft: #98a3ae; --edge: #2d353d; --grid: #232a31;
  --c0: #6cb0ff; --c1: #ff9b5e; --c2: #5ad17f; --c3: #c79bff; --c4: #4fd0e0; --c5: #ff8ab8; --c6: #e3b341; --c7: #a9b4c0;
  --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 16px 0 6px; }
.note { color: var(--soft); font-size: 13px; margin: 6px 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 7px 12px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--grid); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom: 1px solid var(--edge); }
tbody th, table.texts th[scope=row] { font-weight: 500; position: sticky; left: 0; background: var(--card); }
table.numbers td, table.numbers thead th:not(:first-child) { text-align: right; }
table.texts td { white-space: normal; overflow-wrap: anywhere; min-width: 8em; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
td.best { font-weight: 700; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; background: var(--c, var(--soft)); }
#controls { position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center;
  padding: 10px 0; background: var(--ground); font-size: 14px; }
#controls[hidden] { display: none; }
#controls label { display: inline-flex; align-items: center; gap: 7px; color: var(--soft); }
#controls input[type=range] { width: 110px; accent-color: var(--c0); }
.choice { display: inline-flex; border: 1px solid var(--edge); border-radius: 7px; overflow: hidden; }
.choice button { border: 0; border-left: 1px solid var(--edge); background: var(--card); color: var(--ink); font: inherit; padding: 4px 12px; cursor: pointer; }
.choice button:first-child { border-left: 0; }
.choice button[aria-pressed=true] { background: var(--c0); color: var(--card); }
#legend { display: flex; flex-wrap: wrap; gap: 6px; max-height: 84px; overflow-y: auto; }
#legend button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--edge); border-radius: 14px; padding: 2px 11px 2px 9px; cursor: pointer; max-width: 260px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#legend button[aria-pressed=false] { opacity: .45; text-decoration: line-through; }
#charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
figure { position: relative; margin: 0; padding: 12px 12px 6px; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; font-size: 14px; margin: 0 2px 4px; }
figcaption span { font-weight: 400; color: var(--soft); font-size: 13px; margin-left: 6px; }
svg { display: block; width: 100%; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--edge); }
svg .cross { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .bad { stroke: var(--bad); stroke-width: 1.5; }
.tip { position: absolute; pointer-events: none; z-index: 2; background: var(--card); border: 1px solid var(--edge); border-radius: 7px;
  box-shadow: 0 4px 14px rgb(0 0 0 / .18); padding: 7px 10px; font-size: 13px; font-variant-numeric: tabular-nums; max-width: 92%; }
.tip table { font-size: 13px; width: auto; }
.tip td { padding: 1px 0 1px 8px; border: 0; }
.tip td:first-child { padding-left: 0; max-width: 180px; overflow: hidden; text-overflow: ellipsis; }
.tip td + td { text-align: right; }
details { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; margin: 6px 0; }
details .scroll { border: 0; border-radius: 0 0 8px 8px; }
summary { cursor: pointer; padding: 7px 12px; font-size: 14px; }
pre { margin: 0; padding: 4px 14px 12px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
ul { padding-left: 20px; font-size: 14px; }
main { padding-bottom: 60px; }
button:focus-visible, input:focus-visible, summary:focus-visible { outline: 2px solid var(--c0); outline-offset: 1px; }
@media (max-width: 600px) {
  header, main { padding-left: 12px; padding-right: 12px; }
  h1 { font-size: 22px; }
  th, td { padding: 6px 9px; }
  #controls { position: static; }
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 30vw; max-width: 46vw; }
  figure { padding: 10px 6px 4px; }
}
@media print { #controls { position: static; } figure, tr { break-inside: avoid; } }
)css";

}  // namespace hgrn
