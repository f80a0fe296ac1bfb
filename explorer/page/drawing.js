// Canvases: images, points in a plane, and the points of a sweep.

export const COLORS = (
  '#4c78c8 #e07b39 #3a9a5b #c94f4f #8a63c7 ' +
  '#93684f #d571b4 #7b8494 #a8a32e #2ba3b5'
).split(' ');

/** Shows a bitmap, or a part of it `width` pixels wide from `left`. */
export function drawImage(canvas, bitmap, left = 0, width = bitmap.width) {
  canvas.width = width;
  canvas.height = bitmap.height;
  canvas.getContext('2d').drawImage(bitmap, -left, 0);
}

/** Shows pixels [height][width][channels], from 0 to 255. */
export function drawPixels(canvas, rows) {
  const [height, width] = [rows.length, rows[0].length];
  const image = new ImageData(width, height);
  rows.flat().forEach((pixel, i) => {
    const [red, green, blue] =
      pixel.length === 1 ? [pixel[0], pixel[0], pixel[0]] : pixel;
    image.data.set([red, green, blue, 255], 4 * i);
  });
  canvas.width = width;
  canvas.height = height;
  canvas.getContext('2d').putImageData(image, 0, 0);
}

/** The computed colour of a custom property, for a canvas. */
function color(name) {
  const probe = document.createElement('span');
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** A plane of points: from coordinates to pixels of a canvas, and back. */
export class Plot {
  constructor(canvas) {
    this.canvas = canvas;
    this.low = [0, 0];
    this.high = [1, 1];
  }

  /** Fits the axes to points [n][2], with a margin. */
  fit(points, margin) {
    for (const axis of [0, 1]) {
      const values = points.map((point) => point[axis]);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const extra = margin * (high - low) || 1;
      this.low[axis] = low - extra;
      this.high[axis] = high + extra;
    }
  }

  /** Clears the canvas, in pixels of the screen. */
  begin() {
    const { canvas } = this;
    const scale = window.devicePixelRatio || 1;
    const { width, height } = canvas.getBoundingClientRect();
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    Object.assign(this, { width, height, context });
    return context;
  }

  toPixels([x, y]) {
    const [right, up] = [0, 1].map(
      (axis) =>
        ([x, y][axis] - this.low[axis]) / (this.high[axis] - this.low[axis]),
    );
    return [right * this.width, (1 - up) * this.height];
  }

  /** Coordinates of an event's place. */
  fromEvent(event) {
    const box = this.canvas.getBoundingClientRect();
    const right = (event.clientX - box.left) / box.width;
    const up = 1 - (event.clientY - box.top) / box.height;
    return [right, up].map(
      (share, axis) =>
        this.low[axis] + share * (this.high[axis] - this.low[axis]),
    );
  }

  /** Index of the point nearest to a place, if within some pixels, or -1. */
  nearest(points, place, within) {
    const [x, y] = this.toPixels(place);
    let best = within ** 2;
    let found = -1;
    points.forEach((point, index) => {
      if (!point) return;
      const [px, py] = this.toPixels(point);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance <= best) {
        best = distance;
        found = index;
      }
    });
    return found;
  }
}

/** Draws the training images' points, the holes, a lasso and the place of z. */
export function drawMap(plot, { points, colors, holes, lasso, chosen, place }) {
  const context = plot.begin();
  if (holes) drawHoles(plot, context, holes);
  const size = points.length > 3000 ? 2 : 3;
  points.forEach((point, index) => {
    const [x, y] = plot.toPixels(point);
    context.fillStyle = colors?.[index] ?? COLORS[0];
    context.globalAlpha = chosen && !chosen.has(index) ? 0.15 : 0.75;
    context.fillRect(x - size / 2, y - size / 2, size, size);
  });
  context.globalAlpha = 1;
  context.strokeStyle = color('--ink');
  if (lasso?.length) {
    context.beginPath();
    for (const corner of lasso) context.lineTo(...plot.toPixels(corner));
    context.closePath();
    context.stroke();
  }
  if (place) {
    const [x, y] = plot.toPixels(place);
    context.lineWidth = 2;
    context.beginPath();
    context.arc(x, y, 7, 0, 2 * Math.PI);
    context.moveTo(x - 12, y);
    context.lineTo(x + 12, y);
    context.moveTo(x, y - 12);
    context.lineTo(x, y + 12);
    context.stroke();
  }
}

function drawHoles(plot, context, { low, high, prior, holes }) {
  const cells = prior.length;
  const step = [0, 1].map((axis) => (high[axis] - low[axis]) / cells);
  const [ink, warn] = [color('--ink'), color('--warn')];
  for (let row = 0; row < cells; row++) {
    for (let column = 0; column < cells; column++) {
      const from = [low[0] + column * step[0], low[1] + row * step[1]];
      const [x, y] = plot.toPixels(from);
      const [right, top] = plot.toPixels([
        from[0] + step[0],
        from[1] + step[1],
      ]);
      const isHole = holes[row][column];
      context.fillStyle = isHole ? warn : ink;
      context.globalAlpha = isHole ? 0.3 : 0.16 * prior[row][column];
      context.fillRect(x, top, right - x + 0.5, y - top + 0.5);
    }
  }
}

/** Draws rate and distortion of a sweep's points, and the chosen one's name. */
export function drawSweep(plot, points, chosen) {
  const context = plot.begin();
  context.font = '12px system-ui, sans-serif';
  context.fillStyle = color('--faint');
  context.fillText('distortion, nats per image', 8, 16);
  const label = 'rate, nats per image';
  context.textAlign = 'right';
  context.fillText(label, plot.width - 8, plot.height - 8);
  context.textAlign = 'left';
  points.forEach(({ rate, distortion, name }, index) => {
    if (rate === null || distortion === null) return;
    const [x, y] = plot.toPixels([rate, distortion]);
    context.fillStyle = COLORS[index === chosen ? 1 : 0];
    context.beginPath();
    context.arc(x, y, index === chosen ? 7 : 5, 0, 2 * Math.PI);
    context.fill();
    if (index === chosen) {
      context.fillStyle = color('--ink');
      context.textAlign = x > plot.width / 2 ? 'right' : 'left';
      context.fillText(name, x + (x > plot.width / 2 ? -12 : 12), y - 10);
      context.textAlign = 'left';
    }
  });
}

/** Whether a point lies in a polygon [n][2]. */
export function isInside([x, y], polygon) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[xi, yi], [xj, yj]] = [polygon[i], polygon[j]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) {
      inside = !inside;
    }
  }
  return inside;
}
