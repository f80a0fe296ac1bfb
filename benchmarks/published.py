r"""The rows of docs/published.md, several seeds of each in one program.

  python benchmarks/published.py --rows=iwae:vae,vampprior:normal \
    --data_dir=FOLDER --output=FILE

Each row is a config of configs/paper. Its seeds are trained together: the step
is `vae.steps.train_loop` with an axis for the seeds (`jax.vmap`), so that each
is the run that main.py would train, but for rounding. Small networks leave an
accelerator almost idle, and all seeds take little more time than one. After the
last epoch -log p(x) of the test images is bounded as evaluate.py does it.

Digits are read through TFDS and kept in --images, which a machine without
TensorFlow needs. Nothing is saved but the numbers.
"""

import functools
import importlib
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from evaluation import bounds, measure, posterior
from runs import schema
from vae import devices, loading, numerics, splits, steps
from vae.loading import TrainedVAE

# Epochs between two lines of progress.
_EPOCHS_OF_LINE = 10


def main() -> None:
  """Trains and measures each row; prints a table, and writes JSON."""
  args = _arguments()
  content = results.begin(args)
  images = _read_images(args.images, args.data_dir)
  rows = content['rows'] = []
  for row in args.rows:
    config = make_config(row, args)
    data = _data_set(config, images, args.quick)
    start = time.perf_counter()
    states = train(config, data, range(args.num_seeds), args.seconds)
    trained_in = time.perf_counter() - start
    model = steps.program_from_config(config, 1, axis_name=None).model
    seeds = [
      TrainedVAE(config, model, state.variables, int(state.step))
      for state in states
    ]
    rows.append(_row(row, seeds, data, args, trained_in))
    results.save(args.output, content)
  for workdir in args.workdirs:
    trained = loading.load(workdir, 'last')
    data = _data_set(trained.config, images, args.quick)
    rows.append(_row(workdir, [trained], data, args))
    results.save(args.output, content)
  print(f'\n{table(rows)}')
  results.write(args.output, content)


