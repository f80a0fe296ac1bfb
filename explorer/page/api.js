// Requests to the server. Everything is named by numbers.

const token = new URLSearchParams(location.search).get('token') ?? '';

/** Sends a request; throws an Error with the server's line if it is refused. */
async function send(path, options = {}) {
  let answer;
  try {
    answer = await fetch(`api/${path}`, {
      ...options,
      headers: { 'X-Token': token },
    });
  } catch {
    throw new Error('The server does not answer; it was stopped, perhaps.');
  }
  if (!answer.ok) {
    const content = await answer.json().catch(() => ({}));
    throw new Error(content.error ?? `The server answered ${answer.status}.`);
  }
  return answer;
}

export async function get(path) {
  return (await send(path)).json();
}

/** Posts JSON, or a file as it is; resolves to the answer. */
export function post(path, content) {
  const body = content instanceof Blob ? content : JSON.stringify(content);
  return send(path, { method: 'POST', body });
}

export async function postJson(path, content) {
  return (await post(path, content)).json();
}

/** Posts JSON, for images side by side. */
export async function postImage(path, content) {
  return createImageBitmap(await (await post(path, content)).blob());
}

/**
 * A function that runs one call at a time: while one runs, of the calls that
 * come only the last is kept. Errors go to `onError`.
 */
export function latest(action, onError) {
  let isBusy = false;
  let next = null;
  return async (...args) => {
    next = args;
    if (isBusy) return;
    isBusy = true;
    while (next) {
      const current = next;
      next = null;
      try {
        await action(...current);
      } catch (error) {
        onError(error);
      }
    }
    isBusy = false;
  };
}
