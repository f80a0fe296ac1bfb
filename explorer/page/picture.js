// The image of z, its nearest training images, and downloads.

import { latest, post, postImage, postJson } from './api.js';
import { drawImage, drawPixels } from './drawing.js';
import { redrawMap } from './map.js';
import { act, current, element, report, state } from './state.js';

const NEAR = 8;

export function label() {
  return Number(element('class').value || 0);
}

/** The chosen class, or the last one of a run that has fewer. */
function labelOf(run) {
  return Math.min(label(), Math.max(run.num_classes - 1, 0));
}

export const decode = latest(async () => {
  const began = performance.now();
  const asked = { z: [state.z], label: label() };
  const image = await current(postImage(`run/${state.index}/decode`, asked));
  drawImage(element('image'), image);
  const milliseconds = Math.round(performance.now() - began);
  element('timing').textContent = `Decoded in ${milliseconds} ms.`;
  const { beside, besideRun, besideZ } = state;
  if (!besideRun) return;
  const count = besideRun.dimensions.length;
  if (!besideZ && count !== state.z.length) {
    element('caption-beside').textContent =
      `${besideRun.name} has ${count} dimensions, so not this z; encode an ` +
      'image to compare.';
    return;
  }
  const other = await current(
    postImage(`run/${beside}/decode`, {
      z: [besideZ ?? state.z],
      label: labelOf(besideRun),
    }),
  );
  if (beside !== state.beside) return;
  drawImage(element('image-beside'), other);
  element('caption-beside').textContent = besideZ
    ? `${besideRun.name}, its own reconstruction`
    : `${besideRun.name}, the same z`;
}, report);

export const locate = latest(async () => {
  if (!state.atlas) return;
  const asked = { z: [state.z], count: NEAR };
  const near = await current(postJson(`run/${state.index}/near`, asked));
  state.place = near.point;
  redrawMap();
  await showStrip(near);
}, report);

/** Shows training images as buttons that go to their means. */
async function showStrip({ indices, positions, distances }) {
  const bitmap = await current(
    postImage(`run/${state.index}/image`, { indices }),
  );
  const width = bitmap.width / indices.length;
  const buttons = indices.map((index, i) => {
    const button = document.createElement('button');
    const canvas = document.createElement('canvas');
    drawImage(canvas, bitmap, i * width, width);
    button.append(canvas);
    const far = distances[i].toFixed(2);
    button.title = `training image ${positions[i]}, at distance ${far}`;
    button.ariaLabel = `Go to ${button.title}`;
    button.addEventListener(
      'click',
      act(async () => {
        const asked = { indices: [index] };
        setZ((await current(postJson(`run/${state.index}/code`, asked))).z);
      }),
    );
    return button;
  });
  element('near').replaceChildren(...buttons);
}

/** Goes to a point; the slider of a direction that moved there stays. */
export function setZ(values, { slider: moved, besideZ = null } = {}) {
  state.playing = 0;
  element('play').textContent = 'Play';
  state.z = Array.from(values, Number);
  state.besideZ = besideZ;
  element('original').hidden = true; // `encode` shows it again.
  for (const slider of document.querySelectorAll('#dimensions input')) {
    showValue(slider, state.z[slider.dataset.index]);
  }
  for (const slider of document.querySelectorAll('#directions input')) {
    if (slider === moved) continue;
    delete slider.origin;
    showValue(slider, 0);
  }
  decode();
  locate();
}

export function showValue(slider, value) {
  slider.value = value;
  slider.nextElementSibling.textContent = Number(value).toFixed(2);
}

export function download(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function quoted(text) {
  if (/^[\w@%+=:,./-]+$/.test(text)) return text;
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

export function command() {
  const values = state.z.map((v) => Number(v.toFixed(5))).join(',');
  const given = state.run.num_classes ? ` --class=${label()}` : '';
  return (
    `python generate.py decode --workdir=${quoted(state.run.workdir)} ` +
    `--checkpoint=${state.run.step} --z=${values}${given}`
  );
}

/** Encodes a file, by both runs. */
export const encode = act(async (file) => {
  element('status').textContent = 'Encoding …';
  const encoded = async (index, run) => {
    const path = `run/${index}/encode?label=${labelOf(run)}`;
    return (await current(post(path, file))).json();
  };
  const found = await encoded(state.index, state.run);
  const other = state.besideRun
    ? await encoded(state.beside, state.besideRun)
    : null;
  drawPixels(element('input'), found.image);
  const nats = found.kl?.reduce((a, b) => a + b).toFixed(1);
  const kl = nats ? ` KL ${nats} nats.` : '';
  element('caption-input').textContent =
    `${file.name || 'image'}: ${found.change || 'as it is.'}${kl}`;
  setZ(found.mean, { besideZ: other?.mean });
  element('original').hidden = false;
  element('status').textContent = '';
});
