"""A worker of a sweep: takes points, trains and measures them."""

import contextlib
import dataclasses
import itertools
import math
import re
import time

from etils import epath
import jax
import ml_collections
import numpy as np

from evaluation import measure, posterior
from evaluation.measure import Metric
import input_pipeline
from runs import metric_writer, progress, workdirs
from runs.processes import StopSignals
from sweeps import POINTS, points, report
from sweeps.points import Results
from sweeps.study import NO_ANSWER, one_line, Point, Study
import train
from vae import conditioning, distributions, figures, loading, splits
from vae.checkpoints import Checkpoints
from vae.errors import UserError, WriteError

_SECONDS_BETWEEN_POLLS, _SECONDS_BETWEEN_TRIES = 2.0, 60.0
# The page takes seconds; the table is written after each group of points.
_SECONDS_BETWEEN_PAGES = 300.0
_NUM_IMAGES = 8  # In each picture of a point.

_data: dict[str, splits.DataSet] = {}


def load_data(config: ml_collections.ConfigDict) -> splits.DataSet:
  """The data of a config; the last is kept for points that share it."""
  key = str(config.data)
  if key not in _data:
    _data.clear()  # Frees the memory before more is loaded.
    _data[key] = input_pipeline.load(config)
  return _data[key]


@dataclasses.dataclass
class Worker:
  """Works on a sweep in `folder`; points are measured on `split`."""

  folder: epath.Path
  study: Study
  split: str
  settings: measure.Settings
  stop: StopSignals

  def __post_init__(self):  # Padding to the largest shares programs.
    dims = self.study.axes.get(points.LATENT_DIM)
    if isinstance(dims, points.Range):
      dims = [dims.high]
    self._latent_dim = max(dims or [self.study.base.model.get('latent_dim', 0)])

  def run(self) -> Results:
    """Trains and measures open points until no worker has any.

    Raises WriteError if the disk or the storage does not take what is written.
    """
    waited_for, last_page = 0, time.monotonic()
    try:
      while True:
        self.stop.raise_if_received()
        taken = self.study.take(jax.local_device_count())
        self._work(taken)
        results = self.study.results()
        running = results.frame.state.isin(['running', 'waiting']).sum()
        if taken:
          report.write_table(self.folder, results, self.split)
          if time.monotonic() - last_page > _SECONDS_BETWEEN_PAGES:
            report.write(self.folder, results, self.split)
            last_page = time.monotonic()
        elif running:
          if running != waited_for:
            progress.say(f'waiting for points of other workers: {running}')
            waited_for = running
          self.stop.sleep(_SECONDS_BETWEEN_POLLS)
        else:
          report.write(self.folder, results, self.split)
          return results
    except (OSError, *NO_ANSWER) as error:
      # The next point would fail as well.
      raise WriteError(
        f'{self.folder} or the storage cannot be used '
        f'({one_line(error.__cause__ or error)}). Nothing that is saved is '
        'lost; once it can be, the same command goes on.'
      ) from error

  def _work(self, taken: list[Point]) -> None:
    """Trains and measures points, those of one program and step together."""

    def key(point):
      steps = Checkpoints(self._folder_of(point)).all_steps()
      return points.program(point.values), steps[-1:]

    for _, group in itertools.groupby(sorted(taken, key=key), key):
      group = list(group)
      with contextlib.ExitStack() as locks:
        for point in group:
          self._lock(point, locks)
        self._train(group)

  def _folder_of(self, point: Point) -> epath.Path:
    return self.folder / POINTS / point.name

  def _lock(self, point: Point, locks: contextlib.ExitStack) -> None:
    """Excludes other runs from a point's folder; waits until they end."""
    folder = self._folder_of(point)
    folder.mkdir(parents=True, exist_ok=True)
    while True:
      try:
        return locks.enter_context(workdirs.hold(folder))
      except workdirs.InUseError as error:
        progress.say(f'waiting: {error}')
        self.stop.sleep(_SECONDS_BETWEEN_TRIES)

  def _train(self, group: list[Point]) -> None:
    """Trains and measures points together, or each alone if that fails."""
    progress.say('\n' + '; '.join(point.name for point in group))
    try:
      errors = self._train_runs(group)
    except Exception as error:
      if _is_of_disk(error):
        raise
      # Another error, as this one holds the memory of what was trained.
      errors = [UserError(one_line(error))]
    self.stop.raise_if_received()
    if len(errors) < len(group):
      # One is at fault, or together they need too much memory.
      progress.say(f'{errors[0]}\nTrying them one by one.')
      for point in group:
        self._train([point])
      return
    for point, error in zip(group, errors, strict=True):
      self.stop.raise_if_received()
      if error is None:
        error = self._measure(point)
      if error is not None:
        progress.say(f'{point.name}: failed, {one_line(error)}')
        self.study.record(point, error=one_line(error))

  def _train_runs(self, group: list[Point]) -> list[UserError | None]:
    """Trains the runs of points; returns what ended each early, if anything."""
    with contextlib.ExitStack() as stack:
      runs = []
      for point in group:
        folder = self._folder_of(point)
        config = points.configure(self.study.base, point.values)
        workdirs.check(config, folder)
        writer = metric_writer.MetricWriter(folder)
        stack.callback(writer.close)
        runs.append(train.Run(config, folder, writer))
      config, data = runs[0].config, load_data(runs[0].config)
      dims = [run.config.model.get('latent_dim', 0) for run in runs]
      devices = jax.device_count()
      if len(runs) == 1 < devices and config.train.batch_size % devices == 0:
        # Its batches are split over the devices.
        train.train_and_evaluate(
          config, runs[0].workdir, data, runs[0].writer, self.stop
        )
        return [None]
      # Points of an earlier command may have larger ones.
      latent_dim = max(self._latent_dim, *dims)
      return train.train_population(runs, data, latent_dim, self.stop)

  def _measure(self, point: Point) -> Exception | None:
    """Measures a trained point and records it; returns what prevents it."""
    config = points.configure(self.study.base, point.values)
    folder, latent_dim = self._folder_of(point), self._latent_dim
    try:
      row, units = measure_run(
        config, folder, self.split, self.settings, latent_dim
      )
      for name in self.study.objectives:
        if not math.isfinite(row[name]):
          raise UserError(f'diverged: {name} is {row[name]}.')
    except Exception as error:
      if _is_of_disk(error):
        raise
      return error
    metrics = {name: row[name] for name in units}
    report.write_measurement(folder, metrics)
    if self.study.record(point, row=row, units=units):
      progress.say(
        f'{point.name}: rate {row["rate"]:.2f}, distortion '
        f'{row["distortion"]:,.1f} nats, {row["active_units"]:.0f} active units'
      )
    return None


