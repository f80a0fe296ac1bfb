// The training images in a plane of the latent space.

import { latest, postJson } from './api.js';
import * as drawing from './drawing.js';
import { setZ } from './picture.js';
import { current, element, on, report, state } from './state.js';

const map = new drawing.Plot(element('map'));

export function pointColors() {
  const name = element('color').value;
  const legend = element('legend');
  legend.replaceChildren();
  if (!name) return null;
  const { values, names } = state.atlas.labels[name];
  names.slice(0, drawing.COLORS.length).forEach((text, i) => {
    const entry = document.createElement('span');
    const dot = document.createElement('i');
    dot.style.background = drawing.COLORS[i];
    entry.append(dot, text);
    legend.append(entry);
  });
  if (names.length > drawing.COLORS.length) {
    legend.append(`grey: ${names.length - drawing.COLORS.length} others`);
  }
  return values.map((value) => drawing.COLORS[value] ?? '#9aa0a8');
}

export function redrawMap() {
  if (!state.atlas) return;
  const holes = element('holes').checked ? state.atlas.holes : null;
  const { points } = state.atlas;
  drawing.drawMap(map, { ...state, points, holes });
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

export function showMap() {
  element('near-heading').hidden = false;
  const options = Object.keys(state.atlas.labels).map(
    (name) => new Option(name),
  );
  const before = element('map').hidden ? null : element('color').value;
  element('map').hidden = element('map-controls').hidden = false;
  element('color').replaceChildren(new Option('none', ''), ...options);
  // At first the label that is read most easily.
  const count = (name) => state.atlas.labels[name].names.length;
  const names = options.map(({ value }) => value);
  names.sort((a, b) => count(a) - count(b));
  element('color').value = before ?? names[0] ?? '';
  state.colors = pointColors();
  const size = state.run.dimensions.length;
  const shown =
    size === 2
      ? 'The latent space itself'
      : 'The first two principal components, ' +
        `${percent(state.atlas.variance)} of the variance`;
  const { holes, points, num_images: count_all } = state.atlas;
  const shownImages = points.length.toLocaleString('en');
  const images =
    points.length < count_all
      ? `${shownImages} of ${count_all.toLocaleString('en')} images, ` +
        'evenly spread'
      : `${shownImages} images`;
  element('map-note').textContent =
    `${shown}; the means of ${images}. Click to decode a point, or the mean ` +
    'of an image. ' +
    (holes
      ? `${percent(holes.share)} of the prior's draws fall in holes of q(z) ` +
        'in this plane (red; grey: the prior).'
      : 'No map of holes: this prior takes too long to sample.');
  element('holes-label').hidden = !holes;
  map.fit([...points, ...(holes ? [holes.low, holes.high] : [])], 0.01);
  redrawMap();
}

/** Goes to a place of the map, or to an image there. */
const goTo = latest(async (at, within) => {
  const found = map.nearest(state.atlas.points, at, within);
  const answer =
    found >= 0
      ? postJson(`run/${state.index}/code`, { indices: [found] })
      : postJson(`run/${state.index}/lift`, { xy: [at] });
  setZ((await current(answer)).z);
}, report);

// A vertical swipe scrolls the page. A finger moves z by a tap, or by a drag
// that begins sideways.
let finger = null; // The place of a touch, until it is a drag.

on('map', 'pointerdown', (event) => {
  element('map').setPointerCapture(event.pointerId);
  const at = map.fromEvent(event);
  finger = event.pointerType === 'mouse' ? null : [event.x, event.y];
  if (element('lasso').checked) state.lasso = [at];
  else if (!finger) goTo(at, 6);
});
element('map').addEventListener('click', (event) => {
  if (element('lasso').checked || !finger) return;
  goTo(map.fromEvent(event), 6);
});
element('map').addEventListener('pointermove', (event) => {
  if (!(event.buttons & 1)) return;
  if (element('lasso').checked && state.lasso) {
    state.lasso.push(map.fromEvent(event));
    redrawMap();
  } else if (!element('lasso').checked) {
    if (finger) {
      const aside = Math.abs(event.x - finger[0]);
      if (aside < Math.abs(event.y - finger[1]) + 8) return;
    }
    finger = null;
    goTo(map.fromEvent(event), 0);
  }
});
on('map', 'pointerup', async () => {
  if (!element('lasso').checked || !state.lasso) return;
  const inside = state.atlas.points
    .map((point, i) => (drawing.isInside(point, state.lasso) ? i : -1))
    .filter((i) => i >= 0);
  state.chosen = inside.length ? new Set(inside) : null;
  state.lasso = inside.length ? state.lasso : null;
  redrawMap();
  if (!inside.length) {
    element('status').textContent = 'No image is in the lasso.';
    return;
  }
  const asked = { indices: inside };
  setZ((await current(postJson(`run/${state.index}/code`, asked))).z);
  const count = inside.length.toLocaleString('en');
  element('status').textContent =
    `${count} images in the lasso; their mean is decoded.`;
});
on('map', 'keydown', (event) => {
  const moves = {
    ArrowLeft: [-1, 0],
    ArrowRight: [1, 0],
    ArrowUp: [0, 1],
    ArrowDown: [0, -1],
  };
  const move = moves[event.key];
  if (!move || !state.place) return;
  event.preventDefault();
  const at = state.place.map(
    (value, axis) =>
      value + (move[axis] * (map.high[axis] - map.low[axis])) / 50,
  );
  state.place = at;
  goTo(at, 0);
});
