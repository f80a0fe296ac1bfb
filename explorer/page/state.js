// What the parts of the page share.

export const state = {
  runs: [],
  sweep: null,
  index: 0, // Index of the run.
  opened: 0, // Counts the runs that were opened.
  beside: -1, // Index of the run beside it, or -1.
  run: null, // Its description.
  besideRun: null,
  besideZ: null, // Its point, if it is not z.
  atlas: null, // Where its images lie, once they are encoded.
  shown: 16, // Dimensions with a slider.
  z: [], // The point, [latent_dim].
  place: null, // z in the plane.
  colors: null, // Of the images.
  lasso: null, // Its corners in the plane.
  chosen: null, // Indices of the images in it.
  start: null, // Of the interpolation.
  end: null,
  frames: [], // Its latents.
  strip: null, // Its images, side by side.
  playing: 0, // The time at which it began to play, or 0.
};

export const element = (id) => document.getElementById(id);

class Outdated extends Error {}

/** Resolves to an answer, unless another run was opened in the meantime. */
export async function current(promise) {
  const asked = state.opened;
  const answer = await promise;
  if (asked !== state.opened) throw new Outdated();
  return answer;
}

/** Shows an error in the status line. */
export function report(error) {
  if (error instanceof Outdated) return;
  element('status').textContent = `Error: ${error.message}`;
}

/** Runs an action of the user; its error becomes the status line. */
export function act(action) {
  return async (...args) => {
    element('status').textContent = '';
    try {
      await action(...args);
    } catch (error) {
      report(error);
    }
  };
}

/** Runs an action at each event of a type. */
export const on = (id, type, action) =>
  element(id).addEventListener(type, act(action));