def measure_run(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  split_name: str,
  settings: measure.Settings,
  latent_dim: int,
) -> tuple[dict[str, object], dict[str, str]]:
  """Measures a run's best checkpoint and saves its pictures.

  Models are padded to `latent_dim`, to share compiled programs. Returns metrics
  by name, with `kl` (nats) and `active` [latent_dim], and units by name.
  """
  data = load_data(config)
  split = getattr(data, split_name)
  trained = loading.restore(config, workdir)
  # Models without this setting are not padded.
  count = getattr(trained.model, 'latent_dim', None)
  padded = loading.pad_trained(trained, max(latent_dim, count or 0))
  results = measure.summarise(padded, data, split_name, settings)
  kl = results.dimensions.get('kl', [])[:count]
  variances = results.dimensions.get('mean_variance', [])[:count]
  metrics = results.metrics
  if settings.groups:
    more = measure.measure(trained, data, split_name, settings)
    for name, metric in more.metrics.items():
      metrics[name] = metric
      if metric.null:
        metrics[f'{name}_null'] = Metric(metric.null.value, metric.unit, '')
  # As the run logged them.
  rows = [r for r in metric_writer.read(workdir) if 'images_per_second' in r]
  speeds = np.array([row['images_per_second'] for row in rows])
  images = config.train.batch_size * np.diff([0, *(r['step'] for r in rows)])
  speed = float(np.median(speeds)) if rows else math.nan
  metrics['images_per_second'] = Metric(speed, 'images/s', '')
  metrics['seconds'] = Metric(sum(images / speeds), 's of training steps', '')
  first = np.arange(min(_NUM_IMAGES, split.num_examples))
  originals, labels = next(
    conditioning.batches(config, split, first, _NUM_IMAGES)
  )
  z = padded.sample_latents(_NUM_IMAGES)
  in_turn = conditioning.in_turn(padded.model, _NUM_IMAGES)
  if isinstance(padded.prior, distributions.StandardNormal):
    # Models of more dimensions share the first ones.
    u = np.random.default_rng(0).random((*z.shape[:0:-1], _NUM_IMAGES))
    z = distributions.quantile(padded.prior, u.T.astype(np.float32))
  for name, images in (
    (report.ORIGINALS, originals),
    (report.RECONSTRUCTIONS, padded.reconstruct(originals, labels=labels)),
    (report.SAMPLES, padded.decode(z, in_turn)),
  ):
    strip = figures.image_grid(images, columns=len(images))
    figures.save_png(strip, workdir / name)
  row = {name: metric.value for name, metric in metrics.items()}
  row['kl'] = list(kl)
  row['active'] = [v > posterior.ACTIVE_VARIANCE for v in variances]
  # Not `of 16`, which is not the unit of all points.
  return row, {
    name: re.sub(r'of \d+$', 'dimensions', metric.unit)
    for name, metric in metrics.items()
  }


def _is_of_disk(error: Exception) -> bool:
  """Whether a disk or a bucket is at fault, with which all points fail."""
  kinds = OSError, WriteError
  return isinstance(error, kinds) or isinstance(error.__cause__, OSError)