def train(config, data: splits.DataSet, seeds, seconds: float | None = None):
  """Trains a run of each seed; begins no epoch after `seconds`.

  Returns:
    The last state of each.
  """
  num_examples, batch_size = data.train.num_examples, config.train.batch_size
  program = steps.program_from_config(config, num_examples, axis_name=None)
  with numerics.fixed(config.model.get('dtype', 'float32')):
    loop = jax.jit(
      jax.vmap(
        functools.partial(steps.train_loop, program),
        # State, settings, key, stored images, batches, their number.
        in_axes=(0, None, 0, None, 0, None),
      ),
      donate_argnums=0,
    )
    states = jax.device_get([steps.create_state(program, s) for s in seeds])
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    keys = numerics.wrap(
      jnp.stack([jax.random.key_data(numerics.train_key(s)) for s in seeds])
    )
    settings = steps.settings_from_config(config)
    stored = jax.device_put(splits.pack_tiles(data.train.images))
    start = time.perf_counter()
    for epoch in range(config.train.num_epochs):
      chunks = [
        next(
          splits.train_chunks(
            *(splits.DeviceSplit(data.train), seed, epoch, 0, batch_size),
            *(num_examples // batch_size, devices.Topology()),
          )
        )
        for seed in seeds
      ]
      # [num_seeds, steps, batch_size], of the one device.
      images = np.stack([chunk.batches.images[0] for chunk in chunks])
      state, metrics = loop(
        *(state, settings, keys, stored),
        *(splits.Examples(images), chunks[0].num_batches),
      )
      loss = np.asarray(metrics['loss']).mean(axis=1)
      passed = time.perf_counter() - start
      if epoch % _EPOCHS_OF_LINE == 0:
        print(f'epoch {epoch + 1}, {passed:.0f} s: {loss}', flush=True)
      if seconds is not None and passed > seconds:
        break
  states = jax.device_get(state)
  return [jax.tree.map(lambda a, i=i: a[i], states) for i in range(len(seeds))]


def make_config(row: str, args):
  """The config of a row, as FILE:ARGUMENT, with the flags that change it."""
  name, _, argument = row.partition(':')
  module = importlib.import_module(f'configs.paper.{name}')
  config = module.get_config(*[argument] * bool(argument))
  if args.num_epochs:
    config.train.num_epochs = args.num_epochs
  schema.validate(config)
  return config


def _row(name, seeds, data, args, trained_in=None) -> dict[str, object]:
  """A row of the JSON, and its lines."""
  start = time.perf_counter()
  steps_per_epoch = data.train.num_examples // seeds[0].config.train.batch_size
  row = {
    'row': name,
    'epochs': seeds[0].step // steps_per_epoch,
    'training_seconds': trained_in,
    'seeds': [_measure(trained, data, args) for trained in seeds],
    'measuring_seconds': time.perf_counter() - start,
  }
  print(table([row]), flush=True)
  return row


def table(rows) -> str:
  """Markdown of the JSON's rows."""
  header = ['row', '-log p(x), nats', 'sd of seeds', 'its error', 'active']
  header += ['epochs', 'training, s', 'measuring, s']
  lines = []
  for row in rows:
    nats = [-seed['iw_bound'] for seed in row['seeds']]
    lines.append(
      [
        row['row'],
        f'{np.mean(nats):.2f} ({", ".join(f"{n:.2f}" for n in nats)})',
        f'{np.std(nats, ddof=1):.2f}' if len(nats) > 1 else '',
        f'{row["seeds"][0]["iw_bound_error"]:.2f}',
        ', '.join(f'{seed["active_units"]:.0f}' for seed in row['seeds']),
        str(row['epochs']),
        f'{row["training_seconds"]:.0f}' if row['training_seconds'] else '',
        f'{row["measuring_seconds"]:.0f}',
      ]
    )
  return results.table(header, lines)


def _measure(trained: TrainedVAE, data, args) -> dict[str, float]:
  settings = measure.Settings(num_importance_samples=args.draws)
  context = measure.Context(trained, data, 'test', settings)
  measured = measure.Measurements()
  with numerics.precise(steps.float_dtype(trained.model)):
    bounds.evaluate(context, measured)
    posterior.add_dimensions(measured, context.images, draws_z=True)
  bound = measured.metrics['iw_bound']
  return {
    'iw_bound': bound.value,
    'iw_bound_error': bound.standard_error,
    'elbo': measured.metrics['elbo'].value,
    'active_units': measured.metrics['active_units'].value,
  }


def _read_images(path: str, data_dir: str) -> dict[str, np.ndarray]:
  """Digits of MNIST's splits `train` and `test`."""
  if not pathlib.Path(path).exists():
    from configs.paper import iwae
    import input_pipeline

    config = iwae.get_config()
    config.data.dir, config.data.cache = data_dir, 'host'
    data = input_pipeline.load(config, ('train', 'test'))
    np.savez_compressed(path, train=data.train.images, test=data.test.images)
  with np.load(path) as file:
    return dict(file)


def _data_set(config, images, quick: bool) -> splits.DataSet:
  def split(expression):
    name, start, end = re.fullmatch(
      r'(\w+)(?:\[(\d*):(\d*)\])?', expression
    ).groups()
    part = images[name][int(start or 0) : int(end) if end else None]
    return splits.ArraySplit(part[:300] if quick else part)

  return splits.DataSet(
    **{name: split(config.data[name]) for name in ('train', 'validation')},
    test=split('test'),
  )


def _arguments():
  parser = results.make_parser(__doc__)
  add = parser.add_argument
  add(
    '--rows',
    type=lambda text: text.split(','),
    default=[],
    help='configs of configs/paper to train, separated by commas',
  )
  add(
    '--workdirs',
    type=lambda text: text.split(','),
    default=[],
    help='finished runs to measure too, separated by commas',
  )
  add('--num_seeds', type=int, default=3, help='of each row, from 0 (3)')
  add('--num_epochs', type=int, help="(the config's)")
  add('--seconds', type=float, help='of training a row, at most')
  add('--draws', type=int, default=5_000, help='for the bound (5,000)')
  add('--images', default='mnist.npz', help='of MNIST; made if absent')
  add('--data_dir', default='', help="TFDS's, where --images is absent")
  args = results.parse(parser, num_epochs=2, num_seeds=2, draws=10)
  if not args.rows and not args.workdirs:
    parser.error('name --rows or --workdirs.')
  return args


if __name__ == '__main__':
  main()
