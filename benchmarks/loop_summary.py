"""Reduces the calls of a recorded training loop to numbers and a table."""

import statistics
from typing import Any

from benchmarks import loop_recorder, results

CELEBA = {'num_examples': 162_770, 'num_validation': 19_867}


# Largest share of the loop in which the devices may wait for the host.
TARGET_SHARES = {'device': 0.02, 'host': 0.1}


def summarize(
  recorder: loop_recorder.Recorder, end: float, settings: dict[str, Any]
) -> dict[str, Any]:
  """The numbers of the table, in seconds, as JSON.

  Args:
    recorder: closed.
    end: time at which the loop returned.
    settings: complete.
  """
  calls, epochs = recorder.calls, settings['epochs']
  loop_recorder.settle(calls)
  num_later = max(epochs - 1, 1)
  later = [call for call in calls if call.epoch >= epochs - num_later]
  counted = later
  if epochs == 1:
    counted = _of(calls, kind='training')[1:]
  seconds = [_total(_of(calls, epoch=epoch)) for epoch in range(epochs)]
  epoch_seconds = statistics.median(seconds[-num_later:])
  wait_share = sum(call.wait for call in counted) / max(_total(counted), 1e-9)
  num_trained = settings['num_examples'] // settings['batch_size']
  num_trained *= settings['batch_size']

  devices = {
    kind: sum(call.computation for call in _of(later, kind=kind)) / num_later
    for kind in loop_recorder.KINDS
  }
  # Waits, by the kind of call that ended them.
  for kind in loop_recorder.KINDS:
    waits = [call.wait for call in _of(later, kind=kind)]
    devices[f'waits for {kind}'] = sum(waits) / num_later
  host = {work: recorder.host[work] / epochs for work in loop_recorder.HOST}
  # These traced and compiled.
  firsts = [call for call in calls if call.is_first]
  host[loop_recorder.CALLS] -= (
    sum(c.returned - c.called for c in firsts) / epochs
  )
  return {
    'seconds_per_epoch': epoch_seconds,
    'seconds_of_each_epoch': seconds,
    'seconds_per_epoch_at_celebas_size': epoch_seconds
    if _is_whole(settings)
    else _at_celebas_size(later, settings) / num_later,
    'training_images_per_second': num_trained / epoch_seconds,
    'wait_share': wait_share,
    'devices': devices,
    'host': host,
    'compilation': sum(call.compilation for call in firsts),
    'after_the_last_epoch': end - max(call.finished for call in calls),
    'loop_seconds': end - recorder.start,
  }


def _is_whole(settings: dict[str, Any]) -> bool:
  return all(settings[name] == CELEBA[name] for name in CELEBA)


def _at_celebas_size(
  calls: list[loop_recorder.Call], settings: dict[str, Any]
) -> float:
  """Seconds for training and validation splits of CelebA's size."""
  longer = {
    'training': CELEBA['num_examples'] / settings['num_examples'],
    'validation': CELEBA['num_validation'] / settings['num_validation'],
  }
  return sum(
    longer.get(kind, 1) * _total(_of(calls, kind=kind))
    for kind in loop_recorder.KINDS
  )


def _of(
  calls: list[loop_recorder.Call],
  kind: str | None = None,
  epoch: int | None = None,
) -> list[loop_recorder.Call]:
  return [
    call
    for call in calls
    if kind in (None, call.kind) and epoch in (None, call.epoch)
  ]


def _total(calls: list[loop_recorder.Call]) -> float:
  return sum(call.wait + call.computation for call in calls)


def table(modes: dict[str, dict[str, Any]]) -> str:
  """Markdown, a column for each mode."""
  first = next(iter(modes.values()))
  settings = first['settings']
  rows = []

  def row(label, value, form='{:.3f}'):
    rows.append((label, *(form.format(value(mode)) for mode in modes.values())))

  row('**seconds per epoch**', lambda m: m['seconds_per_epoch'], '**{:.3f}**')
  if not _is_whole(settings):
    row(
      "… at CelebA's size, extrapolated",
      lambda m: m['seconds_per_epoch_at_celebas_size'],
      '≈ {:.1f}',
    )
  if first['platform'] != 'cpu':
    row(
      '… of 100 epochs, extrapolated',
      lambda m: 100 * m['seconds_per_epoch_at_celebas_size'],
      '≈ {:.0f}',
    )
  row(
    "training images/s, validation's time included",
    lambda m: m['training_images_per_second'],
    '{:,.0f}',
  )
  row(
    'devices wait for the host, share of the loop',
    lambda m: m['wait_share'],
    '{:.2%}',
  )
  rows.append(
    ('… target', *(f'< {TARGET_SHARES[cache]:.0%}' for cache in modes))
  )
  for group in ('devices', 'host'):
    for work in first[group]:
      row(f'{group}, s/epoch: {work}', lambda m, g=group, w=work: m[g][w])
  row('once: compilation, s', lambda m: m['compilation'])
  row(
    'once: last checkpoint and pictures, s',
    lambda m: m['after_the_last_epoch'],
  )
  for state in ('cold', 'warm'):
    if f'first_step_{state}' in first:
      row(
        f'first step, {state}, s',
        lambda m, state=state: m[f'first_step_{state}'],
        '{:.1f}',
      )
  return results.table(['', *(f'`{cache}`' for cache in modes)], rows)


def heading(result: dict[str, Any]) -> str:
  """The settings of a measurement, in a line."""
  settings = result['settings']
  dispatch = settings['steps_per_dispatch'] or "the loop's number of"
  return (
    f'{settings["num_examples"]:,} training images, '
    f'{settings["num_validation"]:,} of validation; epochs: '
    f'{settings["epochs"]}; batches of '
    f'{settings["batch_size"]}, {dispatch} steps per dispatch, '
    f'{settings["dtype"]}.'
  )
