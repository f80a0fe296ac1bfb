// The interpolation between two points.

import { latest, postImage } from './api.js';
import { drawImage } from './drawing.js';
import { decode, label } from './picture.js';
import { current, element, report, state } from './state.js';

const FRAMES = 24;
const STRIP = 9;

function between(a, b, t) {
  const linear = a.map((v, j) => (1 - t) * v + t * b[j]);
  if (element('path').value === 'linear') return linear;
  const length = (v) => Math.hypot(...v);
  const dot = a.reduce((sum, v, j) => sum + v * b[j], 0);
  const cosine = dot / (length(a) * length(b));
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
  if (!(Math.sin(angle) > 1e-6)) return linear;
  const radius = (1 - t) * length(a) + t * length(b);
  const [of_a, of_b] = [
    [1 - t, length(a)],
    [t, length(b)],
  ].map(
    ([share, of]) =>
      ((radius / of) * Math.sin(share * angle)) / Math.sin(angle),
  );
  return a.map((v, j) => of_a * v + of_b * b[j]);
}

export const walk = latest(async () => {
  if (!state.start || !state.end) return;
  state.frames = Array.from({ length: FRAMES }, (_, i) =>
    between(state.start, state.end, i / (FRAMES - 1)),
  );
  const asked = { z: state.frames, label: label() };
  state.strip = await current(postImage(`run/${state.index}/decode`, asked));
  const width = state.strip.width / FRAMES;
  const canvas = element('walk');
  canvas.width = STRIP * width;
  canvas.height = state.strip.height;
  const context = canvas.getContext('2d');
  for (let i = 0; i < STRIP; i++) {
    const frame = Math.round((i * (FRAMES - 1)) / (STRIP - 1));
    context.drawImage(
      state.strip,
      frame * width,
      0,
      width,
      state.strip.height,
      i * width,
      0,
      width,
      state.strip.height,
    );
  }
  canvas.hidden = false;
  element('play').disabled = element('gif').disabled = false;
  element('walk-note').textContent = '';
}, report);

export function setEnd(isStart) {
  if (isStart) state.start = [...state.z];
  else state.end = [...state.z];
  const missing = state.start ? 'end' : 'start';
  element('walk-note').textContent =
    state.start && state.end ? '' : `Now choose the ${missing}.`;
  walk();
}

/** Plays it there and back, or stops it. */
export async function play() {
  const number = state.playing ? 0 : performance.now();
  state.playing = number;
  element('play').textContent = number ? 'Stop' : 'Play';
  const wait = () => new Promise((done) => setTimeout(done, 60));
  for (let i = 0; number && number === state.playing; i++) {
    const round = i % (2 * FRAMES - 2);
    const frame = round < FRAMES ? round : 2 * FRAMES - 2 - round;
    const width = state.strip.width / FRAMES;
    drawImage(element('image'), state.strip, frame * width, width);
    await wait();
  }
  decode(); // What is shown is z again.
}
