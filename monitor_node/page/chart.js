// The loss chart: training faint, held-out strong, forecast dashed, jumps as triangles, phases below.

import { whole } from "./words.js";

const PAD = { left: 52, right: 12, top: 10, strip: 12, bottom: 34 };

function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

// The same between two powers of ten: few enough to read, or plain ones where the range is narrow.
function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const digit of high - low > 2 ? [1] : [1, 1.5, 2, 3, 4, 5, 7]) ticks.push(power + Math.log10(digit));
  const seen = ticks.filter((tick) => tick >= low && tick <= high);
  return seen.length >= 3 ? seen : niceTicks(low, high, 5);
}

// Where a (step, loss) lies on the canvas.
function makeScale(width, height, state, isLog) {
  const { train, held_out, forecast } = state.series;
  const points = [...train, ...held_out, ...forecast];
  const view = (loss) => (isLog ? Math.log10(Math.max(loss, 1e-9)) : loss);
  const lastStep = Math.max(10, ...points.map((p) => p[0]), state.progress ? state.progress.step : 0);
  let low = Math.min(...points.map((p) => view(p[1])));
  let high = Math.max(...points.map((p) => view(p[1])));
  if (!points.length) [low, high] = [0, 1];
  const margin = 0.04 * (high - low) || 0.05;
  [low, high] = [low - margin, high + margin];
  const bottom = height - PAD.bottom - PAD.strip;
  return {
    low, high, lastStep, bottom, isLog, view,
    x: (step) => PAD.left + (step / lastStep) * (width - PAD.left - PAD.right),
    y: (loss) => bottom - ((view(loss) - low) / (high - low)) * (bottom - PAD.top),
  };
}

function drawLine(pen, scale, points, color, lineWidth, dash = []) {
  pen.strokeStyle = color;
  pen.lineWidth = lineWidth;
  pen.setLineDash(dash);
  pen.beginPath();
  points.forEach((p, index) => pen[index ? "lineTo" : "moveTo"](scale.x(p[0]), scale.y(p[1])));
  pen.stroke();
  pen.setLineDash([]);
}

function drawAxes(pen, scale, width, color) {
  pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const ticks = scale.isLog ? logTicks(scale.low, scale.high) : niceTicks(scale.low, scale.high, 5);
  for (const tick of ticks) {
    const loss = scale.isLog ? 10 ** tick : tick;
    const y = Math.round(scale.y(loss)) + 0.5;
    pen.strokeStyle = color("--rule");
    pen.beginPath();
    pen.moveTo(PAD.left, y);
    pen.lineTo(width - PAD.right, y);
    pen.stroke();
    pen.fillStyle = color("--soft");
    pen.fillText(String(Number(loss.toPrecision(3))), PAD.left - 8, y);
  }
  pen.textAlign = "center";
  for (const tick of niceTicks(0, scale.lastStep, width < 500 ? 4 : 8))
    pen.fillText(whole(tick), Math.min(scale.x(tick), width - 18), scale.bottom + PAD.strip + 18);
}

// Kept jumps point up from below, undone ones down from above.
function drawJumps(pen, scale, jumps, color) {
  for (const [step, verdict] of jumps) {
    if (!["accepted", "refused", "ruined", "aborted"].includes(verdict)) continue; // never applied
    const kept = verdict === "accepted";
    const x = scale.x(step);
    const base = kept ? scale.bottom : PAD.top;
    pen.fillStyle = color(kept ? "--kept" : "--undone");
    pen.beginPath();
    pen.moveTo(x - 4.5, base);
    pen.lineTo(x + 4.5, base);
    pen.lineTo(x, kept ? base - 9 : base + 9);
    pen.fill();
  }
}

function drawPhases(pen, scale, phases, color) {
  for (const [first, last, phase] of phases) {
    const x = scale.x(Math.max(0, first - 1));
    pen.fillStyle = color("--" + phase);
    pen.fillRect(x, scale.bottom + 1, Math.max(1, scale.x(Math.min(last, scale.lastStep)) - x), PAD.strip - 3);
  }
}

// Draws everything anew; returns a line about losses that are not numbers.
export function drawChart(canvas, state, isLog) {
  const pen = canvas.getContext("2d");
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name);
  const { train, held_out, forecast, jumps, phases } = state.series;
  const scale = makeScale(width, height, state, isLog);
  drawAxes(pen, scale, width, color);
  drawPhases(pen, scale, phases, color);
  drawLine(pen, scale, train, color("--train"), 1);
  drawLine(pen, scale, forecast, color("--forecast"), 1.5, [4, 4]);
  drawLine(pen, scale, held_out, color("--held-out"), 2.5);
  drawJumps(pen, scale, jumps, color);
  const marks = state.marks ? [...state.marks.train, ...state.marks.held_out] : [];
  const last = marks.slice(-5).map(([step, marker]) => `${marker} at step ${whole(step)}`);
  return last.length ? `Losses that are not numbers: ${last.join(", ")}` : "";
}
