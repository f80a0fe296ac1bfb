// Sliders of the latent dimensions, and of directions along labels.

import { setZ, showValue } from './picture.js';
import { element, state } from './state.js';

function makeSlider(text, settings, onInput) {
  const row = document.createElement('label');
  const slider = document.createElement('input');
  row.className = 'slider';
  Object.assign(slider, { type: 'range', step: 'any', ...settings });
  const value = document.createElement('output');
  value.ariaLive = 'off'; // The slider announces its value itself.
  row.append(text, slider, value);
  showValue(slider, settings.value);
  slider.addEventListener('input', () => {
    showValue(slider, slider.value);
    onInput(slider);
  });
  return row;
}

export function showDimensions(count = state.shown) {
  state.shown = count;
  const rows = state.run.dimensions.slice(0, count).map((dimension) => {
    const { index: j, low, high, band, carried } = dimension;
    const row = makeSlider(
      `z${j}`,
      { min: low, max: high, value: state.z[j] },
      (slider) => {
        state.z[j] = Number(slider.value);
        setZ(state.z);
      },
    );
    const slider = row.querySelector('input');
    slider.dataset.index = j;
    if (band) {
      const share = (value) => `${(100 * (value - low)) / (high - low)}%`;
      slider.classList.add('band');
      slider.style.setProperty('--from', share(band[0]));
      slider.style.setProperty('--to', share(band[1]));
      row.title = `${carried.toPrecision(3)} ${state.run.unit}`;
    }
    const reset = () => {
      state.z[j] = dimension.mean;
      setZ(state.z);
    };
    slider.addEventListener('dblclick', reset);
    slider.addEventListener('keydown', ({ key }) => {
      if (key === 'Delete' || key === 'Backspace') reset();
    });
    return row;
  });
  element('dimensions').replaceChildren(...rows);
  const rest = state.run.dimensions.length - rows.length;
  element('more').hidden = rest <= 0;
  element('more').textContent = `Show ${rest} more`;
  element('order').textContent = state.run.is_surveyed
    ? `Sorted by their ${state.run.unit === 'nats' ? 'KL' : 'variance'}; the ` +
      'band has 95 % of q(z). A double click, or Delete, resets one.'
    : 'In their order, until the images are encoded.';
}

export function showDirections() {
  const names = Object.keys(state.atlas?.directions ?? {});
  element('directions-part').hidden = !names.length;
  const rows = names.map((name) =>
    makeSlider(name, { min: -2, max: 2, value: 0 }, (slider) => {
      slider.origin ??= [...state.z];
      const way = state.atlas.directions[name];
      const moved = slider.origin.map((v, j) => v + slider.value * way[j]);
      setZ(moved, { slider });
    }),
  );
  element('directions').replaceChildren(...rows);
}
