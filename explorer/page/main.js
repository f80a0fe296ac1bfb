// The page: opens runs, follows them, and connects the controls.

import { get, post, postJson } from './api.js';
import { drawSweep, Plot } from './drawing.js';
import { pointColors, redrawMap, showMap } from './map.js';
import {
  command,
  decode,
  download,
  encode,
  label,
  locate,
  setZ,
  showValue,
} from './picture.js';
import { showDimensions, showDirections } from './sliders.js';
import { act, current, element, on, state } from './state.js';
import { play, setEnd, walk } from './walk.js';

const POLL_MILLISECONDS = 2000;

const curve = new Plot(element('curve'));

async function open(which) {
  element('status').textContent = 'Opening …';
  state.opened += 1;
  try {
    state.run = await current(get(`run/${which}`));
  } finally {
    element('status').textContent = '';
    element('run').value = state.index;
  }
  state.index = which;
  state.atlas = null;
  state.place = state.chosen = state.lasso = state.start = state.end = null;
  element('run').value = which;
  element('map').hidden = element('map-controls').hidden = true;
  element('near-heading').hidden = element('walk').hidden = true;
  element('near').replaceChildren();
  element('play').disabled = element('gif').disabled = true;
  element('temperature-label').hidden = !state.run.has_temperature;
  element('class-label').hidden = !state.run.num_classes;
  const classes = Array.from(
    { length: state.run.num_classes },
    (_, i) => new Option(i),
  );
  element('class').replaceChildren(...classes);
  state.z = meanZ();
  showFacts();
  showDimensions();
  showDirections();
  setZ(state.z);
  if (state.sweep) drawSweepCurve();
  if (state.run.is_surveyed) await openAtlas();
}

/** The mean of the prior. */
function meanZ() {
  const z = [];
  for (const { index: j, mean } of state.run.dimensions) z[j] = mean;
  return z;
}

async function openAtlas() {
  state.atlas = await current(get(`run/${state.index}/atlas`));
  showDimensions();
  showDirections();
  showMap();
  locate();
}

function showFacts() {
  const [height, width, channels] = state.run.image_shape;
  element('caption').textContent = state.run.name;
  element('facts').textContent =
    `step ${state.run.step.toLocaleString('en')}, ` +
    `${height}×${width}×${channels}, ` +
    `latents ${state.run.latent_shape.join('×')}, prior ` +
    `${state.run.has_temperature ? 'N(0, I)' : state.run.prior}`;
  element('problem').hidden = !state.run.problem;
  element('problem').textContent = state.run.problem;
}

/** Follows a run that is still training, and its images being encoded. */
async function poll() {
  try {
    const { opened, index } = state;
    const found = await get(`run/${index}`);
    if (opened === state.opened && index === state.index) {
      const isNewer = found.step !== state.run.step;
      state.run = found;
      showFacts();
      if (isNewer) decode();
      if (found.is_surveyed && state.atlas?.step !== found.step) {
        await openAtlas();
      }
    }
  } catch (error) {
    element('problem').hidden = !error.message;
    element('problem').textContent = error.message;
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

/** Rate and distortion of the points; null where they are not measured. */
function sweepPlaces() {
  return state.sweep.points.map(({ rate, distortion }) =>
    rate === null || distortion === null ? null : [rate, distortion],
  );
}

function drawSweepCurve() {
  curve.fit(sweepPlaces().filter(Boolean), 0.12);
  drawSweep(curve, state.sweep.points, state.index);
}

function redraw() {
  redrawMap();
  if (state.sweep) drawSweepCurve();
}

// Controls.

on('random', 'click', async () => {
  const seed = Math.floor(Math.random() * 2 ** 32);
  const temperature = Number(element('temperature').value);
  const asked = state.run.has_temperature ? { seed, temperature } : { seed };
  setZ((await current(postJson(`run/${state.index}/sample`, asked))).z);
});
on('mean', 'click', () => setZ(meanZ()));
on('temperature', 'input', ({ target }) => showValue(target, target.value));
on('class', 'change', () => {
  decode();
  walk();
});
on('more', 'click', () => showDimensions(Infinity));
on('color', 'change', () => {
  state.colors = pointColors();
  redrawMap();
});
on('holes', 'change', redrawMap);
on('lasso', 'change', () => {
  state.lasso = state.chosen = null;
  redrawMap();
});
on('from', 'click', () => setEnd(true));
on('to', 'click', () => setEnd(false));
on('path', 'change', walk);
on('play', 'click', play);
on('gif', 'click', async () => {
  const answer = await post(`run/${state.index}/animate`, {
    z: state.frames,
    label: label(),
  });
  download(await answer.blob(), 'interpolation.gif');
});
on('save', 'click', () => {
  element('image').toBlob((blob) => download(blob, 'image.png'));
});
on('command', 'click', async () => {
  // Without a clipboard, as on another address, the line can be selected.
  element('line').value = command();
  element('line').hidden = false;
  element('line').select();
  try {
    await navigator.clipboard.writeText(element('line').value);
    element('status').textContent = 'Copied.';
  } catch {
    element('status').textContent = 'Copy the line below.';
  }
});
on('file', 'change', ({ target }) => {
  if (target.files.length) encode(target.files[0]);
  target.value = '';
});
document.addEventListener('dragover', (event) => event.preventDefault());
document.addEventListener('drop', (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) encode(event.dataTransfer.files[0]);
});
on('run', 'change', ({ target }) => open(Number(target.value)));
on('beside', 'change', async ({ target }) => {
  const chosen = target.value === '' ? -1 : Number(target.value);
  target.value = state.beside < 0 ? '' : state.beside;
  const found = chosen < 0 ? null : await get(`run/${chosen}`);
  Object.assign(state, { beside: chosen, besideRun: found, besideZ: null });
  target.value = chosen < 0 ? '' : chosen;
  element('second').hidden = chosen < 0;
  decode();
});
on('curve', 'click', async (event) => {
  const found = curve.nearest(sweepPlaces(), curve.fromEvent(event), 24);
  if (found >= 0) await open(found);
});
on('curve', 'keydown', async (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = state.index + (step ?? 0);
  if (step && next >= 0 && next < state.runs.length) await open(next);
});
document.addEventListener('keydown', (event) => {
  // Space presses the button or box that has the focus; sliders take no letter.
  const text = 'select, input:not([type=range], [type=checkbox])';
  const own = event.key === ' ' ? `${text}, input, button` : text;
  if (event.target.closest(own)) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const id = { r: 'random', 0: 'mean', a: 'from', b: 'to', ' ': 'play' }[
    event.key
  ];
  if (!id || element(id).disabled) return;
  event.preventDefault();
  element(id).click();
});
window.addEventListener('resize', redraw);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);

await act(async () => {
  Object.assign(state, await get('runs'));
  const short = state.runs.map((name) =>
    name.split('/').filter(Boolean).at(-1),
  );
  element('run').replaceChildren(...short.map((n, i) => new Option(n, i)));
  element('beside').append(...short.map((n, i) => new Option(n, i)));
  element('beside-label').hidden = state.runs.length < 2;
  element('sweep').hidden = !state.sweep;
  await open(0);
  poll();
})();
